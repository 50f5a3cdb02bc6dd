"""MI-MAE: masked-image pre-training with mask-invariant mutual information."""

from .configuration_mimae import MIMAEConfig
from .configuration_misimmim import MISimMIMConfig
from .families import registry as registry  # by it transformers' Auto classes find the models
from .modeling_mimae import MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel
from .modeling_mimae_backbone import MIMAEBackbone
from .modeling_misimmim import MISimMIMForImageClassification, MISimMIMForPreTraining, MISimMIMModel
from .version import __version__

__all__ = [
    "MIMAEBackbone",
    "MIMAEConfig",
    "MIMAEForImageClassification",
    "MIMAEForPreTraining",
    "MIMAEModel",
    "MISimMIMConfig",
    "MISimMIMForImageClassification",
    "MISimMIMForPreTraining",
    "MISimMIMModel",
    "__version__",
]
