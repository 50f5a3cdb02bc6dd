"""Streaming from a server that fails: now and then, and for good."""

import random
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from . import sets
from .comparing import GLOBAL_BATCH_SIZE, compare, figures_of, reference
from .outcome import Outcome
from .recording import Impatience
from .runs import Run

SIZES = (59,) * 23 + (80,)  # more files than are kept open, so that they are fetched again and again
FAULTS = ("reset", "cut", "stall", 429, 500, 503)
FAULTS_WITHOUT_A_BODY = ("reset", 429, 500, 503)
IMPATIENCE = Impatience(between_tries=0.1, for_an_answer=1.0)
BOUND = 120.0  # seconds in which a run must end that cannot read on
STEPS = 44


class FailingServer(ThreadingHTTPServer):
    """Serves a folder on the loopback interface, in ranges, and fails.

    Args:
        folder: what it serves.
        seed: of its failures.

    Attributes:
        fault_rate: which part of the requests fails.
        is_out: whether all do.
        faults: how many did, by kind.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, seed: int = 0):
        super().__init__(("127.0.0.1", 0), partial(FailingHandler, directory=str(folder)))
        self.fault_rate, self.is_out = 0.0, False
        self.faults: Counter[str | int] = Counter()
        self._chance = random.Random(seed)

    def next_fault(self, possible: Sequence[str | int]) -> str | int | None:
        """What happens to a request; None: it is answered."""
        if self.is_out:
            return "reset"
        if self._chance.random() >= self.fault_rate:
            return None
        fault = self._chance.choice(possible)
        self.faults[fault] += 1
        return fault

    def handle_error(self, *_: Any) -> None:
        """Clients that are gone are no news here."""


class FailingHandler(SimpleHTTPRequestHandler):
    """Answers with a file, a range of it, or a fault."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """Only the headers."""
        self._answer(with_body=False)

    def do_GET(self) -> None:
        """The file, or the range that is asked for."""
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        fault = self.server.next_fault(FAULTS if with_body else FAULTS_WITHOUT_A_BODY)
        if isinstance(fault, int):
            self.send_error(fault)
        elif fault == "reset":
            self._hang_up()
        else:
            self._send(Path(self.translate_path(self.path)), fault, with_body)

    def _send(self, path: Path, fault: str | None, with_body: bool) -> None:
        content = path.read_bytes()
        start, stop = self._range(len(content))
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if with_body and fault is None:
            self.wfile.write(content[start:stop])
        elif fault is not None:
            self.wfile.write(content[start : (start + stop) // 2])
            if fault == "stall":
                time.sleep(3 * IMPATIENCE.for_an_answer)
            self.close_connection = True

    def _range(self, size: int) -> tuple[int, int]:
        if "Range" not in self.headers:
            return 0, size
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        return int(first), min(int(last or size) + 1, size)

    def _hang_up(self) -> None:
        """Closes with a reset, not with an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[FailingServer]:
    """A server in a thread of this process."""
    server = FailingServer(folder)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def shard_flags(folder: Path, server: FailingServer) -> dict[str, Any]:
    """Flags that read the folder's shards from the server."""
    urls = [f"http://127.0.0.1:{server.server_port}/{path.name}" for path in sorted(folder.glob("*.parquet"))]
    return {"data_files": urls, "streaming": True, "shuffle_window": sets.WINDOW}


def faults(folder: Path, fault_rate: float = 0.25) -> Outcome:
    """A run of two epochs over a server that fails one request in four."""
    whole, shards = local_run(folder)
    with serving(shards) as server:
        flags = {**whole.flags, **shard_flags(shards, server), "cache_dir": folder / "other-cache"}
        run = Run(folder / "over-http", flags)
        run.start(impatience=IMPATIENCE)
        run.wait_for_passes(1)
        server.fault_rate = fault_rate  # 🤗 Datasets, which looks the files up at the start, gives up at once
        codes = run.wait()
    comparison = compare(run, whole)
    return Outcome(
        drill="streaming over HTTP from a server that resets, cuts, stalls, says 429, 500 and 503",
        passed=codes == [0] and comparison.equal and set(server.faults) == set(FAULTS),
        figures={"faults": server.faults.total(), "kinds": len(server.faults), **figures_of([comparison])},
    )


def outage(folder: Path, num_processes: int) -> Outcome:
    """A server that is gone for good in the middle of a run, and back when it is resumed."""
    whole, shards = local_run(folder, num_processes)
    with serving(shards) as server:
        flags = {**whole.flags, **shard_flags(shards, server), "cache_dir": folder / "other-cache"}
        run = Run(folder / "over-http", flags, num_processes)
        run.start(impatience=IMPATIENCE)
        run.wait_for_passes(STEPS // 3)
        server.is_out, began = True, time.monotonic()
        codes = run.wait(BOUND)
        seconds = time.monotonic() - began
        server.is_out = False
        run.finish(impatience=IMPATIENCE)
    comparison, redone = compare(run, whole), run.record.most_redone()
    return Outcome(
        drill=f"the HTTP server gone for good, processes: {num_processes}",
        passed=codes == [1] * num_processes and redone == 0 and comparison.equal,
        figures={
            "exit codes": codes,
            "seconds to the end": round(seconds, 1),
            "bound in seconds": BOUND,
            "steps lost": redone,
            **figures_of([comparison]),
        },
    )


def stop_in_an_outage(folder: Path) -> Outcome:
    """SIGTERM while a server that is gone is asked again and again, with the waits of a run in earnest."""
    whole, shards = local_run(folder)
    with serving(shards) as server:
        flags = {**whole.flags, **shard_flags(shards, server), "cache_dir": folder / "other-cache"}
        run = Run(folder / "over-http", flags)
        run.start()
        run.wait_for_passes(STEPS // 3)
        server.is_out = True
        run.wait_for(lambda: "could not be read, try 1" in run.log() or not run.is_alive())
        run.send(signal.SIGTERM)
        asked = time.monotonic()
        codes = run.wait()
        seconds = time.monotonic() - asked
        server.is_out = False
        run.finish()
    comparison, redone = compare(run, whole), run.record.most_redone()
    return Outcome(
        drill="SIGTERM while the HTTP server is gone",
        passed=codes == [128 + signal.SIGTERM] and redone == 0 and comparison.equal,
        figures={
            "exit code": codes[0],
            "seconds to the end": round(seconds, 1),
            "steps lost": redone,
            **figures_of([comparison]),
        },
    )


def local_run(folder: Path, num_processes: int = 1) -> tuple[Run, Path]:
    """The run that reads the same shards from the disk, and where they lie."""
    pattern = sets.write_parquet(folder / "shards", sets.encoded_digits(), SIZES)
    flags = {"data_files": pattern, "streaming": True, "shuffle_window": sets.WINDOW, "cache_dir": folder / "cache"}
    flags |= {"per_device_train_batch_size": GLOBAL_BATCH_SIZE // num_processes, "dataloader_num_workers": 1}
    return reference(folder / "whole", STEPS, num_processes, **flags), folder / "shards"
