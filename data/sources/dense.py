"""Images with dense annotations: a mask of classes, or objects."""

from abc import abstractmethod
from typing import Any

import torch

from .base import RowSource


class DenseSource(RowSource):
    """A `RowSource` whose rows are (encoded image, annotation), and which decodes both.

    Attributes:
        class_names: of the K classes, in the order of the model's.
    """

    class_names: list[str]

    @abstractmethod
    def decode(self, index: int, row: Any, num_channels: int) -> tuple[torch.Tensor, Any]:
        """Decodes a row that `read` gave.

        Returns:
            The image, uint8 (C, H, W), as a `tv_tensors.Image`, and its target, made of tv_tensors of the same
            height and width, so that transforms of torchvision treat both alike.

        Raises:
            BadImageError: image or annotation cannot be decoded, or do not belong together.
            ValueError: a class that is not in `class_names`; names the file.
        """
