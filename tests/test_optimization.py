"""Learning rate, parameter groups, clipping, and the step that is skipped, against hand values."""

import math

import pytest
import torch

from mimae import MIMAEConfig, MIMAEForPreTraining
from mimae.training.optimization import (
    WarmupCosine,
    build_adamw,
    clip_gradients,
    parameter_names,
    scaled_learning_rate,
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
