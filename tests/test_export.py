"""Exports are what the checkpoint was, to those who will load them; whatever is not is refused and leaves nothing."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from exporting import export_checkpoint
from references import TINY
from safetensors import safe_open
from test_checkpoint_loading import write as write_vit_mae
from transformers import (
    AutoImageProcessor,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from mimae import MIMAEConfig, MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel
from mimae.benchmarks.models.official_mae import OfficialMAE
from mimae.families.family import FAMILIES
from mimae.hub import formats, official_mae
from mimae.hub.export import TOLERANCE, ExportError, largest_difference, main
from mimae.hub.official_mae import official_state
from mimae.hub.timm_vit import timm_architecture, timm_state

HEADS = {"num_attention_heads": 4, "decoder_num_attention_heads": 2}  # TINY's, of no standard width
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "emu"}, "label2id": {"cat": 0, "dog": 1, "emu": 2}}
TARGETS = {
    "vit": "out",
    "timm": "out.safetensors",
    "timm-pth": "out.pth",
    "timm-folder": "out",
    "mae": "out.pth",
    "mimae": "out",
}


TINY_OFFICIAL = {"width": 32, "depth": 2, "heads": 4, "mlp_ratio": 2.0, "decoder": (16, 1, 2)}


@torch.no_grad()
def randomized(model):
    """Every parameter random, so that none can be mistaken for another."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def official_model(image_size, patch_size=4, channels=3, **sizes):
    model = OfficialMAE(image_size, patch_size, channels, **{**TINY_OFFICIAL, **sizes})
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    return model.eval()


def checkpoint(folder, kind, **fields):
    """A model of one of four kinds, saved as training saves it, and the model."""
    config = MIMAEConfig(**{**TINY, "drop_path_rate": 0.1, **fields})
    if kind == "pre-training":
        model = MIMAEForPreTraining(config)
    elif kind == "encoder":
        model = MIMAEModel(config)
    else:
        model = MIMAEForImageClassification(
            MIMAEConfig(**{**config.to_diff_dict(), **LABELS, "classifier_pooling": kind})
        )
    randomized(model).save_pretrained(folder)
    return model


def loaded_by(usage):
    """What the printed lines bind to `model`, or to `state`."""
    names = {}
    exec(usage, names)
    return names.get("model") or names["state"]


def snippet_of(output):
    return output.split("\n\n", 1)[1]


@torch.no_grad()
def assert_equal_features(model, found, images):
    """`found` is what a user has loaded: a stock ViT, timm's, one of ours, or official parameters."""
    expected = model.encode(images).last_hidden_state
    if isinstance(found, dict):
        config = model.config
        sizes = TINY_OFFICIAL if "mask_token" in found else {**TINY_OFFICIAL, "decoder": None}
        official = OfficialMAE(config.image_size_2d, config.patch_size, config.num_channels, **sizes)
        official.load_state_dict(found)
        tokens = official.eval().tokens(images)
        if isinstance(model, MIMAEForPreTraining):
            order = torch.arange(config.num_patches).expand(len(images), 1, -1)
            grids = {"grid_size": config.grid_size, "source_grid": config.grid_size}
            pixels = model.decoder(expected[:, :6], order, first_predicted=0, **grids)[:, 0]
            torch.testing.assert_close(official.pixels(tokens, 5), pixels, rtol=0, atol=1e-5)
    elif isinstance(found, timm.models.VisionTransformer):
        tokens = found.eval().forward_features(images)
    else:
        tokens = found.eval().base_model(images).last_hidden_state
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["pre-training", "encoder"])
@pytest.mark.parametrize("to", TARGETS)
def test_features_of_every_format_equal_the_checkpoints_to_1e_5(tmp_path, capsys, to, kind):
    model = checkpoint(tmp_path / "in", kind)
    out = tmp_path / TARGETS[to]
    assert main([str(tmp_path / "in"), str(out), "--to", to.split("-")[0]]) == 0
    found = loaded_by(snippet_of(capsys.readouterr().out))
    assert_equal_features(model, found, torch.randn(2, 3, 16, 16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", out.name]


@pytest.mark.parametrize(
    ("to", "pooling"),
    [("vit", "cls"), *((to, pooling) for to in TARGETS if to not in ("vit", "mae") for pooling in ("mean", "cls"))],
)
def test_classifiers_keep_their_logits(tmp_path, capsys, to, pooling):
    model = checkpoint(tmp_path / "in", pooling)
    assert main([str(tmp_path / "in"), str(tmp_path / TARGETS[to]), "--to", to.split("-")[0]]) == 0
    found = loaded_by(snippet_of(capsys.readouterr().out)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits, expected = found(images), model(images).logits
    torch.testing.assert_close(getattr(logits, "logits", logits), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_classifiers_official_file_has_the_names_of_official_fine_tuning(tmp_path, pooling):
    model = checkpoint(tmp_path / "in", pooling)
    export_checkpoint(tmp_path / "in", tmp_path / "out.pth", "mae")
    state = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    norm = "fc_norm" if pooling == "mean" else "norm"
    assert {f"{norm}.weight", f"{norm}.bias", "head.weight", "head.bias"} <= state.keys()
    assert not {"norm.weight", "fc_norm.weight"} - {f"{norm}.weight"} & state.keys()
    again = export_and_load(tmp_path / "out.pth", tmp_path / "again", **HEADS)
    assert type(again) is MIMAEForImageClassification
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model(images).logits, rtol=0, atol=1e-5)


def export_and_load(source, out, **known):
    """Import into this project's format, and load from there."""
    export_checkpoint(source, out, "mimae", **known)
    architecture = json.loads((out / "config.json").read_text())["architectures"][0]
    classes = {each.__name__: each for each in (MIMAEModel, MIMAEForPreTraining, MIMAEForImageClassification)}
    return classes[architecture].from_pretrained(out).eval()


def test_it_is_said_that_v_stays_behind(tmp_path, caplog):
    checkpoint(tmp_path / "full", "pre-training")
    checkpoint(tmp_path / "plain", "pre-training", mi_min_weight=0)
    export_checkpoint(tmp_path / "plain", tmp_path / "plain.pth", "mae")
    assert "approximator" not in caplog.text
    export_checkpoint(tmp_path / "full", tmp_path / "full.pth", "mae")
    assert "the approximator V and the gate have no place" in caplog.text


def test_labels_travel(tmp_path):
    checkpoint(tmp_path / "in", "cls")
    export_checkpoint(tmp_path / "in", tmp_path / "vit", "vit")
    assert ViTForImageClassification.from_pretrained(tmp_path / "vit").config.id2label == LABELS["id2label"]
    export_checkpoint(tmp_path / "in", tmp_path / "timm", "timm")
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["label_names"] == ["cat", "dog", "emu"]


WITHOUT_THE_PACKAGE = """
import sys

sys.modules["mimae"] = None  # an editable install must not help
import torch
from transformers import AutoModel, ViTModel

torch.set_num_threads(1)
folder, tensors = sys.argv[1:]
case = torch.load(tensors, weights_only=True)
model, info = AutoModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
assert type(model) is ViTModel and not info["missing_keys"] and not info["unexpected_keys"]
with torch.no_grad():
    features = model.eval()(case["images"]).last_hidden_state
torch.testing.assert_close(features, case["features"], rtol=0, atol=1e-5)
assert not any(name.startswith("transformers_modules") for name in sys.modules)
print("equal")
"""


@pytest.mark.extended
def test_a_stock_vit_needs_neither_this_package_nor_remote_code(tmp_path):
    model = checkpoint(tmp_path / "in", "pre-training")
    export_checkpoint(tmp_path / "in", tmp_path / "out", "vit")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "vit"
    assert config["layer_norm_eps"] == 1e-6
    assert "auto_map" not in config
    assert str(tmp_path) not in json.dumps(config)

    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.save({"images": images, "features": model.encode(images).last_hidden_state}, tmp_path / "case.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "out"), str(tmp_path / "case.pt")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip().endswith("equal"), result.stderr


def test_the_image_processor_travels(tmp_path):
    checkpoint(tmp_path / "in", "encoder")
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1] * 3, image_std=[0.2] * 3).save_pretrained(
        tmp_path / "in"
    )
    for to in ("vit", "mimae", "timm"):
        export_checkpoint(tmp_path / "in", tmp_path / to, to)
    for to in ("vit", "mimae"):
        assert list(AutoImageProcessor.from_pretrained(tmp_path / to).image_mean) == [0.1] * 3
    settings = timm.create_model(f"local-dir:{tmp_path / 'timm'}").pretrained_cfg
    assert [list(settings[name]) for name in ("mean", "std", "input_size")] == [[0.1] * 3, [0.2] * 3, [3, 16, 16]]


def test_what_timm_reads_is_imported_again(tmp_path):
    model = checkpoint(tmp_path / "in", "mean")
    export_checkpoint(tmp_path / "in", tmp_path / "out.safetensors", "timm")
    again = export_and_load(tmp_path / "out.safetensors", tmp_path / "again", num_attention_heads=4)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# --- timm's names


def test_a_standard_size_needs_only_timms_name(tmp_path, capsys):
    model = randomized(MIMAEModel(MIMAEConfig.preset("vit-tiny", num_hidden_layers=12)))
    model.save_pretrained(tmp_path / "in")
    path = str(tmp_path / "out.safetensors")
    assert main([str(tmp_path / "in"), path, "--to", "timm"]) == 0
    call = f"model = timm.create_model('vit_tiny_patch16_224', checkpoint_path={path!r}, num_classes=0)"
    assert snippet_of(capsys.readouterr().out).strip() == f"import timm\n\n{call}"


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("vit-tiny", "vit_tiny_patch16_224"),
        ("vit-small", "vit_small_patch16_224"),
        ("vit-base", "vit_base_patch16_224"),
        ("vit-large", "vit_large_patch16_224"),
        ("vit-huge", "vit_huge_patch14_224"),
    ],
)
def test_every_preset_has_the_parameters_of_timms_model_of_that_name(preset, name):
    config = MIMAEConfig.preset(preset, num_labels=1000, classifier_pooling="cls")
    assert timm_architecture(config, has_classifier=True).usage("x.pth") == (
        f"import timm\n\nmodel = timm.create_model('{name}', checkpoint_path='x.pth', num_classes=1000)"
    )
    with torch.device("meta"):
        ours, timms = MIMAEForImageClassification(config), timm.create_model(name, num_classes=1000)
    shapes = {key: value.shape for key, value in timm_state(official_state(ours)).items()}
    assert shapes == {key: value.shape for key, value in timms.state_dict().items()}


# --- shapes and numbers that are not the usual ones


@pytest.mark.parametrize("to", TARGETS)
def test_rectangles_and_other_channels(tmp_path, to):
    model = checkpoint(tmp_path / "in", "pre-training", image_size=(8, 24), num_channels=5)
    difference = export_checkpoint(tmp_path / "in", tmp_path / TARGETS[to], to.split("-")[0])
    assert 0 <= difference <= TOLERANCE
    if to == "mae":
        with pytest.raises(ValueError, match=r"12 patches are no square grid: say --image_size"):
            export_checkpoint(tmp_path / "out.pth", tmp_path / "again", "mimae", **HEADS)
        again = export_and_load(tmp_path / "out.pth", tmp_path / "again", image_size=(8, 24), **HEADS)
        images = torch.randn(2, 5, 8, 24)
        with torch.no_grad():
            torch.testing.assert_close(
                again.encode(images).last_hidden_state, model.encode(images).last_hidden_state, rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("to", TARGETS)
def test_half_precision_is_compared_and_written_in_float32(tmp_path, to):
    model = checkpoint(tmp_path / "in", "pre-training").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    out = tmp_path / TARGETS[to]
    assert export_checkpoint(tmp_path / "in", out, to.split("-")[0]) <= TOLERANCE
    if to in ("vit", "timm"):
        with safe_open(out / "model.safetensors" if out.is_dir() else out, framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118


def test_timm_is_told_of_another_eps(tmp_path, capsys):
    model = checkpoint(tmp_path / "in", "encoder", layer_norm_eps=1e-2)
    assert main([str(tmp_path / "in"), str(tmp_path / "out.safetensors"), "--to", "timm"]) == 0
    usage = snippet_of(capsys.readouterr().out)
    assert "norm_layer=partial(torch.nn.LayerNorm, eps=0.01)" in usage
    assert_equal_features(model, loaded_by(usage), torch.randn(2, 3, 16, 16))
    with pytest.raises(ExportError, match=r"layer_norm_eps=0\.01 has no place in the config\.json of a timm model"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "timm")
    assert not (tmp_path / "out").exists()


# --- from others


@pytest.mark.parametrize("layout", ["new", "legacy", "broken"])
@pytest.mark.parametrize("to", TARGETS)
def test_vit_mae_checkpoints_of_every_layout_are_exported(tmp_path, to, layout):
    stock = randomized(ViTMAEForPreTraining(ViTMAEConfig(**TINY, layer_norm_eps=1e-6)))
    stock.config.architectures = ["ViTMAEForPreTraining"]
    write_vit_mae(tmp_path / "in", stock, layout)
    export_checkpoint(tmp_path / "in", tmp_path / TARGETS[to], to.split("-")[0])
    if to == "mimae":
        model = MIMAEForPreTraining.from_pretrained(tmp_path / "out")
        assert (model.config.num_masks, model.approximator) == (1, None)
        for name, value in stock.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def test_a_vit_mae_without_decoder_stays_without(tmp_path):
    encoder = randomized(ViTMAEModel(ViTMAEConfig(**TINY)))
    encoder.save_pretrained(tmp_path / "in")
    model = export_and_load(tmp_path / "in", tmp_path / "out")
    assert type(model) is MIMAEModel
    images, in_order = torch.randn(2, 3, 16, 16), torch.arange(16.0).expand(2, -1)
    encoder.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = encoder(images, noise=in_order).last_hidden_state
        torch.testing.assert_close(model.encode(images).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_an_official_file_of_a_whole_run_is_imported(tmp_path):
    official = official_model(16)
    flags = argparse.Namespace(model="mae_vit_tiny", lr=1e-3, distributed=False)
    optimizer = torch.optim.AdamW(official.parameters()).state_dict()
    torch.save(
        {"model": official.state_dict(), "args": flags, "optimizer": optimizer, "epoch": 3}, tmp_path / "in.pth"
    )
    model = export_and_load(tmp_path / "in.pth", tmp_path / "out", **HEADS)
    assert type(model) is MIMAEForPreTraining
    assert (model.config.num_masks, model.config.mi_max_weight, model.config.mi_min_weight) == (1, 0, 0)
    assert_equal_features(model, official.state_dict(), torch.randn(2, 3, 16, 16))


def test_an_official_encoder_alone_is_imported(tmp_path):
    official = official_model(16, decoder=None)
    torch.save({"model": official.state_dict()}, tmp_path / "in.pth")
    model = export_and_load(tmp_path / "in.pth", tmp_path / "out", num_attention_heads=4)
    assert type(model) is MIMAEModel
    assert_equal_features(model, official.state_dict(), torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("pooling", ["avg", "token"])
def test_an_official_fine_tuned_model_is_imported(tmp_path, pooling):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
    timms = randomized(timm.create_model("vit_base_patch16_224", **sizes, num_classes=3, global_pool=pooling))
    torch.save({"model": timms.state_dict()}, tmp_path / "in.pth")
    model = export_and_load(tmp_path / "in.pth", tmp_path / "out", num_attention_heads=4)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, timms(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "heads", "prefix"),
    [(192, 3, ""), (384, 6, ""), (768, 12, ""), (1024, 16, ""), (1280, 16, ""), (512, 16, "decoder_")],
)
def test_heads_of_standard_widths_are_known(width, heads, prefix):
    assert official_mae._heads(width, prefix, {}) == heads


@pytest.mark.parametrize(("missing", "given"), [("num", "decoder_num"), ("decoder_num", "num")])
def test_unknown_heads_are_asked_for(tmp_path, missing, given):
    torch.save({"model": official_model(16).state_dict()}, tmp_path / "in.pth")
    known = {f"{given}_attention_heads": 4}
    with pytest.raises(ValueError, match=rf"in\.pth: the number of heads .* say --{missing}_attention_heads"):
        export_checkpoint(tmp_path / "in.pth", tmp_path / "out", "mimae", **known)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    torch.save({"model": official_model(16).state_dict()}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="hidden_size=32 is not divisible by num_attention_heads=5"):
        export_checkpoint(tmp_path / "in.pth", tmp_path / "out", "mimae", **{**HEADS, "num_attention_heads": 5})


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_execute_code_is_refused_unexecuted(tmp_path):
    sprung = tmp_path / "sprung"
    torch.save({"model": official_model(16).state_dict(), "args": Trap(sprung)}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="Nothing in it was executed"):
        export_checkpoint(tmp_path / "in.pth", tmp_path / "out", "mimae", **HEADS)
    assert not sprung.exists()
    torch.load(tmp_path / "in.pth", weights_only=False)  # control: the trap is one
    assert sprung.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "in.pth"
    torch.save({"model": official_model(16).state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"in\.pth is damaged"):
        export_checkpoint(path, tmp_path / "out", "mimae", **HEADS)
    path.write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"in\.pth is damaged"):
        export_checkpoint(path, tmp_path / "out", "mimae", **HEADS)
    (tmp_path / "in.safetensors").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"in\.safetensors is damaged"):
        export_checkpoint(tmp_path / "in.safetensors", tmp_path / "out", "mimae", **HEADS)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds no parameters"):
        export_checkpoint(path, tmp_path / "out", "mimae", **HEADS)
    torch.save({"model": {"layer.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"no parameter 'patch_embed\.proj\.weight'"):
        export_checkpoint(path, tmp_path / "out", "mimae", **HEADS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.norm2.bias"), r"missing vit\.layers\.1\.layernorm_after\.bias; not known"),
        (lambda state: state.update({"blocks.0.ls1.gamma": torch.ones(32)}), r"not known vit\.layers\.0\.ls1\.gamma"),
        (lambda state: state.update({"head_dist.weight": torch.ones(3, 32)}), r"not known head_dist\.weight"),
        (lambda state: state.update({"norm.bias": torch.ones(31)}), r"shapes that contradict each other"),
        (lambda state: state.update({"pos_embed": torch.ones(1, 10, 32)}), r"shapes that contradict each other"),
    ],
)
def test_official_parameters_that_do_not_fit_are_named(tmp_path, change, message):
    state = official_model(16).state_dict()
    change(state)
    torch.save({"model": state}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "in.pth", tmp_path / "out", "mimae", **HEADS)


# --- what is refused, and what is left then


def with_queries_for_keys(model):
    """A conversion that merges q and k in the wrong order, and is right in every shape."""
    state = official_state(model)
    for name in [name for name in state if "qkv" in name]:
        q, k, v = state[name].chunk(3)
        state[name] = torch.cat([k, q, v])
    return state


@pytest.mark.parametrize(("to", "name"), [("timm", "out.safetensors"), ("timm", "out"), ("mae", "out.pth")])
def test_a_wrong_conversion_is_refused_and_leaves_nothing(tmp_path, monkeypatch, to, name):
    checkpoint(tmp_path / "in", "pre-training")
    monkeypatch.setattr(formats, "official_state", with_queries_for_keys)
    with pytest.raises(ExportError, match="outputs of the export differ by"):
        export_checkpoint(tmp_path / "in", tmp_path / name, to)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_wrong_vit_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    checkpoint(tmp_path / "in", "encoder", layer_norm_eps=1e-3)
    family = FAMILIES["mimae"]
    fields = tuple(name for name in family.stock.fields if name != "layer_norm_eps")
    monkeypatch.setitem(FAMILIES, "mimae", replace(family, stock=replace(family.stock, fields=fields)))
    with pytest.raises(ExportError, match="outputs of the export differ by"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "vit")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_wrong_import_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    torch.save({"model": official_model(16).state_dict()}, tmp_path / "in.pth")
    parts = {**official_mae._OUR_PARTS, ".norm1.": ".layernorm_after.", ".norm2.": ".layernorm_before."}
    monkeypatch.setattr(official_mae, "_OUR_PARTS", parts)
    with pytest.raises(ExportError, match="outputs of the export differ by"):
        export_checkpoint(tmp_path / "in.pth", tmp_path / "out", "mimae", **HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_an_export_that_does_not_load_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    checkpoint(tmp_path / "in", "encoder")
    monkeypatch.setattr(formats, "timm_state", lambda state: {**state, "more": torch.zeros(1)})
    with pytest.raises(ExportError, match="the export does not load"):
        export_checkpoint(tmp_path / "in", tmp_path / "out.pth", "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_new_classifiers_tiny_logits_are_compared_by_their_own_scale(tmp_path, monkeypatch):
    # they are about 1e-4, so that an absolute tolerance would let every head pass
    model = MIMAEForImageClassification(MIMAEConfig(**TINY, **LABELS)).eval()
    model.save_pretrained(tmp_path / "in")
    assert model(torch.randn(2, 3, 16, 16)).logits.abs().max() < 1e-3
    assert export_checkpoint(tmp_path / "in", tmp_path / "right.pth", "timm") <= TOLERANCE

    def with_another_head(model):
        state = official_state(model)
        return {**state, "head.weight": state["head.weight"] * (1 + 1e-4)}

    monkeypatch.setattr(formats, "official_state", with_another_head)
    with pytest.raises(ExportError, match="outputs of the export differ by"):
        export_checkpoint(tmp_path / "in", tmp_path / "wrong.pth", "timm")


def test_differences_are_relative_and_pass_no_nan_over():
    expected = {"tokens": torch.tensor([100.0, -200.0]), "logits": torch.tensor([1e-4])}
    assert largest_difference(expected, {"tokens": torch.tensor([100.0, -199.0])}) == pytest.approx(1 / 200)
    assert largest_difference(expected, {**expected, "logits": torch.tensor([2e-4])}) == pytest.approx(1)
    assert largest_difference({"tokens": torch.zeros(1)}, {"tokens": torch.zeros(1)}) == 0
    for order in (("tokens", "logits"), ("logits", "tokens")):
        found = {order[0]: torch.full((1,), float("nan")), order[1]: expected[order[1]]}
        assert largest_difference(expected, found) != largest_difference(expected, found)


def test_a_checkpoint_with_nan_is_refused(tmp_path):
    model = checkpoint(tmp_path / "in", "encoder")
    model.layernorm.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(ExportError, match="differ by nan"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "vit")


def test_a_classifier_of_mean_patches_is_no_stock_vit(tmp_path, capsys):
    checkpoint(tmp_path / "in", "mean")
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "vit"]) == 1
    message = capsys.readouterr().err.rpartition("error: ")[2]  # after transformers' progress bars
    assert message.startswith("a stock ViT normalises every token")
    assert "--to timm" in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_exists_is_replaced_only_on_request(tmp_path):
    checkpoint(tmp_path / "in", "encoder")
    for out, to in (("out.pth", "mae"), ("out", "mimae")):
        (tmp_path / "out").mkdir(exist_ok=True)  # an empty folder is as good as none
        export_checkpoint(tmp_path / "in", tmp_path / out, to)
        with pytest.raises(ExportError, match="exists: choose another name"):
            export_checkpoint(tmp_path / "in", tmp_path / out, to)
    export_checkpoint(tmp_path / "in", tmp_path / "out.pth", "timm", overwrite=True)
    assert "model" not in torch.load(tmp_path / "out.pth", weights_only=True)
    export_checkpoint(tmp_path / "in", tmp_path / "out", "vit", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.pth"]


def test_nothing_but_an_export_is_ever_replaced(tmp_path):
    checkpoint(tmp_path / "in", "encoder")
    with pytest.raises(ExportError, match="is the checkpoint itself"):
        export_checkpoint(tmp_path / "in", tmp_path / "in", "vit", overwrite=True)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").touch()
    (tmp_path / "file").touch()
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "folder.pth" / "mine").touch()
    for out, to in (("code", "vit"), ("file", "vit"), ("folder.pth", "mae")):
        with pytest.raises(ExportError, match="is not replaced"):
            export_checkpoint(tmp_path / "in", tmp_path / out, to, overwrite=True)
    export_checkpoint(tmp_path / "in", tmp_path / "out", "vit")
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(ExportError, match="is not replaced"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "vit", overwrite=True)


@pytest.mark.parametrize(
    ("to", "name"), [("vit", "out.pth"), ("mimae", "out.safetensors"), ("mae", "out"), ("mae", "out.safetensors")]
)
def test_names_that_a_format_cannot_have_are_refused(tmp_path, to, name):
    checkpoint(tmp_path / "in", "encoder")
    with pytest.raises(ExportError, match=f"--to {to} writes a"):
        export_checkpoint(tmp_path / "in", tmp_path / name, to)


def test_checkpoints_that_are_none_are_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    model = checkpoint(tmp_path / "partial", "encoder")
    state = {name: value for name, value in model.state_dict().items() if name != "layernorm.bias"}
    model.save_pretrained(tmp_path / "partial", state_dict=state)
    for name, change in (("other", {"hidden_size": 64}), ("config", {"num_attention_heads": 5}), ("damaged", {})):
        checkpoint(tmp_path / name, "encoder")
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **change}))
    os.truncate(tmp_path / "damaged" / "model.safetensors", 1000)
    cases = {
        "empty": "holds no config.json",
        "bert": "holds BertModel",
        "partial": "lacks 1 parameters of a MIMAEModel, layernorm.bias among them",
        "other": "cannot be used",
        "config": "hidden_size=32 is not divisible by num_attention_heads=5",
        "damaged": "cannot be used",
        "nowhere/at/all": "nowhere/at/all is no model here",
    }
    for name, message in cases.items():
        assert main([str(tmp_path / name), str(tmp_path / "out"), "--to", "vit"]) == 1
        error = capsys.readouterr().err.rpartition("error: ")[2]
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_flags_of_official_files_are_refused_elsewhere(tmp_path):
    checkpoint(tmp_path / "in", "encoder")
    with pytest.raises(ValueError, match=r"the config\.json of .* tells them"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "vit", num_attention_heads=8)


def test_an_unknown_format_is_refused(tmp_path):
    checkpoint(tmp_path / "in", "encoder")
    with pytest.raises(ExportError, match="no format 'onnx'; there are vit, swin, timm, mae, mimae"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "onnx")
