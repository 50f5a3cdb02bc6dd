"""Pushing a run's folder to the Hub: access is checked before the run, the upload follows it."""

from pathlib import Path

from ..flags.hub import HubArguments
from ..hub.push import check_access, push_checkpoint
from ..training.processes import on_main_process


def claim_repository(flags: HubArguments, output_dir: Path) -> str | None:
    """The repository that a run will be pushed to, made now if it is new; None where nothing is to be pushed.

    Raises:
        PermissionError, ValueError: see `check_access`; better now than after days of training.
    """
    if not flags.push_to_hub:
        return None
    name, private = flags.hub_model_id or output_dir.resolve().name, flags.hub_private_repo or None
    return on_main_process(lambda: check_access(name, private=private))


def publish(output_dir: Path, repo_id: str | None, private: bool) -> int:
    """Pushes the output of a run, if the flags say so, and returns the exit code; call it on one process only.

    A failure is reported and does no harm: `python -m mimae.hub.push` tries again.
    """
    if repo_id is None:
        return 0
    report = push_checkpoint(output_dir, repo_id, private=private or None)
    print(report.describe())
    if report.error:
        print(f"{output_dir} is whole; try again with: python -m mimae.hub.push {output_dir} {report.repo_id}")
    return 1 if report.error else 0
