"""Recipes and flags: every recipe can be run, costs what its header says, and what is wrong is refused by name."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from recipe_helpers import RECIPES, header_of, recipes_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from mimae.data.scenes import SPLITS
from mimae.families.family import Family
from mimae.families.registry import CONFIG_CLASSES, family_named
from mimae.flags.data import DataArguments
from mimae.flags.model import ModelArguments
from mimae.flags.option import RecipeError
from mimae.flags.pretraining import PretrainingArguments
from mimae.flags.recipes import check_recipe, parse_arguments, read_recipe
from mimae.run_mim_pretrain import build_schedule, main

ALL_RECIPES = recipes_of("run_mim_pretrain.py")
GROUPS = (ModelArguments, DataArguments, PretrainingArguments)
IMAGENET_TRAIN_IMAGES = 1_281_167
FASHION_MNIST_TRAIN_IMAGES = 60_000


def parse(*argv: str, recipe: Path = RECIPES / "demo.yaml"):
    """(model, data, training arguments), the model configuration's fields."""
    groups, fields, _ = parse_arguments(list(argv), GROUPS, CONFIG_CLASSES, recipe, "test")
    return groups, fields


def family_of(recipe: Path) -> Family:
    return family_named(read_recipe(recipe).get("model_type", "mimae"))


def config_of(recipe: Path) -> PreTrainedConfig:
    (model_args, *_), fields = parse("--config", str(recipe))
    return family_of(recipe).build_config(model_args.preset, fields)


def shape_of(config: PreTrainedConfig) -> str:
    """The configuration without what changes no tensor's shape; of a weight, whether there is any."""
    fields = config.to_diff_dict()
    for name in [name for name in fields if name.endswith("_weight")]:
        fields[name] = float(fields[name] > 0)
    return json.dumps({name: value for name, value in fields.items() if not name.startswith("mi_gate")})


@cache
def forward(config_class: type[PreTrainedConfig], shape: str) -> tuple[torch.Size, int]:
    """The shape of the logits of one image, and the operations; dozens of recipes share a model."""
    config = config_class.from_dict(json.loads(shape))
    with torch.device("meta"):
        model = family_named(config.model_type).pretraining_class(config)
        pixel_values = torch.empty(1, config.num_channels, *config.image_size_2d)
        noise = torch.empty(1, *config.noise_shape)
    with FlopCounterMode(display=False) as counter:
        logits = model(pixel_values, noise=noise).logits
    return logits.shape, counter.get_total_flops()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_there_is_a_recipe_for_each_row_of_the_papers_pre_training_tables():
    names = {str(path.relative_to(RECIPES).with_suffix("")) for path in ALL_RECIPES}
    assert {"demo", "fashion_mnist/mae", "fashion_mnist/mimae"} <= names
    assert {f"imagenet/{name}" for name in ("mimae_vit_base_200e", "mimae_vit_base_400e")} <= names
    assert {f"imagenet/mae_vit_{name}" for name in ("base_800e", "base_1600e", "small_800e")} <= names
    assert "imagenet/mimae_vit_small_200e" in names
    assert {f"imagenet/{name}" for name in ("misimmim_swin_base_400e", "simmim_swin_base_800e")} <= names
    assert len([name for name in names if re.search(r"ablation/losses_[a-f]_", name)]) == 6
    assert len([name for name in names if "ablation/weights_" in name]) == 5  # (1, 10) is row (f)
    assert len([name for name in names if "ablation/ratio_" in name]) == 18
    assert {f"imagenet/ablation/masks_{name}" for name in ("independent", "6", "8")} <= names


@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_is_well_typed_builds_its_model_and_costs_what_its_header_says(recipe):
    (_, data_args, args), _ = parse("--config", str(recipe))
    config = config_of(recipe)
    shape, operations = forward(type(config), shape_of(config))
    assert shape[:3] == (1, config.num_views, config.num_patches)

    header = header_of(recipe)
    for part in ("Claim:", "Cost:", "Command:"):
        assert part in header
    if data_args.dataset_name == "ILSVRC/imagenet-1k":
        num_images = IMAGENET_TRAIN_IMAGES
    elif "fashion" in str(recipe):
        num_images = FASHION_MNIST_TRAIN_IMAGES
    elif data_args.train_dir == "scenes/images/pretrain":
        num_images = SPLITS["pretrain"]
    else:
        return  # the demo's cost is a time
    views = num_images * args.num_train_epochs * config.num_views
    flop = views * 3 * operations / config.num_views
    assert f"{views:.2e} masked views, {flop:.1e} FLOP" in header
    assert f"recipes/{recipe.relative_to(RECIPES)}" in header


@pytest.mark.parametrize(
    ("baseline", "ours"),
    [
        ("fashion_mnist/mae", "fashion_mnist/mimae"),
        ("imagenet/mae_vit_base_800e", "imagenet/mimae_vit_base_200e"),
        ("imagenet/simmim_swin_base_800e", "imagenet/misimmim_swin_base_400e"),
    ],
)
def test_arms_that_are_compared_have_equal_views_and_rates_and_differ_in_masks_and_weights_alone(baseline, ours):
    arms, configs = [], []
    for name in (baseline, ours):
        recipe = RECIPES / f"{name}.yaml"
        (_, data_args, args), _ = parse("--config", str(recipe))
        num_views = config_of(recipe).num_views
        counted = {
            "per_device_train_batch_size": args.per_device_train_batch_size * num_views,
            "num_train_epochs": args.num_train_epochs * num_views,
            "warmup_epochs": args.warmup_epochs * num_views,
            "checkpointing_epochs": None,  # of no matter to what is learnt
            "lr_milestone_epochs": [epoch * num_views for epoch in args.lr_milestone_epochs or []],
        }
        arms.append({**vars(data_args), **vars(args), **counted})
        configs.append(config_of(recipe).to_dict())
    assert arms[0] == arms[1]
    masks_and_weights = {"num_masks", "mask_ratio", "mi_max_weight", "mi_min_weight"}
    assert {name for name, value in configs[0].items() if configs[1][name] != value} <= masks_and_weights


def test_a_warm_up_in_steps_wins_over_one_in_epochs():
    (_, _, args), _ = parse("--config", str(RECIPES / "demo.yaml"), "--warmup_steps", "7")
    assert args.warmup_epochs > 0
    schedule = build_schedule(args, steps_per_epoch=22, images_per_step=64, num_views=4)
    assert schedule.warmup_steps == 7
    assert schedule(6) < schedule(7) == schedule.peak


# of microsoft/SimMIM, configs/swin_base__{800,100}ep: rates are per 512 images there
@pytest.mark.parametrize(
    ("name", "start", "peak", "final", "epochs", "milestone", "num_masked"),
    [
        ("simmim_swin_base_800e", 5e-7, 1e-4, 1e-5, 800, 700, 22),  # ceil(0.6 * 36) masked units
        ("simmim_swin_base_100e", 1e-6, 2e-4, 1e-5, 100, None, 22),
        ("misimmim_swin_base_400e", 5e-7, 1e-4, 1e-5, 400, 350, 18),
    ],
)
def test_simmim_recipes_have_the_official_rates_clipping_crops_and_sizes(
    name, start, peak, final, epochs, milestone, num_masked
):
    recipe = RECIPES / "imagenet" / f"{name}.yaml"
    (_, data_args, args), _ = parse("--config", str(recipe))
    config, images_per_step = config_of(recipe), 8 * args.per_device_train_batch_size
    assert images_per_step * config.num_views == 2048
    steps_per_epoch = IMAGENET_TRAIN_IMAGES // images_per_step
    schedule = build_schedule(args, steps_per_epoch, images_per_step, config.num_views)

    scale = 2048 / 512
    assert schedule.warmup_steps == 10 * steps_per_epoch // config.num_views
    assert schedule(0) == pytest.approx(start * scale)
    assert schedule(schedule.warmup_steps) == pytest.approx(peak * scale)
    assert schedule(epochs * steps_per_epoch) == pytest.approx(final * scale)
    assert schedule.total_steps == epochs * steps_per_epoch
    if milestone is not None:
        assert schedule(milestone * steps_per_epoch - 1) == pytest.approx(peak * scale)
        assert schedule(milestone * steps_per_epoch) == pytest.approx(final * scale)

    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.999, 0.05, 5.0)
    assert (data_args.min_crop_scale, data_args.horizontal_flip) == (0.67, 0.5)
    assert (config.image_size, config.window_size, config.mask_patch_size, config.patch_size) == (192, 6, 32, 4)
    assert (config.embed_dim, tuple(config.depths), tuple(config.num_heads)) == (128, (2, 2, 18, 2), (4, 8, 16, 32))
    assert (config.drop_path_rate, config.num_patches - config.num_visible) == (0.0, num_masked)


def test_the_demo_differs_from_the_imagenet_recipe_in_size_and_steps_alone():
    demo = config_of(RECIPES / "demo.yaml")
    imagenet = config_of(RECIPES / "imagenet/mimae_vit_base_200e.yaml")
    assert demo.num_patches >= 64
    sizes = {"image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    sizes |= {"intermediate_size", "transformers_version"}
    for name, value in imagenet.to_dict().items():
        if name not in sizes and not re.fullmatch(r"decoder_(hidden_size|num_.*|intermediate_size)", name):
            assert demo.to_dict()[name] == value, name
    lengths = {"per_device_train_batch_size", "num_train_epochs", "warmup_epochs", "checkpointing_epochs"}
    lengths |= {"evaluation_epochs", "evaluation_crop_ratio", "cpu_threads"}
    assert set(read_recipe(RECIPES / "demo.yaml")) <= sizes | lengths | {
        f"decoder_{name}" for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }


def test_an_unknown_key_is_refused_by_name_with_the_nearest_known_one(tmp_path):
    with pytest.raises(RecipeError, match=r"unknown key 'mask_ration'; did you mean 'mask_ratio'"):
        parse(recipe=write(tmp_path, "mask_ration: 0.75\n"))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("base_learning_rate: 2e-4", "base_learning_rate"),  # YAML reads text
        ("seed: '3'", "seed"),
        ("streaming: 1", "streaming"),
        ("num_train_epochs: null", "num_train_epochs"),
        ("per_device_train_batch_size: 2.5", "per_device_train_batch_size"),
        ("logging_steps: 0", "logging_steps"),
        ("lr_batch_unit: pixels", "lr_batch_unit"),
        ("checkpoints_total_limit: 1", "checkpoints_total_limit"),
        ("max_grad_norm: 0.0", "max_grad_norm"),
        ("warmup_epochs: -5", "warmup_epochs"),
        ("evaluation_crop_ratio: 0", "evaluation_crop_ratio"),
    ],
)
def test_a_wrong_type_or_value_is_refused_by_name(tmp_path, line, name):
    with pytest.raises(ValueError, match=name):
        parse(recipe=write(tmp_path, line + "\n"))


@pytest.mark.parametrize("line", ["num_masks: four", "mask_ratio: '0.75'", "mask_strategy: diagonal"])
def test_a_wrong_model_field_is_refused_by_name_when_the_configuration_is_built(tmp_path, line):
    _, fields = parse(recipe=write(tmp_path, line + "\n"))
    with pytest.raises(Exception, match=line.split(":")[0]):
        family_named("mimae").build_config(None, fields)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = write(tmp_path, "seed: 3\nnum_masks: 6\nweight_decay: 0\nimage_size: [32, 64]\n")
    (_, _, args), fields = parse("--seed", "5", "--num_masks", "8", "--mi_gate_threshold", "None", recipe=recipe)
    assert (args.seed, args.weight_decay, args.adam_beta2) == (5, 0.0, 0.95)
    assert fields == {"num_masks": 8, "mi_gate_threshold": None, "image_size": [32, 64]}


def test_a_flag_that_names_other_data_replaces_the_recipes(tmp_path):
    recipe = write(tmp_path, "train_dir: somewhere\nvalidation_split: test\nmin_crop_scale: 0.5\n")
    (_, data_args, _), _ = parse("--data_files", "a.parquet", "b.parquet", recipe=recipe)
    assert (data_args.train_dir, data_args.data_files) == (None, ["a.parquet", "b.parquet"])
    assert (data_args.validation_split, data_args.min_crop_scale) == (None, 0.5)
    with pytest.raises(ValueError, match="dataset_name and train_dir"):
        check_recipe(yaml.safe_load("train_dir: a\ndataset_name: b\n"), GROUPS, ())


def test_an_unknown_flag_is_refused_by_name_with_the_nearest_known_one():
    with pytest.raises(RecipeError, match=r"unknown flag '--weight_decya'; did you mean 'weight_decay'"):
        parse("--weight_decya", "1")


def test_a_yaml_tag_executes_nothing(tmp_path):
    marker = tmp_path / "executed"
    with pytest.raises(RecipeError, match="cannot be read"):
        parse(recipe=write(tmp_path, f"seed: !!python/object/apply:os.system ['touch {marker}']\n"))
    assert not marker.exists()


def test_a_recipe_that_is_not_there_or_no_mapping_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        parse("--config", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(RecipeError, match="mapping"):
        parse(recipe=write(tmp_path, "- seed\n"))


def test_lists_are_written_with_spaces_or_brackets():
    for flags in (["--depths", "2", "6"], ["--depths", "[2, 6]"]):
        assert parse("--model_type", "misimmim", *flags)[1]["depths"] == [2, 6]
    assert parse("--image_size", "32")[1]["image_size"] == 32
    assert parse("--image_size", "32", "64")[1]["image_size"] == [32, 64]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--window_size", "7"], "window_size: of a 'mimae' for segmentation and detection"),
        (["--model_type", "misimmim", "--hidden_size", "64"], "hidden_size: of model_type mimae"),
        (["--preset", "swin-tiny"], "preset 'swin-tiny' is of model_type 'misimmim'"),
        (["--model_type", "misimmin"], "'misimmin' is not known; there are mimae, misimmim"),
    ],
)
def test_what_belongs_to_the_other_model_is_refused_before_anything_is_written(tmp_path, flags, words):
    with pytest.raises(RecipeError, match=words):
        main([*flags, "--output_dir", str(tmp_path / "run"), "--use_cpu"])
    assert not (tmp_path / "run").exists()
