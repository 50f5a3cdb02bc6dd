"""What was tried for a faster step and can be tried again: each beside the step as it is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEAttention, eager_attention_forward

from .measurement import Measurement, Table
from .measuring import ratio, take_turns
from .models.contestants import FULL, PRECISIONS, SMALL, Contestant, Setting

AS_IT_IS = "as it is"
VIEWS, ROUNDS = 16, 5


def measure(device: torch.device, *, quick: bool) -> Measurement:
    """Seconds of a step with each candidate, of the step as it is."""
    preset, fields, rounds = ("vit-tiny", SMALL, 1) if quick else ("vit-base", {}, ROUNDS)
    rows = []
    for precision in PRECISIONS:
        setting = Setting(preset, VIEWS, device, precision, fields)
        found = {AS_IT_IS: Contestant(FULL, setting)}
        for name, change in CANDIDATES.items():
            found[name] = Contestant(FULL, setting)
            change(found[name].model)
        calls = {name: each.step for name, each in found.items()}
        seconds = take_turns(calls, rounds=rounds, warm_up=1, device=device)
        rows += [[name, precision, ratio(seconds, name, AS_IT_IS)] for name in CANDIDATES]
    note = f"{preset}, {VIEWS} views a step, forward, backward and AdamW. Below 1 the candidate is faster."
    table = Table("Candidates for the step", ("", "precision", "time, of the step as it is"), rows, note)
    return Measurement("Each candidate alone is changed.", [table])


def predict_every_patch(model: Any) -> None:
    """As it was at first: the visible patches are predicted, too, though no loss needs them."""
    model.return_logits = True


def attend_by(implementation: str) -> Callable[[nn.Module], None]:
    """Another of transformers' attentions."""

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, ViTMAEAttention):
                module.config._attn_implementation = implementation

    return change


def project_at_once(model: nn.Module) -> None:
    """Queries, keys and values by one product with weights that are put together at run time."""
    for module in model.modules():
        if isinstance(module, ViTMAEAttention):
            module.__class__ = AttentionOfOneProjection


class AttentionOfOneProjection(ViTMAEAttention):
    """With the keys of the stock attention on disk."""

    def forward(  # type: ignore[override]  # only the blocks call it
        self, hidden_states: torch.Tensor, *_: None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
        projected = nn.functional.linear(hidden_states, weight, bias).unflatten(-1, (3, self.num_attention_heads, -1))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attention(self, *projected.permute(2, 0, 3, 1, 4), None, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2)), None


CANDIDATES: dict[str, Callable[[nn.Module], None]] = {
    "every patch predicted": predict_every_patch,
    "q, k and v by one product": project_at_once,
    "attention by sdpa": attend_by("sdpa"),
    "attention by plain products (`matmul`)": attend_by("matmul"),
    "attention by transformers' eager": attend_by("eager"),
    "compiled": nn.Module.compile,
}
