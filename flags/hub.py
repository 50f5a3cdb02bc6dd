"""The flags of the Hub."""

from dataclasses import dataclass
from typing import ClassVar

from .option import CheckedArguments, option


@dataclass
class HubArguments(CheckedArguments):
    """Whether and where the result goes on the Hub. The token is huggingface_hub's: `hf auth login`, or HF_TOKEN."""

    HEADING: ClassVar = "Hub"

    push_to_hub: bool = option(
        False,
        "Upload the model and its card at the end. Segmenters and detectors are uploaded as they are; of all others, "
        "the encoder as a stock ViT or Swin.",
        affects_result=False,
    )
    hub_model_id: str | None = option(
        None, "The repository.", unset="output_dir's name, in your namespace", affects_result=False
    )
    hub_private_repo: bool = option(False, "Make the repository private, if it is new.", affects_result=False)
