"""Dense prediction on the ViT: UperNet for segmentation, Mask R-CNN for detection, of library parts."""

from transformers import AutoConfig, AutoModel

from .mask_rcnn import MaskRCNNConfig, MaskRCNNForInstanceSegmentation

AutoConfig.register(MaskRCNNConfig.model_type, MaskRCNNConfig)
AutoModel.register(MaskRCNNConfig, MaskRCNNForInstanceSegmentation)
