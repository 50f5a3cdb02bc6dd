"""Recipes of segmentation and detection: the rows of Table 2, comparable with each other, and the composed scenes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_helpers import RECIPES, header_of, recipes_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mimae import MIMAEBackbone, MIMAEConfig
from mimae.data.scenes import SPLITS
from mimae.dense.feature_pyramid import SimpleFeaturePyramid
from mimae.dense.mask_rcnn import MaskRCNNConfig
from mimae.dense.upernet import build_upernet
from mimae.families.registry import CONFIG_CLASSES, family_named
from mimae.flags.dense import (
    DetectionArguments,
    DetectionDataArguments,
    SegmentationArguments,
    SegmentationDataArguments,
)
from mimae.flags.hub import HubArguments
from mimae.flags.model import ModelArguments
from mimae.flags.recipes import parse_arguments, read_recipe
from mimae.training.optimization import WarmupMultiStep, WarmupPolynomial

SEGMENTATION, DETECTION = (recipes_of(f"run_{task}.py") for task in ("semantic_segmentation", "object_detection"))
GROUPS = {
    **dict.fromkeys(SEGMENTATION, (ModelArguments, SegmentationDataArguments, SegmentationArguments, HubArguments)),
    **dict.fromkeys(DETECTION, (ModelArguments, DetectionDataArguments, DetectionArguments, HubArguments)),
}
ARMS = ("mae_vit_base_1600e", "mimae_vit_base_400e")
CLAIMS = {
    "ade20k/mae_vit_base_1600e": "48.1 mIoU (Table 2)",
    "ade20k/mimae_vit_base_400e": "49.3 mIoU (Table 2)",
    "coco/mae_vit_base_1600e": "51.2 / 45.5 AP of boxes / masks (Table 2)",
    "coco/mimae_vit_base_400e": "52.0 / 46.1 AP of boxes / masks (Table 2)",
}
# of the recipe that leaves what a recipe of this folder starts from
PRETRAINING = {"ade20k": "imagenet/{}", "coco": "imagenet/{}", "scenes": "scenes/mimae"}
NUM_CLASSES = {"ade20k": 150, "scenes": 11}  # of UperNet: ten garments and the background
PROCESSES = {"ade20k": 8, "coco": 8, "scenes": 1}


def name_of(recipe: Path) -> str:
    return str(recipe.relative_to(RECIPES).with_suffix(""))


COUNTED = [recipe for recipe in GROUPS if recipe.parent != RECIPES]  # not those for any images


def parse(recipe: Path):
    """(model, data, task's arguments), the model configuration's fields."""
    (model_args, data_args, args, _), fields, _ = parse_arguments(
        ["--config", str(recipe)], GROUPS[recipe], CONFIG_CLASSES, recipe, "test"
    )
    return (model_args, data_args, args), fields


def config_of(recipe: Path, fields: dict[str, Any]) -> MIMAEConfig:
    """Of the backbone, its sizes those that the recipe of its pre-training has."""
    pretraining = RECIPES / f"{PRETRAINING[recipe.parent.name].format(recipe.stem)}.yaml"
    there = read_recipe(pretraining)
    sizes = {name: there[name] for name in there.keys() & set(family_named(None).size_fields)}
    return family_named(None).build_config(there.get("preset"), {**sizes, **fields}, is_dense=True)


def images_per_step(recipe: Path, args: Any) -> int:
    return PROCESSES[recipe.parent.name] * args.per_device_train_batch_size * args.gradient_accumulation_steps


def build(recipe: Path) -> nn.Module:
    """What the cost is counted of: UperNet, or the part of Mask R-CNN that sees every image alike."""
    (_, _, args), fields = parse(recipe)
    if recipe in SEGMENTATION:
        config = config_of(recipe, {**fields, "image_size": args.crop_size, "add_fpn": True})
        return build_upernet(
            MIMAEBackbone(config),
            id2label={label: str(label) for label in range(NUM_CLASSES[recipe.parent.name])},
            channels=args.upernet_channels,
            auxiliary_channels=args.auxiliary_channels,
        )
    detector = MaskRCNNConfig(backbone_config=config_of(recipe, fields), pyramid_channels=args.pyramid_channels)
    return EncoderAndPyramid(detector)


class EncoderAndPyramid(nn.Module):
    """What a `MaskRCNNForInstanceSegmentation` does before its proposals, whose number depends on the image."""

    def __init__(self, config: MaskRCNNConfig):
        super().__init__()
        self.config = config
        self.backbone = MIMAEBackbone(config.backbone_config)
        self.pyramid = SimpleFeaturePyramid(config.backbone_config.hidden_size, config.pyramid_channels)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        (feature_map,) = self.backbone(pixel_values).feature_maps
        return self.pyramid(feature_map)


def test_there_is_a_recipe_for_each_row_of_table_2_and_for_the_scenes():
    names = {name_of(recipe) for recipe in GROUPS}
    assert names == {*CLAIMS, "scenes/semantic_segmentation", "scenes/object_detection", "segmentation", "detection"}


@pytest.mark.parametrize("recipe", GROUPS, ids=name_of)
def test_recipe_is_well_typed_and_says_what_it_is(recipe):
    parse(recipe)
    header = header_of(recipe)
    for part in ("Claim:", "Cost:", "Command:"):
        assert part in header
    assert str(recipe.relative_to(RECIPES.parent)) in header


@pytest.mark.parametrize("recipe", COUNTED, ids=name_of)
def test_recipe_builds_its_model_and_costs_what_its_header_says(recipe):
    with torch.device("meta"):
        model = build(recipe).eval()
        config = model.backbone.config
        pixel_values = torch.empty(1, config.num_channels, *config.image_size_2d)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values)
    _, _, args = parse(recipe)[0]
    if args.max_train_steps is None:
        images = round(args.num_train_epochs * SPLITS["train"])
    else:
        images = args.max_train_steps * images_per_step(recipe, args)
    part = "" if recipe in SEGMENTATION else " of encoder and pyramid"
    flop = 3 * images * counter.get_total_flops()
    assert f"Cost:     {images:.2e} images, {flop:.1e} FLOP (3 x forward{part})\n" in header_of(recipe)


@pytest.mark.parametrize(("name", "claim"), CLAIMS.items())
def test_rows_of_table_2_claim_its_figures_and_start_from_what_pre_training_leaves(name, claim):
    recipe = RECIPES / f"{name}.yaml"
    assert f"Claim:    {claim}\n" in header_of(recipe)
    assert parse(recipe)[0][0].model_name_or_path == f"outputs/imagenet-{recipe.stem}"
    assert (RECIPES / "imagenet" / recipe.name).exists()


@pytest.mark.parametrize("dataset", ["ade20k", "coco"])
def test_the_arms_differ_in_their_checkpoint_alone(dataset):
    baseline, ours = (read_recipe(RECIPES / dataset / f"{arm}.yaml") for arm in ARMS)
    assert baseline.pop("model_name_or_path") != ours.pop("model_name_or_path")
    assert baseline == ours


def test_segmentation_is_maes_on_ade20k():
    # MAE, appendix A.4, and BEiT's code for UperNet; the poly schedule ends at 0
    recipe = RECIPES / "ade20k" / f"{ARMS[1]}.yaml"
    (_, data_args, args), fields = parse(recipe)
    assert (images_per_step(recipe, args), args.max_train_steps) == (16, 160_000)
    assert args.per_device_train_batch_size >= 2  # UperNet normalises over the batch
    assert (args.crop_size, args.stride, args.short_side, args.long_side_limit) == (512, 341, 512, 2048)
    assert (args.min_scale, args.max_scale, args.photometric_distortion) == (0.5, 2.0, True)
    assert (args.learning_rate, args.weight_decay, args.layer_decay) == (1e-4, 0.05, 0.65)
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.9, 0.999, None)
    assert (args.warmup_steps, args.poly_power) == (1500, 1.0)
    assert (args.upernet_channels, args.auxiliary_channels) == (768, 256)
    assert (data_args.reduce_zero_label, data_args.horizontal_flip) == (True, 0.5)
    schedule = WarmupPolynomial(
        peak=args.learning_rate,
        start=args.warmup_learning_rate,
        warmup_steps=args.warmup_steps,
        total_steps=args.max_train_steps,
        power=args.poly_power,
    )
    assert [schedule(step) for step in (0, 1500, 160_000)] == pytest.approx([0, 1e-4, 0])

    config = config_of(recipe, {**fields, "image_size": args.crop_size, "add_fpn": True})
    assert config.out_indices == [4, 6, 8, 12]  # blocks 3, 5, 7 and 11, counted from 0
    assert (config.use_relative_position_bias, config.drop_path_rate) == (True, 0.1)
    assert (config.window_size, config.use_relative_position_embeddings) == (None, False)


def test_detection_is_vitdets_on_coco():
    # ViTDet, appendix A.2, and detectron2's projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py
    recipe = RECIPES / "coco" / f"{ARMS[1]}.yaml"
    (_, data_args, args), fields = parse(recipe)
    assert (images_per_step(recipe, args), args.max_train_steps) == (64, 184_375)
    assert (args.min_scale, args.max_scale, data_args.horizontal_flip) == (0.1, 2.0, 0.5)
    assert (args.learning_rate, args.weight_decay, args.layer_decay) == (1e-4, 0.1, 0.7)
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.9, 0.999, None)
    assert (args.warmup_steps, args.lr_gamma, args.lr_milestones) == (250, 0.1, [163_889, 177_546])
    assert (args.pyramid_channels, args.head_channels, args.box_features) == (256, 256, 1024)
    schedule = WarmupMultiStep(
        peak=args.learning_rate,
        start=args.warmup_learning_rate,
        warmup_steps=args.warmup_steps,
        total_steps=args.max_train_steps,
        milestones=tuple(args.lr_milestones),
        gamma=args.lr_gamma,
    )
    rates = [schedule(step) for step in (0, 250, 163_888, 163_889, 177_546)]
    assert rates == pytest.approx([0, 1e-4, 1e-4, 1e-5, 1e-6])

    config = config_of(recipe, fields)
    assert (config.image_size, config.window_size, config.drop_path_rate) == (1024, 14, 0.1)
    assert [block for block in range(12) if config.window_of_block(block) is None] == [2, 5, 8, 11]
    assert (config.use_relative_position_embeddings, config.use_relative_position_bias) == (True, False)
    assert config.to_diff_dict() == MaskRCNNConfig().backbone_config.to_diff_dict()


@pytest.mark.parametrize("dataset", ["ade20k", "coco"])
def test_long_runs_are_saved_often_and_evaluated_a_few_times(dataset):
    _, _, args = parse(RECIPES / dataset / f"{ARMS[0]}.yaml")[0]
    assert 15 <= args.max_train_steps // args.checkpointing_steps <= 50
    assert 3 <= args.max_train_steps // args.evaluation_steps <= 5


@pytest.mark.parametrize(
    ("scenes", "paper"),
    [("semantic_segmentation", f"ade20k/{ARMS[1]}"), ("object_detection", f"coco/{ARMS[1]}")],
)
def test_scenes_differ_from_table_2_in_sizes_rates_and_steps_alone(scenes, paper):
    small, large = (parse(RECIPES / f"{name}.yaml") for name in (f"scenes/{scenes}", paper))
    sizes = r"image_size|(crop|box|head|pyramid|upernet|auxiliary)_\w+|rpn_\w+|short_side|stride|long_side_limit"
    lengths = (
        r"max_train_steps|num_train_epochs|(checkpointing|evaluation)_\w+|warmup_steps|lr_milestones|logging_steps"
    )
    rates = r"learning_rate|layer_decay|\w+_scale"
    machine = r"per_device_train_batch_size|gradient_accumulation_steps|mixed_precision|cpu_threads"
    for name, value in vars(large[0][2]).items():
        if vars(small[0][2])[name] != value:
            assert re.fullmatch("|".join((sizes, lengths, rates, machine)), name), name
    assert {**large[1], **small[1]}.keys() - large[1].keys() <= {"global_attention_indexes"}
    for name in ("use_relative_position_bias", "use_relative_position_embeddings", "drop_path_rate"):
        assert small[1].get(name) == large[1].get(name)
