"""The flags that say which model is trained."""

from dataclasses import dataclass
from typing import ClassVar

from .option import CheckedArguments, option


@dataclass
class ModelArguments(CheckedArguments):
    """Which model is trained. Every field of the models' configurations is a flag and a recipe key, too."""

    HEADING: ClassVar = "model"

    model_type: str | None = option(
        None, "mimae (on a ViT) or misimmim (on a Swin).", unset="mimae, or the checkpoint's", affects_result="model"
    )
    preset: str | None = option(
        None,
        "A standard size: vit-tiny, -small, -base, -large or -huge; swin-tiny, -small, -base or -large. Flags of "
        "single sizes win over it.",
        affects_result="model",
    )
    model_name_or_path: str | None = option(
        None,
        "Start from the weights of this checkpoint: one of this project's, or a stock ViTMAE or Swin; downstream "
        "also a stock ViT.",
        affects_result="model",
    )
    attn_implementation: str | None = option(
        None,
        "How attention is computed: sdpa, eager or flash_attention_2; for pre-training in bf16 on a CPU also matmul, "
        "whose backward pass is faster than that of sdpa and needs more memory.",
        unset="transformers' choice; in pre-training matmul where the CPU is made for bf16",
        affects_result=False,
        under="machine",
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass, to save memory.", affects_result=False, under="machine"
    )
