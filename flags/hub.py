"""The flags of the Hub."""

from dataclasses import dataclass

from .option import check_types, option


@dataclass
class HubArguments:
    """Whether and where the result goes on the Hub. The token is huggingface_hub's: `hf auth login`, or HF_TOKEN."""

    push_to_hub: bool = option(
        False,
        "Upload the model and its card at the end; of what is no segmenter or detector, the encoder as stock ViT or "
        "Swin.",
    )
    hub_model_id: str | None = option(None, "The repository; default: output_dir's name, in your own namespace.")
    hub_private_repo: bool = option(False, "Make the repository private, if it is new.")

    def __post_init__(self):
        check_types(self)
