"""MI-MAE: masked-image pre-training with mask-invariant mutual information."""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from .configuration_mimae import MIMAEConfig
from .configuration_misimmim import MISimMIMConfig
from .modeling_mimae import MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel
from .modeling_mimae_backbone import MIMAEBackbone
from .modeling_misimmim import MISimMIMForImageClassification, MISimMIMForPreTraining, MISimMIMModel
from .version import __version__

for _config, _model, _pretraining, _classification in (
    (MIMAEConfig, MIMAEModel, MIMAEForPreTraining, MIMAEForImageClassification),
    (MISimMIMConfig, MISimMIMModel, MISimMIMForPreTraining, MISimMIMForImageClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForPreTraining.register(_config, _pretraining)
    AutoModelForImageClassification.register(_config, _classification)
AutoBackbone.register(MIMAEConfig, MIMAEBackbone)

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
