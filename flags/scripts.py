"""Which groups of flags each script has, beside the fields of the models' configurations."""

from .classification import ClassificationArguments, ClassificationDataArguments
from .data import DataArguments
from .dense import DetectionArguments, DetectionDataArguments, SegmentationArguments, SegmentationDataArguments
from .hub import HubArguments
from .model import ModelArguments
from .pretraining import PretrainingArguments

PRETRAINING = (ModelArguments, DataArguments, PretrainingArguments, HubArguments)
CLASSIFICATION = (ModelArguments, ClassificationDataArguments, ClassificationArguments, HubArguments)
SEGMENTATION = (ModelArguments, SegmentationDataArguments, SegmentationArguments, HubArguments)
DETECTION = (ModelArguments, DetectionDataArguments, DetectionArguments, HubArguments)
SCRIPTS = {
    "run_mim_pretrain.py": PRETRAINING,
    "run_image_classification.py": CLASSIFICATION,
    "run_semantic_segmentation.py": SEGMENTATION,
    "run_object_detection.py": DETECTION,
}
