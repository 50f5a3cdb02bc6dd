"""A flag is one field: its default, help and range, what a resumed run is held to, and what names data."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from transformers import SwinConfig, ViTMAEConfig

from mimae import MIMAEConfig, MISimMIMConfig
from mimae.families.registry import CONFIG_CLASSES
from mimae.flags.model_fields import config_fields, described_arguments, described_fields, model_fields
from mimae.flags.option import HEADINGS, CheckedArguments, Flag, RecipeError, changed, entries, flags_of, option
from mimae.flags.recipes import parse_arguments
from mimae.flags.scripts import CLASSIFICATION, DETECTION, PRETRAINING, SCRIPTS, SEGMENTATION
from mimae.run_image_classification import ClassificationRun
from mimae.run_mim_pretrain import run_settings
from mimae.run_object_detection import DetectionRun
from mimae.run_semantic_segmentation import SegmentationRun
from mimae.tests.flags_page import page
from mimae.training.optimization import WarmupCosine

ROOT = Path(__file__).resolve().parents[1]
ALL_GROUPS = sorted({group for groups in SCRIPTS.values() for group in groups}, key=lambda group: group.__name__)

# what checkpoints have held since the first version: with another key, those of older runs would not resume
SCHEDULE = {f"schedule.{name}" for name in ("peak", "start", "final", "warmup_steps", "total_steps")}
OF_ALL_RUNS = SCHEDULE | {
    *("images", "image_mean", "image_std", "mixed_precision"),
    *("seed", "gradient_accumulation_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm"),
    "horizontal_flip",
}
OF_DOWNSTREAM_RUNS = OF_ALL_RUNS | {"untrained", "per_device_train_batch_size", "layer_decay", "processes"}
KEYS = {
    "run_mim_pretrain.py": OF_ALL_RUNS
    | {"model_type", *config_fields(MIMAEConfig), "min_crop_scale", "crop_interpolation"}
    | {"images_per_epoch", "images_per_forward", "shuffle_window"},
    "run_image_classification.py": OF_DOWNSTREAM_RUNS
    | {"task", "auto_augment", "random_erasing", "mixup", "cutmix", "label_smoothing", "ema_decay"}
    | {"probe_learning_rates", "feature_pooling", "min_crop_scale", "shuffle_window"},
    "run_semantic_segmentation.py": OF_DOWNSTREAM_RUNS
    | {"crop_size", "short_side", "long_side_limit", "min_scale", "max_scale", "photometric_distortion"}
    | {"upernet_channels", "auxiliary_channels"},
    "run_object_detection.py": OF_DOWNSTREAM_RUNS
    | {"min_scale", "max_scale", "pyramid_channels", "head_channels", "box_features"}
    | {"rpn_batch_size_per_image", "rpn_post_nms_top_n", "box_batch_size_per_image"},
}


def schedule() -> WarmupCosine:
    return WarmupCosine(peak=1.0, start=0.0, final=0.0, warmup_steps=1, total_steps=2)


def pretraining_settings(config: MIMAEConfig) -> dict:
    source = SimpleNamespace(fingerprint="0", reads_blocks=False)
    loader = SimpleNamespace(source=source, num_samples=2, global_batch_size=2)
    normalization, accelerator = SimpleNamespace(mean=[0.5], std=[0.5]), SimpleNamespace(mixed_precision="no")
    _, data, training, _ = (group() for group in PRETRAINING)
    return run_settings(data, training, config, normalization, loader, schedule(), accelerator)


def downstream_settings(run_class: type, groups: tuple[type, ...]) -> dict:
    run = run_class.__new__(run_class)  # without a model and images
    images = SimpleNamespace(fingerprint="0", reads_blocks=False)
    _, data, training, _ = (group() for group in groups)
    vars(run).update(data_args=data, args=training, model_fields={}, mean=[0.5], std=[0.5], pooling="mean")
    vars(run)["training_images"] = images
    return run.settings(schedule())


SETTINGS = {
    "run_mim_pretrain.py": lambda: pretraining_settings(MIMAEConfig()),
    "run_image_classification.py": lambda: downstream_settings(ClassificationRun, CLASSIFICATION),
    "run_semantic_segmentation.py": lambda: downstream_settings(SegmentationRun, SEGMENTATION),
    "run_object_detection.py": lambda: downstream_settings(DetectionRun, DETECTION),
}


# --- what a resumed run is held to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoints_hold_the_settings_that_they_always_held(script):
    assert SETTINGS[script]().keys() == KEYS[script]


def test_the_batch_of_a_process_is_held_where_negatives_are_its_own():
    settings = pretraining_settings(MIMAEConfig(gather_negatives=False))
    assert settings.keys() == KEYS["run_mim_pretrain.py"] | {"per_device_train_batch_size"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_setting_comes_from_a_flag_that_says_so_and_each_flag_that_says_so_has_its_setting(script):
    settings = {key.split(".")[0] for key in SETTINGS[script]()}
    of_model = {"model_type", *config_fields(MIMAEConfig)} & settings
    flags = flags_of(*SCRIPTS[script])
    under_own_name = {name for name, flag in flags.items() if flag.affects_result is True}
    derived = {flag.affects_result for flag in flags.values() if isinstance(flag.affects_result, str)}
    no_flag = {"processes"}  # how many there are is the launcher's
    assert under_own_name <= settings
    assert derived - {"model"} <= settings
    assert settings - of_model - no_flag == under_own_name | (derived - {"model"})


def test_a_flag_that_does_not_say_whether_it_affects_the_result_is_an_error():
    with pytest.raises(TypeError, match="affects_result"):
        option(1, "Something.")


@pytest.mark.parametrize("group", ALL_GROUPS)
def test_every_field_of_every_group_is_a_flag_with_a_help_and_a_heading(group):
    assert {field.name for field in fields(group) if not isinstance(field.metadata.get("flag"), Flag)} == set()
    for entry in entries(group).values():
        assert entry.heading in HEADINGS
        assert entry.help.endswith(".")


def test_a_changed_flag_keeps_what_is_not_changed_and_its_heading():
    @dataclass
    class Base(CheckedArguments):
        HEADING: ClassVar = "model"
        width: int = option(8, "Width.", at_least=1, affects_result=True)

    @dataclass
    class Derived(Base):
        HEADING: ClassVar = "data"
        width: int = changed(Base, "width", default=16, affects_result=False)

    assert Derived().width == 16
    assert flags_of(Derived)["width"] == Flag("Width.", affects_result=False, at_least=1)
    assert entries(Derived)["width"].heading == "model"


# --- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "words"),
    [
        ({"at_least": 1}, [1, 7], [0, -1], "at least 1"),
        ({"at_least": 0}, [0, 7], [-1e-9], "0 or more"),
        ({"above": 0}, [1e-9], [0.0, -1.0], "positive"),
        ({"above": 0, "at_most": 1}, [0.1, 1.0], [0.0, 1.1], "above 0 and at most 1"),
        ({"at_least": 0, "at_most": 1}, [0.0, 1.0], [-0.1, 1.1], "in 0..1"),
        ({"at_least": 0, "below": 1}, [0.0, 0.9], [-0.1, 1.0], "in 0..1, below 1"),
        ({"above": 0}, [[1, 2]], [[1, 0], []], "one or more numbers, each positive"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_in_the_words_of_its_bounds(bounds, good, bad, words):
    flag = Flag("", affects_result=False, **bounds)
    for value in [*good, None]:
        flag.check("x", value)
    for value in [*bad, float("nan")] if not isinstance(bad[0], list) else bad:
        with pytest.raises(RecipeError, match=rf"^x={re.escape(str(value))} must be {re.escape(words)}$"):
            flag.check("x", value)


def test_a_flag_without_bounds_takes_any_value():
    for value in (-1.0, float("nan"), [], "text"):
        Flag("", affects_result=False).check("x", value)


# --- the command line and --help ------------------------------------------------------------------------------------


def parse(groups: tuple[type, ...], tmp_path: Path, *argv: str, recipe: str = "{}"):
    (tmp_path / "recipe.yaml").write_text(recipe)
    return parse_arguments(list(argv), groups, CONFIG_CLASSES, tmp_path / "recipe.yaml", "About it: 100 %.")


def help_of(groups: tuple[type, ...], tmp_path: Path, capsys, recipe: str = "{}") -> str:
    with pytest.raises(SystemExit) as end:
        parse(groups, tmp_path, "--help", recipe=recipe)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_each_flag_once_under_a_heading(script, tmp_path, capsys):
    text = help_of(SCRIPTS[script], tmp_path, capsys)
    named = re.findall(r"^  (?:-h, )?--([\w-]+)", text, flags=re.MULTILINE)
    assert sorted(named) == sorted({"help", "config", *flags_of(*SCRIPTS[script]), *model_fields(CONFIG_CLASSES)})
    headings = re.findall(r"^(\w[\w -]*):$", text, flags=re.MULTILINE)
    in_order = [heading for heading in HEADINGS if heading in headings]
    architecture = ["architecture of mimae and misimmim", "architecture of mimae", "architecture of misimmim"]
    assert headings == ["options", *in_order, *architecture]
    assert {"model", "data", "masks and losses", "optimisation", "machine", "run folder", "Hub"} <= set(headings)


def test_help_shows_defaults_and_what_the_recipe_changes(tmp_path, capsys):
    text = help_of(PRETRAINING, tmp_path, capsys, "weight_decay: 0.3\nnum_masks: 6\nlogging_steps: 10\n")
    text = " ".join(text.split())
    assert "Images per process and forward pass. (default: 64)" in text
    assert "(default: 0.05; in this recipe: 0.3)" in text
    assert "(default: mimae: 4; misimmim: 2; in this recipe: 6)" in text
    assert "Log every so many steps. (default: 10)" in text
    assert "Where data sets are kept. (default: the cache of 🤗 Datasets)" in text
    assert "λ2, of L_max (Eq. 8). (default: 1.0)" in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--crop_size", "64"], {"crop_size": 64}),
        (["--crop-size", "64"], {"crop_size": 64}),
        (["--crop-size=64", "--crop_size=32"], {"crop_size": 32}),
        (["--untrained"], {"untrained": True}),
        (["--untrained", "true"], {"untrained": True}),
        (["--untrained", "no"], {"untrained": False}),
        ([], {"photometric_distortion": True, "untrained": False}),
        (["--no_photometric_distortion"], {"photometric_distortion": False}),
        (["--no-photometric-distortion"], {"photometric_distortion": False}),
        (["--photometric-distortion", "false"], {"photometric_distortion": False}),
    ],
)
def test_every_spelling_is_understood(tmp_path, argv, expected):
    (_, _, args, _), _, _ = parse(SEGMENTATION, tmp_path, *argv)
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_recipe_holds_whatever_the_spelling_of_other_flags(tmp_path):
    recipe = "photometric_distortion: false\nseed: 3\ntrain_dir: there\nnum_classes: 5\n"
    (_, data, args, _), _, _ = parse(SEGMENTATION, tmp_path, "--crop-size", "64", recipe=recipe)
    assert (args.photometric_distortion, args.seed, data.train_dir, data.num_classes) == (False, 3, "there", 5)
    (_, data, *_), _, _ = parse(SEGMENTATION, tmp_path, "--dataset-name", "here", recipe=recipe)
    assert (data.dataset_name, data.train_dir, data.num_classes) == ("here", None, None)


# --- the fields of the models' configurations -----------------------------------------------------------------------


def test_a_fields_help_is_read_from_docstrings_of_both_styles():
    ours = """What it is.

    Args:
        width: of a token: 8
            or more.
        rows, columns: of the grid.

    Raises:
        ValueError: no.
    """
    theirs = """
    Args:
        width (`Union[int, list[int]]`, *optional*, defaults to `8`):
            Size of a token.
            In pixels.

    Example:
    ```python
    >>> width: 8
    ```
    """
    both = {"rows": "of the grid.", "columns": "of the grid."}
    assert described_arguments(ours) == {"width": "of a token: 8 or more.", **both}
    assert described_arguments(theirs) == {"width": "Size of a token. In pixels."}
    assert described_arguments("Nothing.") == described_arguments(None) == {}


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_every_field_of_a_configuration_is_described(config_class):
    described = described_fields(config_class)
    assert [name for name in config_fields(config_class) if not described.get(name)] == []


def test_a_configurations_own_words_win_over_those_of_transformers():
    assert described_fields(ViTMAEConfig)["num_channels"] == described_fields(MIMAEConfig)["num_channels"]
    assert described_fields(MIMAEConfig)["num_hidden_layers"] == "blocks of the encoder."
    assert described_fields(MISimMIMConfig)["qkv_bias"] == described_fields(SwinConfig)["qkv_bias"]


def test_a_field_that_differs_between_models_is_told_for_each():
    described = model_fields(CONFIG_CLASSES)
    assert described["num_masks"].default == "mimae: 4; misimmim: 2"
    assert re.fullmatch(r"mimae: .*\w; misimmim: .*\w", described["window_size"].help)
    assert described["window_size"].heading == "architecture of mimae and misimmim"
    assert described["embed_dim"].heading == "architecture of misimmim"
    assert (described["depths"].takes_list, described["num_masks"].takes_list) == (True, False)


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_of_the_flags_is_what_the_program_writes():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == page(), "python -m mimae.tests.flags_page"


def test_the_page_has_every_flag_of_every_script():
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `--(\w+)` \|", text, flags=re.MULTILINE))
    assert named == {*flags_of(*ALL_GROUPS), *model_fields(CONFIG_CLASSES)}
