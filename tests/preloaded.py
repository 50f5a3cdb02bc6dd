"""What the server of forked processes imports before it forks any. Their pictures stay blank; see `drawing`."""

import torch

from mimae import run_image_classification, run_object_detection, run_semantic_segmentation  # noqa: F401
from mimae.drills.apparatus import recording  # noqa: F401
from mimae.hub import export, push  # noqa: F401
from mimae.replication import stages  # noqa: F401
from mimae.tests import drawing

torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late for a fork
drawing.leave_blank()
