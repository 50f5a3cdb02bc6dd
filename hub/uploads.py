"""Uploads to the Hub: retried where that may help, explained in one line where it may not."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoUrl

# the base of what the HTTP library raises, httpx or httpx2, whichever this huggingface_hub was built on
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .privacy import redact

logger = logging.getLogger(__name__)

# what the Hub may ask to wait for, in seconds; its rate limits are counted over five minutes
LONGEST_WAIT = 300.0
# huggingface_hub takes the page of HTML that a gateway answers with for JSON
TRANSIENT_ERRORS = (HTTPError, json.JSONDecodeError)
TRANSIENT_STATUSES = (408, 429)
REMEDIES = {
    401: "the Hub does not know the access token, or there is none: `hf auth login`, or set HF_TOKEN",
    403: "the access token may not write there: `hf auth login` with one that may, or name a repository of your own",
    404: "there is no such repository that the access token can see: look at its name, and at the token's permissions",
}

Result = TypeVar("Result")
# path in the repository → a file, or content
Files = Mapping[str, Path | bytes]


class Uploader:
    """The calls of `HfApi` that a push is made of, repeated where the Hub cannot be reached or is busy.

    Args:
        api: with the access token.
        private: of new repositories; `None` = as their owner's settings have it.
        commit_message: of every commit.
        waits: seconds before each further attempt, unless the Hub asks for more.

    Raises:
        HTTPError or JSONDecodeError, from every method: the last attempt failed, or another one would not help.
    """

    def __init__(self, api: HfApi, private: bool | None, commit_message: str, waits: Sequence[float]):
        self.api, self.private, self.commit_message, self.waits = api, private, commit_message, waits

    def create(self, repo_id: str) -> RepoUrl:
        """Make a repository, if there is none."""
        return self._retried(self.api.create_repo, repo_id, private=self.private, exist_ok=True)

    def commit(self, repo_id: str, files: Files, branch: str | None = None) -> None:
        """Add files to the main branch, all or none, or make them the only files of another branch."""
        additions = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        stale: list[str] = []
        if branch:
            self._retried(self.api.create_branch, repo_id, branch=branch, exist_ok=True)
            present = self._retried(self.api.list_repo_files, repo_id, revision=branch)
            stale = sorted(set(present) - files.keys() - {".gitattributes"})
        # huggingface_hub repeats the requests of this step itself, but neither those of the commit nor of the others
        self.api.preupload_lfs_files(repo_id, additions, revision=branch, free_memory=False)
        operations = [*additions, *map(CommitOperationDelete, stale)]
        self._retried(self.api.create_commit, repo_id, operations, commit_message=self.commit_message, revision=branch)

    def _retried(self, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        for wait in self.waits:
            try:
                return call(*args, **kwargs)
            except TRANSIENT_ERRORS as error:
                pause = max(wait, _requested_pause(error))
                if not may_pass(error) or pause > LONGEST_WAIT:
                    raise
                logger.warning("%s; trying again in %g s", redact(str(error).splitlines()[0]), pause)
                time.sleep(pause)
        return call(*args, **kwargs)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: there was no answer, or the Hub or a gateway is busy or down."""
    if not isinstance(error, HfHubHTTPError):
        return True
    return error.response.status_code in TRANSIENT_STATUSES or error.response.status_code >= 500


def _requested_pause(error: Exception) -> float:
    """Seconds of the answer's Retry-After, 0 if there is none."""
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(value) if value.isdecimal() else 0.0


def explain(error: Exception, repository: str, token: str | None) -> str:
    """What failed and what would help, in one line and without a token."""
    text = " ".join(str(error).split())
    if isinstance(error, HfHubHTTPError) and error.response.status_code in REMEDIES:
        text = f"{REMEDIES[error.response.status_code]} ({error.response.status_code})"
    elif isinstance(error, TRANSIENT_ERRORS):
        text = f"the Hub did not answer as it should ({text}). Nothing here was changed: push again later"
    elif not isinstance(error, ValueError | OSError):
        text = f"{type(error).__name__}: {text}"
    return redact(f"{repository}: {text}", token)
