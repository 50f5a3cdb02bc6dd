"""MI-MAE: masked-image pre-training with mask-invariant mutual information."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from .configuration_mimae import MIMAEConfig
from .modeling_mimae import MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel
from .version import __version__

AutoConfig.register(MIMAEConfig.model_type, MIMAEConfig)
AutoModel.register(MIMAEConfig, MIMAEModel)
AutoModelForPreTraining.register(MIMAEConfig, MIMAEForPreTraining)
AutoModelForImageClassification.register(MIMAEConfig, MIMAEForImageClassification)

__all__ = ["MIMAEConfig", "MIMAEForImageClassification", "MIMAEForPreTraining", "MIMAEModel", "__version__"]
