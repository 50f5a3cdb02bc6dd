"""SIGTERM and SIGUSR1 ask for a checkpoint and an end; all processes answer at the same step."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from .processes import Agreement

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RunStopped(Exception):
    """The run was asked to stop and has saved a checkpoint. `exit_code` is 128 + signal, as in a shell."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class WaitEnded(BaseException):
    """A stop signal came within `StopRequest.ending_waits`. Not an Exception, so that no retry loop catches it."""


class StopRequest:
    """Remembers the first stop signal; `agreed()` tells all processes alike whether any of them got one."""

    def __init__(self, agreement: Agreement):
        self._signum, self._agreement = 0, agreement
        self._ends_waits = False
        self._previous: dict[signal.Signals, Any] = {}  # handlers, to be put back

    def __enter__(self) -> "StopRequest":
        self._previous = {s: signal.signal(s, self._remember) for s in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, _frame: object) -> None:
        self._signum = self._signum or signum
        if self._ends_waits:
            raise WaitEnded

    @contextlib.contextmanager
    def ending_waits(self) -> Iterator[None]:
        """A context in which a stop signal, even an earlier one, ends any wait of this process. Raises: WaitEnded."""
        self._ends_waits = True
        try:
            if self._signum:
                raise WaitEnded
            yield
        finally:
            self._ends_waits = False

    def agreed(self) -> int:
        """The signal's number if any process got one, else 0."""
        return self._agreement.largest(self._signum)
