"""A dense model as a run leaves it."""

from pathlib import Path

from references import TINY
from transformers import UperNetConfig, UperNetForSemanticSegmentation, ViTImageProcessor

from mimae import MIMAEConfig


def save_segmenter(folder: Path) -> None:
    """A small UperNet and its image processor."""
    config = MIMAEConfig(**{**TINY, "num_hidden_layers": 6}, add_fpn=True)
    upernet = UperNetConfig(
        backbone_config=config, num_labels=3, hidden_size=8, auxiliary_in_channels=32, auxiliary_channels=8
    )
    UperNetForSemanticSegmentation(upernet).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
