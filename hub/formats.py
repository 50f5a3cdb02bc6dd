"""The formats that a checkpoint can be exported to: how each is written, and read back by its users' means.

B images, N masks, L units of a mask, T tokens, D width, P values of a unit, K classes.
"""

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from transformers import PreTrainedModel

from ..families.family import FAMILIES, Family, StockModel
from ..modeling_mim import MIMForImageClassificationMixin, MIMForPreTrainingMixin, MIMPreTrainedMixin
from .detectron2_vitdet import NET, detectron2_usage, save_detectron2
from .official_mae import model_from_official, official_state, read_official_file
from .timm_vit import TimmArchitecture, timm_architecture, timm_state

logger = logging.getLogger(__name__)

PROCESSOR_NAME = "preprocessor_config.json"

# "tokens" (B, T, D) after the encoder's last norm; "logits" (B, K) of a classifier; "pixels" (B, N, L, P) of a decoder
Outputs = dict[str, torch.Tensor]


class ExportError(ValueError):
    """The checkpoint cannot be exported so, or the export differs from it; nothing was written."""


@dataclass(frozen=True)
class Source:
    """What is exported.

    origin: folder, file or Hub name that it was read from.
    model: in evaluation mode and float32.
    processor: its image processor's file, if it has one.
    difference: of reading it, where there was an independent model to compare it with.
    """

    origin: Path
    model: MIMPreTrainedMixin
    processor: Path | None = None
    difference: float = 0.0

    @property
    def is_classifier(self) -> bool:
        return isinstance(self.model, MIMForImageClassificationMixin)

    @property
    def architecture(self) -> TimmArchitecture:
        """The encoder, or the classifier, in timm's terms."""
        config: Any = self.model.config  # a ViT's: `formats_of` lets no other come here
        return timm_architecture(config, has_classifier=self.is_classifier)


def example_images(model: MIMPreTrainedMixin) -> torch.Tensor:
    """Two images (2, C, H, W) of noise, always the same ones."""
    size = (model.config.num_channels, *model.config.image_size_2d)
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model: PreTrainedModel, images: torch.Tensor) -> Outputs:
    """Of a transformers model, ours or a stock one, on images (B, C, H, W); "pixels" are those of masked views."""
    found = {"tokens": model.base_model(images).last_hidden_state}
    if hasattr(model, "classifier"):
        found["logits"] = model(images).logits
    if isinstance(model, MIMForPreTrainingMixin):
        noise = torch.rand(len(images), *model.config.noise_shape, generator=torch.Generator().manual_seed(0))
        # not by `forward`, whose loss waits for the other processes of a run
        views = model.base_model.forward_masked(images, noise, return_dict=True)
        found["pixels"] = model.decode(views, images.shape[-2:])
    return found


@torch.no_grad()
def timm_outputs(model: Any, images: torch.Tensor) -> Outputs:
    """As `outputs`, of timm's VisionTransformer."""
    found = {"tokens": model.forward_features(images)}
    return {**found, "logits": model(images)} if model.num_classes else found


@torch.no_grad()
def official_outputs(source: Source, state: Mapping[str, torch.Tensor], images: torch.Tensor) -> Outputs:
    """As `outputs`, of official parameters by timm's model, which shares no code with ours; without a decoder's."""
    model = source.architecture.create()
    model.load_state_dict(timm_state(state))
    return timm_outputs(model, images)


class Format(ABC):
    """A format of checkpoints.

    kinds: what one is on disk: the suffix of a file, or "" for a folder.
    """

    kinds: tuple[str, ...]

    @abstractmethod
    def write(self, source: Source, path: Path) -> None:
        """Write to a path that does not exist; an `ExportError` if the format cannot hold the source."""

    @abstractmethod
    def read_back(self, source: Source, path: Path, images: torch.Tensor) -> list[Outputs]:
        """What lies at the path makes of these images, loaded as its users will, by one model or several."""

    @abstractmethod
    def usage(self, source: Source, path: Path) -> str:
        """Python text that loads it."""


class Stock(Format):
    """A folder of transformers' own model."""

    kinds = ("",)

    def __init__(self, stock: StockModel):
        self.stock = stock

    def write(self, source: Source, path: Path) -> None:
        if reason := self.stock.refusal(source.model):
            raise ExportError(reason)
        self.stock.create(source.model, has_classifier=source.is_classifier).save_pretrained(path)
        _copy_processor(source, path)

    def read_back(self, source: Source, path: Path, images: torch.Tensor) -> list[Outputs]:
        return [outputs(self.stock.load(path, has_classifier=source.is_classifier), images)]

    def usage(self, source: Source, path: Path) -> str:
        return self.stock.usage(path, has_classifier=source.is_classifier)


class Timm(Format):
    """A file for `timm.create_model(…, checkpoint_path=…)`, or a folder as timm's models on the Hub are."""

    kinds = ("", ".safetensors", ".pth")

    def write(self, source: Source, path: Path) -> None:
        state = timm_state(official_state(source.model))
        if path.suffix == ".safetensors":
            save_file(state, path, metadata={"format": "pt"})
        elif path.suffix == ".pth":
            torch.save(state, path)
        else:
            self._write_folder(source, state, path)

    def read_back(self, source: Source, path: Path, images: torch.Tensor) -> list[Outputs]:
        if path.is_dir():
            return [timm_outputs(timm.create_model(f"local-dir:{path}", pretrained=True).eval(), images)]
        return [timm_outputs(source.architecture.create(checkpoint_path=str(path)), images)]

    def usage(self, source: Source, path: Path) -> str:
        if path.is_dir():
            return f"import timm\n\nmodel = timm.create_model({f'local-dir:{path}'!r}, pretrained=True)"
        return source.architecture.usage(str(path))

    def _write_folder(self, source: Source, state: dict[str, torch.Tensor], folder: Path) -> None:
        architecture = source.architecture
        config: Any = source.model.config
        if not architecture.has_timm_eps:
            raise ExportError(
                f"layer_norm_eps={config.layer_norm_eps} has no place in the config.json of a timm model: "
                "export to a .safetensors file"
            )
        processor = json.loads(source.processor.read_text(encoding="utf-8")) if source.processor else {}
        statistics = {name: processor[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in processor}
        # in place of timm's entries, which are about weights of its own
        facts = {"tag": "mimae", "license": None, "input_size": (config.num_channels, *config.image_size_2d)}
        model = architecture.create(pretrained_cfg_overlay={**facts, **statistics})
        model.load_state_dict(state)
        names = {"label_names": [config.id2label[k] for k in range(config.num_labels)]} if source.is_classifier else {}
        save_for_hf(model, str(folder), model_config=names, model_args=architecture.arguments, safe_serialization=True)


class OfficialMAE(Format):
    """A `.pth` file with the names of the official MAE; see `official_mae`."""

    kinds = (".pth",)

    def write(self, source: Source, path: Path) -> None:
        if getattr(source.model, "approximator", None) is not None:
            logger.warning(
                "the approximator V and the gate have no place in the official MAE's layout and stay behind"
            )
        torch.save({"model": official_state(source.model)}, path)

    def read_back(self, source: Source, path: Path, images: torch.Tensor) -> list[Outputs]:
        state, config = self.read(source, path), source.model.config
        fields = ("image_size", "num_attention_heads", "decoder_num_attention_heads", "layer_norm_eps")
        again = model_from_official(state, **{name: getattr(config, name) for name in fields})
        # pixels are compared on the same masked views
        again.config.update({name: getattr(config, name) for name in ("num_masks", "mask_ratio", "mask_strategy")})
        return [outputs(again, images), official_outputs(source, state, images)]

    def read(self, source: Source, path: Path) -> dict[str, torch.Tensor]:
        """The parameters at the path under the official names."""
        return read_official_file(path)

    def usage(self, source: Source, path: Path) -> str:
        text = f'import torch\n\nstate = torch.load({str(path)!r}, weights_only=True)["model"]'
        if not source.architecture.has_timm_eps:
            text += f"  # for a model whose LayerNorms have eps={source.model.config.layer_norm_eps}"
        return text


class Detectron2(OfficialMAE):
    """A `.pth` file of the encoder for a detector of detectron2; see `detectron2_vitdet`."""

    def write(self, source: Source, path: Path) -> None:
        try:
            save_detectron2(source.model, path)
        except ValueError as error:
            raise ExportError(str(error)) from error

    def read(self, source: Source, path: Path) -> dict[str, torch.Tensor]:
        """As there; what a detector has no use for is the source's."""
        encoder = {name.removeprefix(NET): value for name, value in read_official_file(path).items()}
        return {**official_state(source.model), **encoder}

    def usage(self, source: Source, path: Path) -> str:
        config: Any = source.model.config  # a ViT's
        return detectron2_usage(config, path)


class Mimae(Format):
    """A folder of this project."""

    kinds = ("",)

    def write(self, source: Source, path: Path) -> None:
        source.model.save_pretrained(path)
        _copy_processor(source, path)

    def read_back(self, source: Source, path: Path, images: torch.Tensor) -> list[Outputs]:
        return [outputs(type(source.model).from_pretrained(path).eval(), images)]

    def usage(self, source: Source, path: Path) -> str:
        name, module = type(source.model).__name__, type(source.model).__module__
        return f"from {module} import {name}\n\nmodel = {name}.from_pretrained({str(path)!r})"


def _copy_processor(source: Source, folder: Path) -> None:
    if source.processor:
        shutil.copyfile(source.processor, folder / PROCESSOR_NAME)


OWN_FORMAT = "mimae"
_FORMATS: dict[str, Format] = {"timm": Timm(), "mae": OfficialMAE(), OWN_FORMAT: Mimae(), "detectron2": Detectron2()}


def formats() -> dict[str, Format]:
    """By name: transformers' own models, one for each family that is one of them, and those of this file."""
    stock = [family.stock for family in FAMILIES.values() if family.stock is not None]
    return {each.format: Stock(each) for each in stock} | _FORMATS


def formats_of(family: Family) -> dict[str, Format]:
    """Those that have a place for models of a family."""
    names = {OWN_FORMAT, *family.formats, *([family.stock.format] if family.stock else [])}
    return {name: each for name, each in formats().items() if name in names}
