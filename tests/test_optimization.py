"""Learning rate, parameter groups, clipping, and the step that is skipped, against hand values and timm."""

import math
import re

import pytest
import torch
from references import TINY
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay

from mimae import MIMAEBackbone, MIMAEConfig, MIMAEForImageClassification, MIMAEForPreTraining
from mimae.configuration_misimmim import MISimMIMConfig
from mimae.dense.upernet import UperNet, build_upernet
from mimae.modeling_misimmim import MISimMIMForImageClassification
from mimae.training.optimization import (
    WarmupCosine,
    WarmupMultiStep,
    WarmupPolynomial,
    build_adamw,
    build_finetuning_adamw,
    clip_gradients,
    layer_decay_groups,
    parameter_names,
    scaled_learning_rate,
    schedule_as_lambda,
)


@pytest.fixture
def model():
    return MIMAEForPreTraining(
        MIMAEConfig(
            image_size=16,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            decoder_hidden_size=8,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=16,
        )
    )


def test_1024_images_of_4_views_have_the_learning_rate_of_a_batch_of_4096():
    assert scaled_learning_rate(1.5e-4, 1024, 4, "views", 256) == pytest.approx(2.4e-3)
    assert scaled_learning_rate(1.5e-4, 1024, 4, "images", 256) == pytest.approx(6e-4)
    assert scaled_learning_rate(1e-4, 1024, 2, "images", 512) == pytest.approx(2e-4)  # SimMIM's rule


def test_learning_rate_rises_linearly_from_0_and_falls_as_a_half_cosine():
    schedule = WarmupCosine(peak=2.0, final=0.5, warmup_steps=10, total_steps=110)
    assert [schedule(step) for step in (0, 5, 10, 60, 110)] == pytest.approx([0.0, 1.0, 2.0, 1.25, 0.5])
    official = [0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100)) for step in range(10, 110)]
    assert [schedule(step) for step in range(10, 110)] == pytest.approx(official)
    assert WarmupCosine(peak=1.0, final=0.0, warmup_steps=0, total_steps=4)(0) == 1.0


def test_every_trainable_parameter_is_in_exactly_one_group_and_vectors_do_not_decay(model):
    optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    names = parameter_names(model, optimizer)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(names) == sorted(trainable)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name in trainable:
            expected = 0.0 if parameter.ndim <= 1 or name.endswith(".bias") else 0.05
            assert decay_of[id(parameter)] == expected, name
    assert not {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"} & set(names)


def test_the_approximator_is_clipped_on_its_own():
    encoder, approximator = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    encoder.grad, approximator.grad = torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])
    norm = clip_gradients([encoder], [approximator], max_norm=1.0)
    assert norm == pytest.approx(math.hypot(0.5, 50.0))
    torch.testing.assert_close(encoder.grad, torch.tensor([0.3, 0.4]))  # within its own bound
    torch.testing.assert_close(approximator.grad, torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0)


def test_without_a_bound_gradients_stay_and_their_norm_is_that_of_all(model):
    model(torch.randn(2, 3, 16, 16)).loss.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    before = [p.grad.clone() for p in parameters]
    norm = clip_gradients(parameters, [], max_norm=None)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in before]).norm().item(), rel=1e-5)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))


def test_a_step_with_found_inf_leaves_weights_moments_and_step_count_untouched(model):
    optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for scale in (1.0, torch.nan):
        (model(torch.randn(2, 3, 16, 16)).loss * scale).backward()
        before = [p.clone() for p in model.parameters()]
        moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(scale != 1.0))
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert any(moved) == (scale == 1.0)
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments, strict=True))
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


def classifier(depth: int, pooling: str = "cls") -> MIMAEForImageClassification:
    """A small one of this many blocks."""
    sizes = {**TINY, "num_hidden_layers": depth}
    return MIMAEForImageClassification(MIMAEConfig(**sizes, num_labels=10, classifier_pooling=pooling))


def by_name(groups: list[dict], key: str) -> dict[str, float]:
    """One value of each group, by the names of its parameters."""
    named = [(name, group[key]) for group in groups for name, _ in group["params"]]
    assert len(named) == len(dict(named)), "a parameter is in two groups"
    return dict(named)


def timm_name(name: str) -> str:
    """Where timm's VisionTransformer has this parameter."""
    replacements = {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "vit.layers": "blocks",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "vit.layernorm": "norm",
        "classifier": "head",
    }
    for ours, theirs in replacements.items():
        name = name.replace(ours, theirs)
    return re.sub(r"attention\.[qkv]_proj", "attn.qkv", name)


@pytest.mark.parametrize(("depth", "pooling", "timm_pooling"), [(2, "cls", "token"), (12, "mean", "avg")])
def test_layer_decay_scales_equal_timms_but_for_the_last_norm(depth, pooling, timm_pooling):
    groups = layer_decay_groups(classifier(depth, pooling), weight_decay=0.05, layer_decay=0.65)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": depth, "num_heads": 4, "num_classes": 10}
    reference = VisionTransformer(**sizes, global_pool=timm_pooling)
    timm_groups = param_groups_layer_decay(
        reference, 0.05, no_weight_decay_list=["cls_token", "pos_embed"], layer_decay=0.65
    )
    timm_group_of = {id(p): group for group in timm_groups for p in group["params"]}
    theirs = {name: timm_group_of[id(p)] for name, p in reference.named_parameters()}
    scales, decays = by_name(groups, "lr_scale"), by_name(groups, "weight_decay")
    for name, scale in scales.items():
        expected = theirs[timm_name(name)]
        if name.startswith("vit.layernorm."):
            assert (scale, expected["lr_scale"]) == (1.0, pytest.approx(0.65))
        else:
            assert scale == pytest.approx(expected["lr_scale"], rel=1e-12), name
        assert decays[name] == expected["weight_decay"], name
    assert {timm_name(name) for name in scales} == set(theirs)


def test_layer_decay_of_a_base_model_has_the_official_maes_scales():
    scales = by_name(layer_decay_groups(classifier(12), weight_decay=0.05, layer_decay=0.75), "lr_scale")
    expected = {
        "vit.embeddings.cls_token": 0.75**13,
        "vit.embeddings.position_embeddings": 0.75**13,
        "vit.embeddings.patch_embeddings.projection.weight": 0.023757264018058777,  # 0.75 ** 13
        "vit.layers.0.attention.q_proj.weight": 0.03167635202407837,  # 0.75 ** 12
        "vit.layers.10.mlp.fc1.bias": 0.75**2,
        "vit.layers.11.mlp.fc2.weight": 0.75,
        "vit.layernorm.weight": 1.0,
        "classifier.weight": 1.0,
    }
    assert {name: scales[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def official_swin_layer(name: str, depths: list[int]) -> int:
    """microsoft/SimMIM optimizer.py, `get_swin_layer`, in words: over transformers' names."""
    if name.startswith("swin.embeddings."):
        return 0
    if (block := re.match(r"swin\.encoder\.layers\.(\d+)\.blocks\.(\d+)\.", name)) is not None:
        return sum(depths[: int(block[1])]) + int(block[2]) + 1
    if (downsampling := re.match(r"swin\.encoder\.layers\.(\d+)\.downsample\.", name)) is not None:
        return sum(depths[: int(downsampling[1]) + 1])
    return sum(depths) + 1


def test_layer_decay_of_a_swin_has_the_official_simmims_layers():
    depths = [2, 1, 3]
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "num_heads": [1, 2, 4], "window_size": 2}
    config = MISimMIMConfig(**sizes, depths=depths, encoder_stride=8, mask_patch_size=8)
    groups = layer_decay_groups(MISimMIMForImageClassification(config), weight_decay=0.05, layer_decay=0.8)
    scales, decays = by_name(groups, "lr_scale"), by_name(groups, "weight_decay")
    assert {official_swin_layer(name, depths) for name in scales} == set(range(8))
    for name, scale in scales.items():
        assert scale == pytest.approx(0.8 ** (7 - official_swin_layer(name, depths)), rel=1e-12), name
        is_exempt = name.endswith((".bias", "relative_position_bias_table")) or "norm" in name
        assert decays[name] == (0.0 if is_exempt else 0.05), name


def test_every_trainable_parameter_has_one_layer_and_frozen_ones_none():
    model = classifier(2)
    model.vit.layers[0].requires_grad_(False)
    scales = by_name(layer_decay_groups(model, weight_decay=0.05, layer_decay=0.75), "lr_scale")
    assert set(scales) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("vit.layers.0.") for name in scales)
    assert scales["vit.layers.1.mlp.fc1.weight"] == pytest.approx(0.75)  # frozen blocks still count as depth


def test_the_class_token_positions_and_vectors_do_not_decay():
    model = classifier(2)
    decays = by_name(layer_decay_groups(model, weight_decay=0.05, layer_decay=0.75), "weight_decay")
    for name, parameter in model.named_parameters():
        is_vector = parameter.ndim <= 1 or name.endswith(("cls_token", "position_embeddings"))
        assert decays[name] == (0.0 if is_vector else 0.05), name


def test_a_layer_decay_of_1_leaves_two_groups():
    groups = layer_decay_groups(classifier(2), weight_decay=0.05, layer_decay=1.0)
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1.0, 0.0), (1.0, 0.05)]


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.5, math.nan])
def test_a_layer_decay_out_of_range_is_refused(layer_decay):
    with pytest.raises(ValueError, match="layer_decay"):
        layer_decay_groups(classifier(1), weight_decay=0.05, layer_decay=layer_decay)


def test_groups_keep_their_ratio_along_the_schedule_with_the_final_learning_rate_scaled_too():
    optimizer = build_finetuning_adamw(classifier(2), learning_rate=1e-3, weight_decay=0.05, layer_decay=0.5)
    schedule = WarmupCosine(peak=1e-3, final=1e-6, warmup_steps=2, total_steps=6)
    scheduler = schedule_as_lambda(optimizer, schedule)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert scales == sorted(scales, reverse=True)
    assert set(scales) == {1.0, 0.5, 0.25, 0.125}
    for step in range(7):
        assert scheduler.get_last_lr() == pytest.approx([schedule(step) * scale for scale in scales], rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([1e-6 * scale for scale in scales])


def test_the_first_step_of_a_scaled_group_is_scaled():
    model = classifier(1)
    optimizer = build_finetuning_adamw(model, learning_rate=1e-2, weight_decay=0.0, layer_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # Adam's first step is the learning rate, whatever the gradient
    for name, expected in {
        "vit.embeddings.cls_token": 2.5e-3,
        "vit.layers.0.mlp.fc1.weight": 5e-3,
        "vit.layernorm.weight": 1e-2,
        "classifier.bias": 1e-2,
    }.items():
        step = before[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(step, torch.full_like(step, expected), rtol=1e-3, atol=0)


def test_milestones_that_never_come_are_told(caplog):
    common = {"peak": 1.0, "warmup_steps": 2, "total_steps": 10, "gamma": 0.1}
    assert [WarmupMultiStep(**common, milestones=(4, 8))(step) for step in (3, 4, 8)] == pytest.approx([1, 0.1, 0.01])
    assert not caplog.records
    WarmupMultiStep(**common, milestones=(1, 4, 10))
    assert "[1, 10]" in caplog.text


def segmenter(**fields) -> UperNet:
    """UperNet on a small backbone of four blocks."""
    config = MIMAEConfig(**{**TINY, "num_hidden_layers": 4}, add_fpn=True, **fields)
    return build_upernet(MIMAEBackbone(config), id2label=dict(enumerate("abc")), channels=8, auxiliary_channels=8)


def test_of_a_dense_model_the_backbones_blocks_decay_and_pyramid_and_heads_do_not():
    model = segmenter(use_relative_position_bias=True)
    assert isinstance(model.backbone, MIMAEBackbone)
    groups = layer_decay_groups(model, weight_decay=0.05, layer_decay=0.5)
    scales, decays = by_name(groups, "lr_scale"), by_name(groups, "weight_decay")
    assert set(scales) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, scale in scales.items():
        block = re.match(r"backbone\.layers\.(\d+)\.", name)
        layer = 0 if name.startswith("backbone.embeddings.") else int(block[1]) + 1 if block else 5
        assert scale == 0.5 ** (5 - layer), name
    assert scales["backbone.fpn.0.0.weight"] == scales["decode_head.classifier.weight"] == 1.0
    exempt = ("cls_token", "position_embeddings", "relative_position_bias.table", "relative_position_bias.class_token")
    for name, parameter in model.named_parameters():
        assert decays[name] == (0.0 if parameter.ndim <= 1 or name.endswith(exempt) else 0.05), name


@pytest.mark.parametrize("power", [1.0, 0.9])
def test_poly_falls_by_the_power_of_what_is_left_to_the_end(power):
    schedule = WarmupPolynomial(peak=2.0, final=0.5, power=power, warmup_steps=10, total_steps=110)
    assert [schedule(step) for step in (0, 5, 10, 110, 120)] == pytest.approx([0.0, 1.0, 2.0, 0.5, 0.5])
    expected = [0.5 + 1.5 * (1 - (step - 10) / 100) ** power for step in range(10, 110)]
    assert [schedule(step) for step in range(10, 110)] == pytest.approx(expected)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    reference = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=100, power=power)
    without_final = WarmupPolynomial(peak=2.0, power=power, warmup_steps=0, total_steps=100)
    for step in range(100):
        assert without_final(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()
