"""Loss terms averaged on the device, written when logging: one line of JSON, the trackers, the progress bar."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..modeling_mim import LossTerm
from .jsonl import append_jsonl, keep_jsonl, read_jsonl
from .processes import on_main_process

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class StepMeter:
    """What happened since the last log, and what must be known of the whole run, kept on the device.

    Nothing here waits for the device until `read` or `state`.

    Args:
        names: of a model's scalars, "mi_active", its gate, among them.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self._names = (*names, "grad_norm")
        self._sums = torch.zeros(len(self._names), device=device)
        self._steps = torch.zeros((), device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = torch.zeros((), dtype=torch.int64, device=device)
        self._gate_opened_at = torch.full((), -1, dtype=torch.int64, device=device)

    def update(self, step: int, scalars: torch.Tensor, grad_norm: torch.Tensor, is_finite: torch.Tensor) -> None:
        """One optimiser step: scalars in the order of their names; a step that was skipped stays out of the means."""
        values = torch.cat([scalars, grad_norm.view(1)])
        self._sums += torch.where(is_finite, values, 0.0).nan_to_num()
        self._steps += is_finite
        skipped = (~is_finite).long()
        self._skipped += skipped
        self._in_a_row = (self._in_a_row + skipped) * skipped
        self._longest = torch.maximum(self._longest, self._in_a_row)
        opens_now = (self._gate_opened_at < 0) & (scalars[self._names.index("mi_active")] > 0)
        self._gate_opened_at = torch.where(opens_now, step, self._gate_opened_at)

    def read(self, accelerator: Accelerator) -> dict[str, float | None]:
        """Means over steps and processes since the last call; None where every step was skipped.

        `min_variance` is a mean, too: of the batches' smallest variances.
        """
        sums = accelerator.reduce(self._sums, reduction="mean").tolist()
        steps = int(self._steps)
        self._sums.zero_()
        self._steps.zero_()
        return {name: value / steps if steps else None for name, value in zip(self._names, sums, strict=True)}

    @property
    def skipped_steps(self) -> int:
        """Steps without a finite gradient, in the whole run."""
        return int(self._skipped)

    @property
    def longest_skip(self) -> int:
        """The most of them in a row."""
        return int(self._longest)

    @property
    def gate_opened_at(self) -> int | None:
        """The first step whose information terms counted; None while there was none."""
        step = int(self._gate_opened_at)
        return None if step < 0 else step

    @property
    def window(self) -> torch.Tensor:
        """This process's sums since the last log, to go on in a resumed run: a vector on the host."""
        return torch.cat([self._sums, self._steps.view(1)]).cpu()

    def load_window(self, window: torch.Tensor) -> None:
        self._sums.copy_(window[:-1])
        self._steps.copy_(window[-1])

    def state(self) -> dict[str, int]:
        """What a checkpoint must keep of the whole run; skipped steps in a row start anew after a resume."""
        return {"skipped": int(self._skipped), "gate_opened_at": int(self._gate_opened_at)}

    def load_state(self, state: dict[str, int]) -> None:
        self._skipped.fill_(state["skipped"])
        self._gate_opened_at.fill_(state["gate_opened_at"])


class MetricsFile:
    """`metrics.jsonl` of a run: what was measured after which step, a line each; only the main process writes."""

    def __init__(self, folder: Path):
        self._path = folder / METRICS_FILE

    def begin(self, step: int) -> None:
        """Goes on after this step: later lines are dropped, since those steps are run again. Collective."""
        on_main_process(lambda: keep_jsonl(self._path, lambda line: line.get("step", 0) <= step))

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One line; values that are None or not finite become null, as JSON has no NaN. Collective."""
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in metrics.items()}
        on_main_process(lambda: self._write(step, values))

    def _write(self, step: int, values: dict[str, float | None]) -> None:
        append_jsonl(self._path, [{"step": step, **values}])


class TrackedMetrics(MetricsFile):
    """The file, the trackers and the progress bar, which shows those of the loss terms that have a meaning."""

    def __init__(
        self, folder: Path, accelerator: Accelerator, *, loss_terms: Mapping[str, LossTerm], total_steps: int
    ):
        super().__init__(folder)
        self._accelerator, self._total_steps = accelerator, total_steps
        self._symbols = {name: term.symbol.removeprefix("L_") for name, term in loss_terms.items() if term.meaning}
        self._bar = tqdm(disable=True)

    def begin(self, step: int) -> None:
        """Goes on after this step, and shows the bar. Collective."""
        super().begin(step)
        # None: no bar where nobody watches, as in a cluster's log file; lines are logged there instead
        disable = None if self._accelerator.is_main_process else True
        self._bar = tqdm(total=self._total_steps, initial=step, unit="step", disable=disable, smoothing=0.05)

    def _write(self, step: int, values: dict[str, float | None]) -> None:
        super()._write(step, values)
        self._accelerator.log({k: v for k, v in values.items() if v is not None}, step=step)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the file has no line of an evaluation after this step."""
        return not any(line["step"] == step and "loss" not in line for line in read_jsonl(self._path))

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def show(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The loss terms, the speed and the gate, beside the bar or, where there is none, as a line of the log."""
        values = {symbol: metrics[name] for name, symbol in self._symbols.items()}
        shown = {symbol: "skipped" if value is None else f"{value:.3f}" for symbol, value in values.items()}
        shown["gate"] = "open" if metrics["mi_active"] else "closed"
        shown["views/s"] = f"{metrics['views_per_second']:.0f}"
        if self._bar.disable:
            left = (self._total_steps - step) * metrics["seconds_per_step"]
            words = "  ".join(f"{name} {value}" for name, value in shown.items())
            logger.info("step %d/%d  %s  left %s", step, self._total_steps, words, tqdm.format_interval(left))
        else:
            self._bar.set_postfix(shown)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
