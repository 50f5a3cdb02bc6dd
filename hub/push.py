"""Push a checkpoint to the Hub: the model with its code and its card, and its encoder as a stock ViT.

    python -m mimae.hub.push CHECKPOINT REPO_ID
    python -m mimae.hub.push CHECKPOINT REPO_ID --private --backbone revision

The access token is the one of `hf auth login`, or of HF_TOKEN. Exit codes: 0 all is there; 1 something failed, and the
last line says what.
"""

import argparse
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar, get_args

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl

# the base of what the HTTP library raises, httpx or httpx2, whichever this huggingface_hub was built on
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from transformers.dynamic_module_utils import get_relative_import_files

from .model_card import write_backbone_card
from .privacy import holds_token, public, redact

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
# what else of a run's folder goes along; a card and the pictures that it shows are added
DOCUMENTS = ("config.json", "preprocessor_config.json", "metrics.jsonl")
# seconds before each further attempt, unless the Hub asks for more
RETRY_WAITS = (2.0, 8.0, 30.0, 60.0)
LONGEST_WAIT = 300.0
# not an answer of the Hub but a gateway's page, which huggingface_hub reads as JSON
TRANSIENT_ERRORS = (HTTPError, json.JSONDecodeError)
TRANSIENT_STATUSES = (408, 429)
REMEDIES = {
    401: "the Hub does not know the access token, or there is none: `hf auth login`, or set HF_TOKEN",
    403: "the access token may not write there: `hf auth login` with one that may, or name a repository of your own",
    404: "there is no such repository that the access token can see: look at its name, and at the token's permissions",
}
# of a card: what its snippets load
SNIPPET_LINE = re.compile(r'^checkpoint = ".*"$', flags=re.MULTILINE)

Backbone = Literal["repo", "revision", "none"]
Result = TypeVar("Result")


@dataclass
class PushReport:
    """What became of a push.

    `url` and `backbone_url` say where what arrived lies, `None` for what did not. `note` says why there is no
    backbone where none is possible; `error`, in one line, what failed and what would help.
    """

    repo_id: str
    url: str | None = None
    backbone_url: str | None = None
    note: str | None = None
    error: str | None = None

    def describe(self) -> str:
        """A line for each thing that there is to say."""
        lines = [
            ("pushed    ", self.url),
            ("backbone  ", self.backbone_url),
            ("note      ", self.note),
            ("NOT PUSHED", self.error),
        ]
        return "\n".join(f"{name} {text}" for name, text in lines if text)


def check_access(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Find out before a run whether its result can be pushed, and make the repository if there is none.

    Args:
        repo_id: "owner/name", or a name under the token's own user.
        token: an access token; `None` = the one that the user is logged in with.
        private: of a new repository; `None` = as the owner's settings have it.

    Returns:
        "owner/name"; `repo_id` as it is where the Hub cannot be reached, which is only warned about.

    Raises:
        PermissionError: the token may not write there, or there is no valid token.
        ValueError: `repo_id` cannot be a repository's name.
    """
    api = HfApi(token=token)
    try:
        full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(full_name, write=True)  # of a repository that exists, the line above asks for nothing
    except (*TRANSIENT_ERRORS, OfflineModeIsEnabled) as error:
        reason = _explain(error, repo_id, token)
        if not _may_pass(error):
            raise PermissionError(reason) from None
        logger.warning("whether the result can be pushed is not known: %s", reason)
        return repo_id
    return full_name


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    backbone: Backbone = "repo",
    backbone_revision: str = "backbone",
    token: str | None = None,
    commit_message: str = "Upload model",
    retry_waits: Sequence[float] = RETRY_WAITS,
) -> PushReport:
    """Upload a model, in one commit, and its encoder as a stock ViT. Never raises, and changes no local file.

    What goes along is listed in this file: weights, configuration and the code it names, the image processor, the
    card with the pictures it shows, and the metrics. Optimiser states, checkpoints, logs and all else stay.

    Args:
        folder: a model's folder, as a run leaves it, or one of its checkpoints.
        repo_id, token, private: see `check_access`.
        backbone: where the encoder goes: "repo" is `{repo_id}-backbone`, "revision" a branch of the repository.
        backbone_revision: that branch.
        retry_waits: seconds before each further attempt where the Hub cannot be reached, or is busy.

    Returns:
        The report; its `error` is `None` when all is there.
    """
    report, branch = PushReport(repo_id), backbone_revision if backbone == "revision" else None
    uploader = _Uploader(HfApi(token=token), private, commit_message, retry_waits)
    try:
        if branch == "main":
            raise ValueError("the encoder's branch cannot be main, where the model lies: name another")
        url = uploader.create(repo_id)
        report.repo_id = url.repo_id
        uploader.commit(url.repo_id, files_to_push(Path(folder), url.repo_id, token))
        report.url = str(url)
    except Exception as error:
        report.error = _explain(error, report.repo_id, token)
        return report
    if backbone != "none":
        try:
            _push_backbone(uploader, Path(folder), report, branch)
        except Exception as error:
            name = f"{report.repo_id}, branch {branch}" if branch else f"{report.repo_id}-backbone"
            report.error = _explain(error, name, token)
    return report


def files_to_push(folder: Path, repo_id: str, token: str | None = None) -> dict[str, Path | bytes]:
    """What of a model's folder goes to `repo_id`: path in the repository to a file, or to content made for it.

    The card's snippet names the repository; `results.json` goes without the paths of this machine.

    Raises:
        ValueError: the folder is no model's, it lacks code that its configuration names, or a file holds an access
            token.
    """
    missing = next((name for name in ("config.json", "model*.safetensors") if not any(folder.glob(name))), None)
    if missing:
        raise ValueError(f"{folder} is no model's folder: it has no {missing}; name one that `save_pretrained` wrote")
    card = folder / "README.md"
    text = re.sub(SNIPPET_LINE, f'checkpoint = "{repo_id}"', card.read_text("utf-8")) if card.is_file() else ""
    paths = [path for pattern in (*WEIGHTS, *DOCUMENTS) for path in folder.glob(pattern)]
    paths += [*_code_files(folder), *_pictures(folder, text)]
    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in paths}
    if text:
        files["README.md"] = text.encode()
    else:
        logger.warning("%s has no README.md: the repository gets no card", folder)
    if (folder / "results.json").is_file():
        files["results.json"] = json.dumps(public(_read_json(folder / "results.json")), indent=2).encode()
    _refuse_tokens(files, token)
    return files


def _code_files(folder: Path) -> set[Path]:
    """The modules that `trust_remote_code` needs: those of `auto_map`, and what they import from beside them."""
    auto_map = _read_json(folder / "config.json").get("auto_map", {})
    # "repository--module.Class" is code that lies in another repository
    modules = {folder / f"{name.split('.')[0]}.py" for name in auto_map.values() if "--" not in name}
    for path in modules:
        if not path.is_file():
            raise ValueError(f"config.json names code in {path.name}, which {folder} lacks; save the model again")
    return modules | {Path(name) for path in modules for name in get_relative_import_files(path)}


def _pictures(folder: Path, card: str) -> list[Path]:
    named = [folder / name for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card)]
    return [path for path in named if path.is_file() and path.resolve().is_relative_to(folder.resolve())]


def _refuse_tokens(files: dict[str, Path | bytes], token: str | None) -> None:
    for name, content in files.items():
        if not name.endswith((".safetensors", ".png")):
            text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", "replace")
            if holds_token(text, token):
                raise ValueError(
                    f"{name} holds what looks like an access token of the Hub, and is not pushed: take it out, and "
                    "revoke the token if anyone else may have seen it"
                )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


class _Uploader:
    """The calls of `HfApi` that a push is made of, repeated where the Hub cannot be reached or is busy."""

    def __init__(self, api: HfApi, private: bool | None, commit_message: str, waits: Sequence[float]):
        self.api, self.private, self.commit_message, self.waits = api, private, commit_message, waits

    def create(self, repo_id: str) -> RepoUrl:
        """Make a repository, if there is none."""
        return self._retried(self.api.create_repo, repo_id, private=self.private, exist_ok=True)

    def commit(self, repo_id: str, files: dict[str, Path | bytes]) -> None:
        """Add files to the main branch, all or none."""
        self._commit(repo_id, _additions(files), None)

    def replace(self, repo_id: str, files: dict[str, Path | bytes], branch: str) -> None:
        """Make these the only files of another branch."""
        self._retried(self.api.create_branch, repo_id, branch=branch, exist_ok=True)
        present = self._retried(self.api.list_repo_files, repo_id, revision=branch)
        stale = set(present) - files.keys() - {".gitattributes"}
        self._commit(repo_id, [*_additions(files), *map(CommitOperationDelete, sorted(stale))], branch)

    def _commit(self, repo_id: str, operations: list, branch: str | None) -> None:
        additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        # huggingface_hub repeats the requests of this step itself, but neither those of the commit nor of the others
        self.api.preupload_lfs_files(repo_id, additions, revision=branch, free_memory=False)
        self._retried(self.api.create_commit, repo_id, operations, commit_message=self.commit_message, revision=branch)

    def _retried(self, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        for wait in self.waits:
            try:
                return call(*args, **kwargs)
            except TRANSIENT_ERRORS as error:
                pause = max(wait, _requested_pause(error))
                if not _may_pass(error) or pause > LONGEST_WAIT:
                    raise
                logger.warning("%s; trying again in %g s", str(error).splitlines()[0], pause)
                time.sleep(pause)
        return call(*args, **kwargs)


def _additions(files: dict[str, Path | bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, content) for name, content in sorted(files.items())]


def _push_backbone(uploader: _Uploader, folder: Path, report: PushReport, branch: str | None) -> None:
    """Export the encoder, and upload it to a repository of its own, or to a branch; the report says where."""
    from .export import export_checkpoint

    with TemporaryDirectory() as scratch:
        exported = Path(scratch) / "backbone"
        try:
            export_checkpoint(folder, exported, to="vit")
        except ValueError as error:
            report.note = f"no backbone: {error}"
            return
        url = uploader.create(report.repo_id if branch else f"{report.repo_id}-backbone")
        write_backbone_card(exported, base_model=report.repo_id, checkpoint=url.repo_id, revision=branch)
        files = files_to_push(exported, url.repo_id)
        if branch:
            uploader.replace(url.repo_id, files, branch)
        else:
            uploader.commit(url.repo_id, files)
        report.backbone_url = f"{url}/tree/{branch}" if branch else str(url)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: no answer, a gateway's page, a rate limit, an error of the server."""
    if not isinstance(error, HfHubHTTPError):
        return True
    return error.response.status_code in TRANSIENT_STATUSES or error.response.status_code >= 500


def _requested_pause(error: Exception) -> float:
    """Seconds of the answer's Retry-After, 0 if there is none."""
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(value) if value.isdecimal() else 0.0


def _explain(error: Exception, repository: str, token: str | None) -> str:
    """What failed and what would help, in one line and without a token."""
    text = " ".join(str(error).split())
    if isinstance(error, HfHubHTTPError) and error.response.status_code in REMEDIES:
        text = f"{REMEDIES[error.response.status_code]} ({error.response.status_code})"
    elif isinstance(error, TRANSIENT_ERRORS):
        text = f"the Hub did not answer as it should ({text}). Nothing here was changed: push again later"
    elif not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}"
    return redact(f"{repository}: {text}", token)


def main(argv: Sequence[str] | None = None) -> int:
    """Pushes one checkpoint and returns the exit code.

    Args:
        argv: flags; None = the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a model's folder, as a run leaves it, or one of its checkpoints")
    parser.add_argument("repo_id", help="owner/name, or a name under your own user")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument(
        "--backbone",
        choices=get_args(Backbone),
        default="repo",
        help="where the encoder goes as a stock ViT: REPO_ID-backbone, a branch of REPO_ID, or nowhere",
    )
    parser.add_argument("--backbone_revision", default="backbone", help="that branch")
    parser.add_argument("--commit_message", default="Upload model")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    report = push_checkpoint(
        args.checkpoint,
        args.repo_id,
        private=args.private or None,
        backbone=args.backbone,
        backbone_revision=args.backbone_revision,
        commit_message=args.commit_message,
    )
    print(report.describe())
    return 1 if report.error else 0


if __name__ == "__main__":
    sys.exit(main())
