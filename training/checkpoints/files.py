"""The files of a checkpoint: safetensors and JSON, nothing that executes when it is loaded."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or belongs to another model."""


def load_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in memory of their own.

    Raises:
        CheckpointError: the file is missing or is no safetensors file. Nothing in it is ever executed.
    """
    try:
        # safetensors maps the file; without the copy, live state would lean on a file that rotation removes.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error})") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON file ({error})") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON that ends with its last bracket, so that the loss of a single byte is noticed."""
    Path(path).write_text(json.dumps(value, indent=2), encoding="utf-8")
