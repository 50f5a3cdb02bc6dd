"""The flags that say which model is trained."""

from dataclasses import dataclass

from .option import check_types, option


@dataclass
class ModelArguments:
    """Which model is trained. Every field of the models' configurations is a flag and a recipe key, too."""

    model_type: str | None = option(
        None, "mimae (on a ViT), or misimmim (on a Swin); default: in downstream tasks the checkpoint's, else mimae."
    )
    preset: str | None = option(
        None,
        "Size: vit-tiny, -small, -base, -large or -huge; swin-tiny, -small, -base or -large. Fields win over it.",
    )
    model_name_or_path: str | None = option(
        None,
        "Start from this checkpoint's weights: one of this project's, or a stock ViTMAE's; downstream also a ViT's; a "
        "Swin's where Swins are trained.",
    )
    attn_implementation: str | None = option(
        None,
        "sdpa, eager or flash_attention_2; default: transformers' choice; for pre-training in bf16 on a CPU made for "
        "it, matmul, whose backward pass is faster than that of sdpa and needs more memory.",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass, to save memory.")

    def __post_init__(self):
        check_types(self)
