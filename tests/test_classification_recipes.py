"""Recipes of run_image_classification.py: the cells of Tables 1, 4 and 5, each comparable with the next."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_helpers import RECIPES, header_of, recipes_of
from torch.utils.flop_counter import FlopCounterMode

from mimae.families.registry import CONFIG_CLASSES, family_named
from mimae.flags.classification import ClassificationArguments, ClassificationDataArguments
from mimae.flags.hub import HubArguments
from mimae.flags.model import ModelArguments
from mimae.flags.recipes import parse_arguments, read_recipe

ALL_RECIPES = recipes_of("run_image_classification.py")
IMAGENET = RECIPES / "imagenet" / "classification"
GROUPS = (ModelArguments, ClassificationDataArguments, ClassificationArguments, HubArguments)
TRAINING_IMAGES, ONE_PERCENT, VALIDATION_IMAGES, IMAGENET_A_IMAGES = 1_281_167, 12_811, 50_000, 7_500
# (FT, LIN, FT1%) of Tables 1 and 4; None where there is no recipe, either
CLAIMS = {
    "mae_vit_base_800e": (83.3, 65.6, 45.4),
    "mimae_vit_base_200e": (83.9, 67.9, 48.2),
    "mae_vit_base_1600e": (83.6, 68.0, 51.1),
    "mimae_vit_base_400e": (84.1, 69.3, 52.3),
    "mae_vit_small_800e": (78.4, 50.5, None),
    "mimae_vit_small_200e": (79.8, 53.1, None),
    "simmim_swin_base_800e": (83.8, 56.7, "none published"),
    "misimmim_swin_base_400e": (84.1, 59.1, 49.1),
}
TASKS = ("finetune", "linear_probe", "finetune_1percent")
CELLS = [
    (model, task, claim)
    for model, claims in CLAIMS.items()
    for task, claim in zip(TASKS, claims, strict=True)
    if claim is not None
]


def parse(recipe: Path):
    """(model, data, classification arguments), the model configuration's fields."""
    (model_args, data_args, args, _), fields, _ = parse_arguments(
        ["--config", str(recipe)], GROUPS, CONFIG_CLASSES, recipe, "test"
    )
    return model_args, data_args, args, fields


def forward_flop(model_name: str, fields: Mapping[str, Any]) -> int:
    """Of one image, at the size that the recipe's fields say, through a classifier of 1,000 classes."""
    pretraining = read_recipe(RECIPES / "imagenet" / f"{model_name}.yaml")
    return operations(pretraining.get("model_type", "mimae"), pretraining["preset"], tuple(sorted(fields.items())))


@cache
def operations(model_type: str, preset: str, fields: tuple[tuple[str, Any], ...]) -> int:
    """Many recipes share a model."""
    family = family_named(model_type)
    config = family.build_config(preset, dict(fields), num_labels=1000)
    with torch.device("meta"):
        model = family.classification_class(config)
        pixel_values = torch.empty(1, 3, *config.image_size_2d)
    with FlopCounterMode(display=False) as counter:
        model(pixel_values)
    return counter.get_total_flops()


@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_is_well_typed_and_says_what_it_is(recipe):
    model_args, _, args, fields = parse(recipe)
    header = header_of(recipe)
    for part in ("Claim:", "Cost:", "Command:"):
        assert part in header
    assert str(recipe.relative_to(RECIPES)) in header or recipe == RECIPES / "digits" / "finetune.yaml"
    assert model_args.model_name_or_path.startswith("outputs/")
    assert set(fields) <= {"drop_path_rate", "image_size", "window_size"}
    assert fields.get("drop_path_rate", 0) == (0.1 if args.task == "finetune" else 0)


@pytest.mark.parametrize(("model", "task", "claim"), CELLS)
def test_every_cell_of_tables_1_and_4_has_a_recipe_that_claims_and_costs_what_it_should(model, task, claim):
    recipe = IMAGENET / f"{model}_{task}.yaml"
    model_args, _, args, fields = parse(recipe)
    assert args.task == task.removesuffix("_1percent")
    assert model_args.model_name_or_path == f"outputs/imagenet-{model}"
    assert (RECIPES / "imagenet" / f"{model}.yaml").exists()
    header = header_of(recipe)
    assert re.search(rf"Claim: +{claim}" + ("\n" if isinstance(claim, str) else r" % \(Tables? "), header)
    images = (ONE_PERCENT if task == "finetune_1percent" else TRAINING_IMAGES) * args.num_train_epochs
    passes = 1 if task == "linear_probe" else 3
    assert f"{images:.2e} images, {images * passes * forward_flop(model, fields):.1e} FLOP" in header


@pytest.mark.parametrize(
    ("model", "claims"), [("mae_vit_base_800e", (35.9, 51.7)), ("mimae_vit_base_200e", (37.4, 49.5))]
)
def test_every_cell_of_table_5_has_a_recipe(model, claims):
    recipe = IMAGENET / f"{model}_robustness.yaml"
    model_args, data_args, args, fields = parse(recipe)
    assert args.task == "evaluate"
    assert data_args.imagenet_a_dir is not None
    assert data_args.imagenet_c_dir is not None
    assert model_args.model_name_or_path == f"outputs/classification-{model}_finetune"
    header = header_of(recipe)
    assert f"{claims[0]} % / {claims[1]} mCE" in header
    images = VALIDATION_IMAGES * 76 + IMAGENET_A_IMAGES
    assert f"{images:.2e} images, {images * forward_flop(model, fields):.1e} FLOP" in header


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_methods_that_are_compared_differ_in_their_checkpoint_alone(backbone, task):
    cells = [model for model, name, _ in CELLS if name == task and f"_{backbone}_" in model]
    recipes = [read_recipe(IMAGENET / f"{model}_{task}.yaml") for model in cells]
    assert len(recipes) >= 2
    for recipe in recipes:
        recipe.pop("model_name_or_path")
    assert all(recipe == recipes[0] for recipe in recipes)


def test_batches_and_rates_are_those_of_the_papers():
    finetune = parse(IMAGENET / "mimae_vit_base_200e_finetune.yaml")[2]
    assert 8 * finetune.per_device_train_batch_size == 1024
    assert (finetune.base_learning_rate, finetune.layer_decay, finetune.num_train_epochs) == (1e-3, 0.75, 100)
    assert (finetune.mixup, finetune.cutmix, finetune.label_smoothing, finetune.random_erasing) == (
        0.8,
        1.0,
        0.1,
        0.25,
    )
    official = parse(IMAGENET / "mimae_vit_base_200e_finetune_official.yaml")[2]
    assert (official.base_learning_rate, official.layer_decay) == (5e-4, 0.65)
    probe = parse(IMAGENET / "mimae_vit_base_200e_linear_probe.yaml")[2]
    assert 8 * probe.per_device_train_batch_size == 16_384
    assert (probe.num_train_epochs, probe.warmup_epochs) == (90, 10)
    assert probe.feature_pooling != "mean"
    assert 0.1 * 16_384 / 256 in [rate * 16_384 / 256 for rate in probe.probe_learning_rates]
    low_shot = parse(IMAGENET / "mimae_vit_base_200e_finetune_1percent.yaml")[2]
    assert ONE_PERCENT // low_shot.per_device_train_batch_size >= 100


def test_fine_tuning_of_swin_is_the_official_simmims():
    # microsoft/SimMIM, configs/swin_base__800ep: rates are per 512 images there, per 256 here
    _, data_args, args, fields = parse(IMAGENET / "misimmim_swin_base_400e_finetune.yaml")
    images_per_step = 8 * args.per_device_train_batch_size
    assert images_per_step == 2048
    assert args.base_learning_rate / 256 == pytest.approx(1.25e-3 / 512)
    assert args.min_learning_rate == pytest.approx(2.5e-7 * images_per_step / 512)
    assert (args.num_train_epochs, args.warmup_epochs, args.layer_decay, args.max_grad_norm) == (100, 20, 0.8, 5.0)
    assert (args.weight_decay, args.adam_beta1, args.adam_beta2) == (0.05, 0.9, 0.999)
    assert (args.auto_augment, args.random_erasing, args.mixup, args.cutmix, args.label_smoothing) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
        0.8,
        1.0,
        0.1,
    )
    assert (data_args.min_crop_scale, args.evaluation_crop_ratio) == (0.08, 224 / 256)
    assert fields == {"image_size": 224, "window_size": 7, "drop_path_rate": 0.1}


def test_a_swin_is_probed_like_a_vit_at_the_size_and_with_the_pooling_of_its_own():
    vit, swin = (
        read_recipe(IMAGENET / f"{model}_linear_probe.yaml")
        for model in ("mimae_vit_base_400e", "misimmim_swin_base_400e")
    )
    assert {**vit, "model_name_or_path": swin["model_name_or_path"]} == swin
    assert not {"image_size", "window_size", "feature_pooling"} & set(swin)
