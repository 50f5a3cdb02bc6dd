"""An attention for CPUs that multiply bfloat16 in hardware, where the backward pass of torch's fused one is slow."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

MATMUL = "matmul"


def matmul_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q kᵀ · scaling + mask) v by plain products, all in the type of the query, also under autocast.

    Like transformers' "eager", and unlike "sdpa", it rounds the scores to that type and keeps the probabilities
    (B, A, T, T) for the backward pass. Unlike "eager" it does not widen them to float32: the softmax sums in float32
    in any case, and the wider tensors cost more time than the products save.

    Args:
        module: ignored, as are further keywords; they are part of transformers' interface.
        query, key, value: (B, A, T, d), A heads.
        attention_mask: added to the scores; broadcasts to (B, A, T, T).
        dropout: rate at which probabilities are dropped; 0 outside of training.
        scaling: of the scores; None = 1/√d.

    Returns:
        (B, T, A, d), and None for the probabilities.

    Raises:
        ValueError: a boolean mask.
    """
    if attention_mask is not None and not attention_mask.is_floating_point():
        raise ValueError(f"{MATMUL} attention adds its mask to the scores; {attention_mask.dtype} is for sdpa")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = query.shape[:2]
    query, key, value = (tokens.flatten(0, 1) for tokens in (query, key, value))  # (B·A, T, d)
    with torch.autocast(query.device.type, enabled=False):
        # scaled within the product, before its rounding; with beta = 0 the first argument is not read
        scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.mT, beta=0, alpha=scaling)  # (B·A, T, T)
        scores = scores.unflatten(0, heads)  # (B, A, T, T)
        if attention_mask is not None:
            scores = scores + attention_mask.to(scores.dtype)
        probabilities = F.dropout(scores.softmax(dim=-1), dropout)
        output = probabilities.flatten(0, 1) @ value  # (B·A, T, d)
    return output.unflatten(0, heads).transpose(1, 2).contiguous(), None


AttentionInterface.register(MATMUL, matmul_attention)


def default_attention(device: torch.device, mixed_precision: str) -> str | None:
    """The attention if the user names none; None leaves the choice to transformers, which takes "sdpa"."""
    on_cpu_in_bfloat16 = device.type == "cpu" and mixed_precision == "bf16"
    return MATMUL if on_cpu_in_bfloat16 and multiplies_bfloat16() else None


def multiplies_bfloat16() -> bool:
    """Whether this CPU has x86's instructions for it; elsewhere plain products of bfloat16 are the slower way."""
    return torch.cpu.get_capabilities().get("avx512_bf16", False)
