"""An encoder from outside of the package, of a few lines, goes where those of the package go: docs/architecture.md."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from exporting import export_checkpoint
from huggingface_hub.dataclasses import strict
from runs import SHORT_RUN, pretrain, series
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel

from mimae.configuration_mim import MIMConfigMixin
from mimae.families.family import FAMILIES, CardWords, Family
from mimae.families.registry import CONFIG_CLASSES, register
from mimae.flags.option import RecipeError
from mimae.flags.recipes import as_argv
from mimae.hub.export import TOLERANCE, ExportError
from mimae.modeling_mim import (
    EncoderOutput,
    MaskedOutput,
    MIMEncoderMixin,
    MIMForImageClassificationMixin,
    MIMForPreTrainingMixin,
    MIMPreTrainedMixin,
    gather_patches,
    init_linear,
    patchify,
)
from mimae.run_image_classification import main as classify

# --- configuration_toy.py


@strict
class ToyConfig(MIMConfigMixin, PreTrainedConfig):
    """Of a bag of patches."""

    model_type = "toy"
    unit_field: ClassVar[str] = "patch_size"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"toy-tiny": {"hidden_size": 8}}

    image_size: int | list[int] | tuple[int, int] = 16
    patch_size: int = 4
    num_channels: int = 1
    hidden_size: int = 32
    toy_depth: int = 1


# --- modeling_toy.py


class ToyPreTrainedModel(MIMPreTrainedMixin, PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"
    main_input_name = "pixel_values"

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init_linear(module, std=None)

    def no_weight_decay(self):
        return set()


class ToyEmbeddings(nn.Linear):
    def __init__(self, config):
        super().__init__(config.patch_size**2 * config.num_channels, config.hidden_size)
        self.patch_size = config.patch_size

    def embed_patches(self, pixel_values, interpolate_pos_encoding=False):
        return self(patchify(pixel_values, self.patch_size))  # (B, L, D)


class ToyModel(MIMEncoderMixin, ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embeddings = ToyEmbeddings(config)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(config.toy_depth))
        )
        self.layernorm = nn.LayerNorm(width)
        self.post_init()

    def forward(self, pixel_values, interpolate_pos_encoding=False, **kwargs):
        tokens = self.layernorm(self.layers(self.embeddings.embed_patches(pixel_values)))  # (B, L, D)
        grid_size = [side // self.config.patch_size for side in pixel_values.shape[-2:]]
        feature_map = tokens.transpose(1, 2).unflatten(2, grid_size)
        return EncoderOutput(last_hidden_state=tokens, pooler_output=tokens.mean(dim=1), feature_map=feature_map)

    def encode_views(self, patches, ids_visible, mask, **kwargs):
        patches = patches.unsqueeze(1).expand(-1, ids_visible.shape[1], -1, -1)
        visible = gather_patches(patches, ids_visible)  # (B, N, V, D)
        tokens = self.layernorm(self.layers(visible))
        return MaskedOutput(
            last_hidden_state=tokens.flatten(0, 1), latent_vector=tokens.mean(dim=2), visible_embeddings=visible
        )

    def modules_by_depth(self):
        return [self.embeddings, *self.layers]


class ToyForPreTraining(MIMForPreTrainingMixin, ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.toy = ToyModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.num_channels * config.image_size**2)
        self.build_information_parts(in_features=config.hidden_size)
        self.post_init()

    def decode(self, views, image_size):
        return self.decoder(views.latent_vector).unflatten(-1, (self.config.num_patches, -1))  # (B, N, L, P)

    def pixel_error(self, difference):
        return difference.square()


class ToyForImageClassification(MIMForImageClassificationMixin, ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.toy = ToyModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


# --- its page

TOY = Family(
    config_class=ToyConfig,
    encoder_class=ToyModel,
    pretraining_class=ToyForPreTraining,
    classification_class=ToyForImageClassification,
    words=CardWords(encoder="bag of patches", baseline="an autoencoder of bags"),
    default_recipe="toy.yaml",
    pretraining_types=("toy",),
    downstream_types=("toy",),
    size_fields=("image_size", "patch_size", "num_channels", "hidden_size", "toy_depth"),
)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """The toy is a family; its recipe lies outside of the package, too."""
    recipe = tmp_path_factory.mktemp("recipes") / "toy.yaml"
    recipe.write_text("model_type: toy\ntoy_depth: 2\nbase_learning_rate: 4.0e-2\nevaluation_crop_ratio: 1.0\n")
    register(replace(TOY, default_recipe=recipe))
    yield
    del FAMILIES["toy"]
    CONFIG_CLASSES.remove(ToyConfig)


@pytest.fixture(scope="module")
def trained(registered, tmp_path_factory):
    """A folder that a run of the script has left."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    assert pretrain(folder, model={"model_type": "toy", "hidden_size": 24}) == 0
    return folder


def test_its_fields_are_flags_and_recipe_keys_and_it_trains(trained):
    losses = series(trained, "reconstruction_loss")
    assert losses[13] < 0.9 * losses[1]
    config = ToyForPreTraining.from_pretrained(trained).config
    assert (config.toy_depth, config.hidden_size) == (2, 24)  # of the default recipe, and of the command line


def test_its_fields_are_refused_by_other_encoders(registered, tmp_path):
    with pytest.raises(RecipeError, match="toy_depth: of model_type toy, but the model is a 'mimae'"):
        pretrain(tmp_path / "run", toy_depth=3)


def test_auto_classes_find_it(trained):
    model = AutoModelForPreTraining.from_pretrained(trained)
    assert type(model) is ToyForPreTraining
    encoder = AutoModel.from_pretrained(trained)
    assert type(encoder) is ToyModel
    assert torch.equal(encoder.layers[1][0].weight, model.toy.layers[1][0].weight)


def test_the_card_calls_it_by_its_words(trained):
    assert "the encoder is that of an autoencoder of bags" in (trained / "README.md").read_text()


def test_pretraining_starts_from_its_checkpoint(trained, tmp_path):
    start = {"model_type": "toy", "hidden_size": 24, "model_name_or_path": str(trained)}
    assert pretrain(tmp_path / "run", model=start, max_train_steps=1) == 0
    assert series(tmp_path / "run", "reconstruction_loss")[1] < 0.95 * series(trained, "reconstruction_loss")[1]
    with pytest.raises(ValueError, match="hidden_size: 24 there, 32 in the recipe"):
        pretrain(tmp_path / "other", model={"model_type": "toy", "model_name_or_path": str(trained)})


def test_another_task_starts_from_its_checkpoint(trained, tmp_path):
    (tmp_path / "finetune.yaml").write_text("task: finetune\n")
    flags = {"config": tmp_path / "finetune.yaml", "output_dir": tmp_path / "run", "model_name_or_path": trained}
    short = {name: SHORT_RUN[name] for name in ("cpu_threads", "per_device_train_batch_size", "report_to")}
    assert classify(["--use_cpu", *as_argv({**flags, **short, "max_train_steps": 2})]) == 0
    model = ToyForImageClassification.from_pretrained(tmp_path / "run")
    assert model.classifier.weight.shape == (10, 24)


def test_it_is_exported_as_a_folder_of_this_project_and_as_nothing_else(trained, tmp_path):
    assert export_checkpoint(trained, tmp_path / "out", "mimae") <= TOLERANCE
    model, exported = ToyForPreTraining.from_pretrained(trained), ToyForPreTraining.from_pretrained(tmp_path / "out")
    assert exported.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in exported.state_dict().items())
    for to in ("vit", "swin", "timm"):
        with pytest.raises(ExportError, match=r"no place for a ToyForPreTraining: export it with --to mimae$"):
            export_checkpoint(trained, tmp_path / to, to)
