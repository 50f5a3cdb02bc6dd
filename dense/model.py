"""What the models for dense prediction have in common."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what the class below is mixed into
    from transformers import PreTrainedModel as _StockModel
else:
    _StockModel = object


class DenseModelMixin(_StockModel):
    """Saving, and what a training must know. As a base it goes before transformers' class."""

    backbone: Any  # the encoder, of any family
    base_model: Any
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # `Trainer` is told that the losses are means over a batch; else it would not average them over accumulated batches
    accepts_loss_kwargs = False

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters with more than one dimension that do not decay: the encoder's."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but files hold the names of `state_dict()`; see `MIMPreTrainedMixin`."""
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})
