"""Seconds from the command to the first optimiser step, and how many of them importing torch and transformers takes.

Every start is a process of its own, watched from outside: what it prints and writes says how far it is. At its first
step it is ended.
"""

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .measurement import Bar, Measurement, Table
from .measuring import take_turns

ROUNDS = 3
SCRIPT = str(Path(__file__).resolve().parents[1] / "run_mim_pretrain.py")
DEMO = (sys.executable, SCRIPT)
LAUNCHER = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1")
LAUNCHER_ALONE = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1")
VIT_BASE = "{preset: vit-base, dataset_name: digits, per_device_train_batch_size: 2, probe_samples: 0, cpu_threads: 2}"
IMPORTS = "import torch, transformers; from transformers import ViTMAEForPreTraining"
END_OF_IMPORTS = "torch and transformers are imported"
THEN_THE_DEMO = (
    f"import sys; print({END_OF_IMPORTS!r}, file=sys.stderr); from mimae.run_mim_pretrain import main; main()"
)
PROFILED_DEMO = (sys.executable, "-X", "importtime", "-c", f"{IMPORTS}; {THEN_THE_DEMO}")
IMPORTED_MODULE = re.compile(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", re.MULTILINE)
WORTH_A_ROW = 0.02  # seconds
BETWEEN_LOOKS = 0.02  # seconds

BASELINE, LAUNCHED = "torch and transformers, imported", "demo, `accelerate launch`"
MILESTONES = ("ready", "evaluated", "stepped")


@dataclass(frozen=True)
class Start:
    """Of one process, seconds from its start.

    Args:
        ready: until the log's first line; all is imported, and the run's folder is there.
        evaluated: until the untrained model is drawn and probed; data and model are there.
        stepped: until the first optimiser step is in `metrics.jsonl`.
        output: what it has printed.
    """

    ready: float
    evaluated: float
    stepped: float
    output: str = field(repr=False)


def measure(device: torch.device, *, quick: bool) -> Measurement:
    """Starts the demo again and again, in turn with a process that only imports torch and transformers."""
    rounds, warm_up = (1, 0) if quick else (ROUNDS, 1)
    with TemporaryDirectory() as folder:
        recipe = Path(folder, "vit_base.yaml")
        recipe.write_text(VIT_BASE, encoding="utf-8")
        commands: dict[str, tuple[str, ...]] = {LAUNCHED: (*LAUNCHER, SCRIPT)}
        if not quick:
            commands |= {
                "demo, `accelerate-launch`": (*LAUNCHER_ALONE, SCRIPT),
                "demo, `python`": DEMO,
                "ViT-B at 224 px, 2 digits a step, no probe, `python`": (*DEMO, "--config", str(recipe)),
            }
        starts: dict[str, list[Start]] = {name: [] for name in commands}
        contestants: dict[str, Callable[[], object]] = {
            name: partial(add_start, starts[name], command) for name, command in commands.items()
        }
        contestants[BASELINE] = partial(subprocess.run, [sys.executable, "-c", IMPORTS], check=True)
        imported = take_turns(contestants, rounds=rounds, warm_up=warm_up, device=device)[BASELINE]
        timed = {name: all_starts[warm_up:] for name, all_starts in starts.items()}
        if not quick:
            compiled = partial(start_of, (*DEMO, "--torch_compile", "true"), {"TORCHINDUCTOR_CACHE_DIR": folder})
            timed |= {f"demo compiled, `python`, {which} start": [compiled()] for which in ("first", "second")}
    return Measurement(
        what="Seconds from the command to the first optimiser step, with pictures and probe of the untrained model.",
        tables=[starts_table(imported, timed), imports_table(start_of(PROFILED_DEMO).output)],
        bars=[
            Bar(
                "start to first step of the demo by `accelerate launch`, beyond importing torch and transformers",
                target=15.0,
                figure=seconds_beyond(imported, timed[LAUNCHED]),
                unit="s",
                at_most=True,
            )
        ],
    )


def add_start(starts: list[Start], command: Sequence[str]) -> None:
    """One more start of this command."""
    starts.append(start_of(command))


def start_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Start:
    """Starts a pre-training, waits for its first step, and ends it with all its processes.

    Args:
        command: of the run, without the flags that say where it writes and how often.
        environment: on top of this process's.

    Raises:
        RuntimeError: it ended before its first step; with the end of what it printed.
    """
    with TemporaryDirectory() as folder:
        run, log = Path(folder, "run"), Path(folder, "log")
        metrics = run / "metrics.jsonl"
        signs = dict(zip(MILESTONES, ((log, "world size"), (metrics, '"step"'), (metrics, '"loss"')), strict=True))
        seen: dict[str, float] = {}
        with log.open("wb") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                [*command, "--output_dir", str(run), "--logging_steps", "1"],
                env={**os.environ, **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, to be ended as a whole
            )
        try:
            while "stepped" not in seen:
                time.sleep(BETWEEN_LOOKS)
                has_ended = process.poll() is not None  # before looking: what it wrote last counts
                now = time.perf_counter() - began
                seen |= {name: now for name, sign in signs.items() if name not in seen and is_in(*sign)}
                if has_ended and "stepped" not in seen:
                    raise RuntimeError(f"{' '.join(command)} ended before its first step:\n{text_of(log)[-2000:]}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Start(**seen, output=text_of(log))


def is_in(path: Path, words: str) -> bool:
    """Whether the file is there and has these words."""
    return path.exists() and words in text_of(path)


def text_of(path: Path) -> str:
    """What has been written so far."""
    return path.read_text(encoding="utf-8", errors="replace")


def seconds_beyond(imported: Sequence[float], starts: Sequence[Start]) -> float:
    """The median first step, less the median import."""
    return statistics.median(start.stepped for start in starts) - statistics.median(imported)


def starts_table(imported: Sequence[float], starts: Mapping[str, Sequence[Start]]) -> Table:
    """A row for each contestant: the medians of its starts, and what is beyond the imports."""
    rows: list[tuple[str | float | None, ...]] = [(BASELINE, None, None, statistics.median(imported), None)]
    for name, timed in starts.items():
        ready, evaluated, stepped = (
            statistics.median(getattr(start, milestone) for start in timed) for milestone in MILESTONES
        )
        rows.append((name, ready, evaluated, stepped, seconds_beyond(imported, timed)))
    return Table(
        "From the command to the first step",
        ("seconds", "to the log's first line", "to the first evaluation's end", "to the first step's end", "beyond"),
        rows,
        note="Beyond: to the first step's end, less what importing torch and transformers takes.",
    )


def imports_table(output: str) -> Table:
    """What the demo imports beyond torch and transformers before its first step, by top-level package.

    Args:
        output: of a process with `-X importtime`, which has printed `END_OF_IMPORTS` where the rest begins.
    """
    microseconds: dict[str, list[int]] = defaultdict(list)
    for own, module in IMPORTED_MODULE.findall(output.partition(END_OF_IMPORTS)[2]):
        microseconds[module.partition(".")[0]].append(int(own))
    packages = {name: (sum(times) / 1e6, len(times)) for name, times in microseconds.items()}
    ordered = sorted(packages.items(), key=lambda package: -package[1][0])
    rows = [(name, *figures) for name, figures in ordered if figures[0] >= WORTH_A_ROW]
    rest = [figures for _, figures in ordered if figures[0] < WORTH_A_ROW]
    rows += [(f"{len(rest)} others", sum(own for own, _ in rest), sum(number for _, number in rest))]
    rows += [("all", *(sum(column) for column in zip(*packages.values(), strict=True)))]
    return Table(
        "What the demo imports before its first step, beyond torch and transformers",
        ("package", "seconds", "modules"),
        rows,
        note="Time in a package's own modules, of one process under `-X importtime`, which slows it.",
    )
