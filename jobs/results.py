"""What a finished run leaves for people: `results.json`, curves, a picture, the card, and a few lines in words."""

import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..hub.model_card import write_model_card
from ..modeling_mim import LossTerm
from ..pictures.curves import pretraining_panels, save_curves
from ..training.checkpoints.files import write_json
from ..training.jsonl import read_jsonl
from ..training.metrics import METRICS_FILE

ROOT = Path(__file__).resolve().parents[1]
RESULTS_FILE = "results.json"
PROBES = ("knn_accuracy", "linear_accuracy")
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "datasets")


def device_name(device: torch.device) -> str:
    """The device in words, for a card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}"


def package_versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    return {name: version(name) for name in PACKAGES}


def source_commit(root: Path = ROOT) -> str | None:
    """The commit of this code, with "-dirty" where code differs from it; None where it is no checkout of its own.

    Documents are not code: a program that writes its results into them leaves the next one the commit it has.
    """
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD").stdout.strip()
    is_dirty = _git(root, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)docs", ":(exclude)*.md").returncode
    return f"{commit}-dirty" if commit and is_dirty else commit or None


def _git(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True)


def write_record(output_dir: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a run's results to `results.json`, with the code that they are of, and returns both."""
    record = {**results, "commit": source_commit(), "versions": package_versions()}
    write_json(output_dir / RESULTS_FILE, record)
    return record


def write_results(
    output_dir: Path, *, facts: Mapping[str, Any], loss_terms: Mapping[str, LossTerm], picture: Path | None
) -> str:
    """Writes `results.json`, `curves.png`, `reconstructions.png` and the card `README.md` of a pre-training.

    Args:
        facts: `task`, `seed`, `recipe` (every flag's value), `hardware`, and what else is to be recorded; losses and
            probes are added here, from `metrics.jsonl`.
        loss_terms: of the model.
        picture: the newest reconstructions.

    Returns:
        The results in words.
    """
    lines = read_jsonl(output_dir / METRICS_FILE)
    probes = {line["step"]: {name: line[name] for name in PROBES} for line in lines if PROBES[0] in line}
    newest = {name: value for line in lines for name, value in line.items() if value is not None}
    final = {name: newest[name] for name in loss_terms if name in newest}
    after = probes[max(probes)] if probes else None
    results = {**facts, "metrics": {**final, **(after or {})}, "probe_before": probes.get(0)}
    hardware = {"device": facts["hardware"]["device"], "world_size": facts["hardware"]["processes"]}
    summary = {**write_record(output_dir, results), **hardware, "final": final, "probe_after": after}
    save_curves(
        output_dir / METRICS_FILE,
        output_dir / "curves.png",
        panels=pretraining_panels(loss_terms),
        gate_threshold=summary["gate_threshold"] if summary["information_terms"] else None,
    )
    if picture is not None:
        shutil.copyfile(picture, output_dir / "reconstructions.png")
    pictures = [name for name in ("reconstructions.png", "curves.png") if (output_dir / name).exists()]
    write_model_card(output_dir, summary=summary, recipe=summary["recipe"], pictures=pictures)
    return describe(summary, output_dir)


def describe(summary: dict[str, Any], output_dir: Path) -> str:
    """A few lines for the terminal."""
    losses = "  ".join(f"{name} {value:.4f}" for name, value in summary["final"].items())
    rows = [
        f"{summary['steps']} steps, {summary['epochs']:.1f} epochs of {summary['num_images']} images, "
        f"{summary['seconds']:.0f} s on {summary['world_size']} x {summary['device']}",
        f"final     {losses}",
        f"gate      {describe_gate(summary)}",
    ]
    if summary["skipped_steps"] or summary["bad_images"]:
        rows.append(f"skipped   {summary['skipped_steps']} steps, {summary['bad_images']} bad images")
    if summary["probe_before"] and summary["probe_after"]:
        for name in PROBES:
            before, after = summary["probe_before"][name], summary["probe_after"][name]
            rows.append(f"{name:15} {before:.1%} at the start -> {after:.1%} ({100 * (after - before):+.1f} points)")
    rows += [
        f"model     {output_dir} (README.md, config.json, model.safetensors, preprocessor_config.json)",
        f"look at   {output_dir}/reconstructions.png, {output_dir}/curves.png, {output_dir}/{RESULTS_FILE}",
    ]
    return framed(rows)


def framed(rows: Sequence[str]) -> str:
    """Lines for the terminal, set off from the log above them."""
    frame = "=" * max(map(len, rows))
    return "\n".join(["", frame, *rows, frame])


def describe_gate(summary: dict[str, Any]) -> str:
    """In plain words, whether the information terms ever counted."""
    threshold, step = summary["gate_threshold"], summary["gate_opened_at_step"]
    if not summary["information_terms"]:
        return "no information terms: plain reconstruction"
    if threshold is None:
        return "always open"
    if step is None:
        return (
            f"NEVER OPENED: L_rec stayed at or above {threshold}, so the information terms did not train anything. "
            "Train longer, or raise mi_gate_threshold"
        )
    return f"opened at step {step}, when L_rec first fell below {threshold}"
