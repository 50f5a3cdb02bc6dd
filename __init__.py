"""MI-MAE: masked-image pre-training with mask-invariant mutual information."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .configuration_mimae import MIMAEConfig
from .modeling_mimae import MIMAEForPreTraining, MIMAEModel
from .version import __version__

AutoConfig.register(MIMAEConfig.model_type, MIMAEConfig)
AutoModel.register(MIMAEConfig, MIMAEModel)
AutoModelForPreTraining.register(MIMAEConfig, MIMAEForPreTraining)

__all__ = ["MIMAEConfig", "MIMAEForPreTraining", "MIMAEModel", "__version__"]
