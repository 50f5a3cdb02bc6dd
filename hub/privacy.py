"""What may leave the machine of a run: no access token, no local path, no host of its own network."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

# Where a run lay on its machine tells nothing about the model; tokens are nobody's business.
PRIVATE_KEYS = re.compile(r"output_dir|logging_dir|cache_dir|resume_from_checkpoint|.*token|.*password|.*secret")
LOCAL_PATH = re.compile(r"""(?:^|[\s=,;:"'(\[])(?:~\w*/|\.\.[/\\]|/(?=[^/\s])|[A-Za-z]:[/\\]|\\\\|file:)""")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def public(value: Any) -> Any:
    """`value` as plain YAML types, without what belongs to a machine or its user; `None` where nothing is left."""
    if isinstance(value, Mapping):
        shown = {key: item for key, item in value.items() if not PRIVATE_KEYS.fullmatch(key)}
        return {key: public(item) for key, item in shown.items() if item is None or public(item) is not None}
    if isinstance(value, list | tuple):
        return [item for item in map(public, value) if item is not None]
    if isinstance(value, str | PurePath):
        return _public_text(str(value))
    return value


def _public_text(text: str) -> str | None:
    address = urlsplit(text) if "://" in text else None
    if address and address.scheme not in ("hf", "file"):
        # The host may be a private one, the query a signature.
        return f"{address.scheme}://…/{PurePath(address.path).name}"
    if LOCAL_PATH.search(text) or HUB_TOKEN.search(text):
        return None
    return text


def redact(text: str, token: str | None = None) -> str:
    """`text` without anything that looks like an access token of the Hub, and without `token`."""
    text = HUB_TOKEN.sub("hf_…", text)
    return text.replace(token, "…") if token else text


def holds_token(text: str, token: str | None = None) -> bool:
    """Whether `redact` would take something out."""
    return redact(text, token) != text
