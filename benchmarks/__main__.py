"""Benchmarks: this project beside its peers, contestants taking turns in one run.

python -m mimae.benchmarks                          # all of them; writes docs/performance.md
python -m mimae.benchmarks pretrain_step            # one, and its part of the page anew
python -m mimae.benchmarks --quick --output_dir DIR # a rehearsal in small, kept elsewhere
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch

from .measurement import Measurement, markdown_table, record_of, write_record
from .report import write_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
BENCHMARKS = ("pretrain_step", "candidates", "data_pipeline", "startup")


def benchmark_named(name: str) -> Callable[..., Measurement]:
    """Its `measure(device, quick=…)`; imported only now, since each needs libraries of its own."""
    return import_module(f"{__package__}.{name}").measure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks that are named, prints their tables, and keeps what they have measured."""
    parser = argparse.ArgumentParser(
        "python -m mimae.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmarks", nargs="*", metavar="benchmark", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: small models, few rounds")
    parser.add_argument("--output_dir", type=Path, default=DOCS, help="where the page and its records go")
    flags = parser.parse_args(argv)
    if unknown := set(flags.benchmarks) - set(BENCHMARKS):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if flags.quick and flags.output_dir == DOCS:
        parser.error("--quick measures nothing worth keeping: give it an --output_dir of its own")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in flags.benchmarks or BENCHMARKS:
        measurement = benchmark_named(name)(device, quick=flags.quick)
        for table in measurement.tables:
            print("\n".join(["", table.title, "", *markdown_table(table)]), flush=True)
        record = record_of(name, measurement, device)
        print("\nkept in", write_record(flags.output_dir / "performance", record, device))
        write_page(flags.output_dir / "performance", flags.output_dir / "performance.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
