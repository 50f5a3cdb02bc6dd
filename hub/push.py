"""Push a checkpoint to the Hub: the model with its code and its card, and its encoder as a stock ViT or Swin.

    python -m mimae.hub.push CHECKPOINT REPO_ID
    python -m mimae.hub.push CHECKPOINT REPO_ID --private --backbone revision

The access token is the one of `hf auth login`, or of HF_TOKEN. Exit codes: 0 everything was uploaded; 1 something
failed, and the last line says what.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers.dynamic_module_utils import get_relative_import_files

from ..families.registry import family_of
from ..modeling_mim import MIMForImageClassificationMixin
from .export import export, load_source
from .model_card import write_backbone_card
from .privacy import holds_token, public
from .uploads import TRANSIENT_ERRORS, Files, Uploader, explain, may_pass

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
# what else of a run's folder goes along; a card and the pictures that it shows are added
DOCUMENTS = ("config.json", "preprocessor_config.json", "metrics.jsonl")
# seconds before each further attempt, unless the Hub asks for more
RETRY_WAITS = (2.0, 8.0, 30.0, 60.0)
# of a card: what its snippets load
SNIPPET_LINE = re.compile(r'^checkpoint = ".*"$', flags=re.MULTILINE)

Backbone = Literal["repo", "revision", "none"]


@dataclass
class PushReport:
    """The outcome of a push.

    `url` and `backbone_url` are the addresses of what was uploaded, `None` for what was not. `note` says why there is
    no backbone if none is possible; `error`, in one line, what failed and what would help.
    """

    repo_id: str
    url: str | None = None
    backbone_url: str | None = None
    note: str | None = None
    error: str | None = None

    def describe(self) -> str:
        """The report in words, a line for each item."""
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
        reason = explain(error, repo_id, token)
        if not may_pass(error):
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
    """Upload a model, in one commit, and its encoder as a stock ViT or Swin. Never raises, and changes no local file.

    This file lists what is uploaded: weights, configuration and the code it names, the image processor, the card with
    the pictures it shows, and the metrics. Optimiser states, checkpoints, logs and everything else stay.

    Args:
        folder: a model's folder, as a run leaves it, or one of its checkpoints.
        repo_id, token, private: see `check_access`.
        backbone: where the encoder goes: "repo" is `{repo_id}-backbone`, "revision" a branch of the repository.
        backbone_revision: that branch.
        retry_waits: seconds before each further attempt where the Hub cannot be reached, or is busy.

    Returns:
        The report; its `error` is `None` if everything was uploaded.
    """
    report, branch = PushReport(repo_id), backbone_revision if backbone == "revision" else None
    uploader = Uploader(HfApi(token=token), private, commit_message, retry_waits)
    try:
        if branch == "main":
            raise ValueError("the encoder's branch cannot be main, where the model lies: name another")
        files_to_push(Path(folder), repo_id, token)  # what is wrong with them is found before a repository is made
        url = uploader.create(repo_id)
        report.repo_id = url.repo_id
        uploader.commit(url.repo_id, files_to_push(Path(folder), url.repo_id, token))
        report.url = str(url)
    except Exception as error:
        report.error = explain(error, report.repo_id, token)
        return report
    if backbone != "none":
        try:
            _push_backbone(uploader, Path(folder), report, branch)
        except Exception as error:
            name = f"{report.repo_id}, branch {branch}" if branch else f"{report.repo_id}-backbone"
            report.error = explain(error, name, token)
    return report


def files_to_push(folder: Path, repo_id: str, token: str | None = None) -> Files:
    """What of a model's folder goes to `repo_id`: path in the repository to a file, or to content made for it.

    The card's snippet names the repository; `results.json` is uploaded without the paths of this machine.

    Raises:
        ValueError: the folder holds no model, it lacks code that its configuration names, or a file holds an access
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


def _refuse_tokens(files: Files, token: str | None) -> None:
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


def _push_backbone(uploader: Uploader, folder: Path, report: PushReport, branch: str | None) -> None:
    """Export the encoder, and upload it to a repository of its own, or to a branch; the report says where."""
    with TemporaryDirectory() as scratch:
        exported = Path(scratch) / "backbone"
        try:
            source = load_source(folder)
            if isinstance(source.model, MIMForImageClassificationMixin):
                source = replace(source, model=source.model.base_model)  # the head stays with the model
            stock = family_of(type(source.model)).stock
            if stock is None:
                raise ValueError(f"transformers has no model of its own for a {type(source.model).__name__}")
            export(source, exported, to=stock.format)
        except ValueError as error:
            report.note = f"no backbone: {error}"
            return
        url = uploader.create(report.repo_id if branch else f"{report.repo_id}-backbone")
        write_backbone_card(exported, stock=stock, base_model=report.repo_id, checkpoint=url.repo_id, revision=branch)
        uploader.commit(url.repo_id, files_to_push(exported, url.repo_id), branch)
        report.backbone_url = f"{url}/tree/{branch}" if branch else str(url)


def main(argv: Sequence[str] | None = None) -> int:
    """Pushes one checkpoint and returns the exit code.

    Args:
        argv: flags; None = the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", metavar="checkpoint", help="a model's folder, as a run leaves it, or one of its checkpoints"
    )
    parser.add_argument("repo_id", help="owner/name, or a name under your own user")
    parser.add_argument("--private", action="store_true", default=None, help="make new repositories private")
    parser.add_argument(
        "--backbone",
        choices=get_args(Backbone),
        default="repo",
        help="where the encoder goes as a stock model: REPO_ID-backbone, a branch of REPO_ID, or nowhere",
    )
    parser.add_argument("--backbone_revision", default="backbone", help="that branch")
    parser.add_argument("--commit_message", default="Upload model")
    report = push_checkpoint(**vars(parser.parse_args(argv)))
    print(report.describe())
    return 1 if report.error else 0


if __name__ == "__main__":
    sys.exit(main())
