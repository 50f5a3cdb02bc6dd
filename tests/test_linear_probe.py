"""The linear probe: LARS against the official MAE's rule, heads that do not see each other, an encoder that rests."""

import math

import numpy as np
import pytest
import torch
from references import TINY
from transformers import EvalPrediction

from mimae import MIMAEConfig, MIMAEModel
from mimae.training.linear_probe import LinearProbe, build_probe_lars, metrics_of_heads
from mimae.training.optimization import WarmupCosine, scaled_learning_rate, schedule_as_lambda

RATES = (0.5, 2.0, 6.4)
NUM_CLASSES = 5


def build(rates: tuple[float, ...] = RATES, pooling: str = "cls") -> LinearProbe:
    """The same encoder and the same heads each time."""
    torch.manual_seed(0)
    encoder = MIMAEModel(MIMAEConfig(**TINY, latent_pooling=pooling))
    return LinearProbe(encoder, feature_size=32, num_classes=NUM_CLASSES, learning_rates=rates)


def batches(number: int, size: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(size, 3, 16, 16, generator=generator),
            "labels": torch.randint(NUM_CLASSES, (size,), generator=generator),
        }
        for _ in range(number)
    ]


def train(probe: LinearProbe, number: int) -> LinearProbe:
    """LARS along a warm-up and a half-cosine."""
    optimizer = build_probe_lars(probe)
    scheduler = schedule_as_lambda(optimizer, WarmupCosine(peak=1.0, final=0.0, warmup_steps=3, total_steps=number))
    probe.train()
    for batch in batches(number):
        probe(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return probe


def official_lars(parameter, gradient, momentum, learning_rate):
    """One step of facebookresearch/mae util/lars.py at weight decay 0: the new parameter and momentum."""
    if parameter.ndim > 1:
        parameter_norm, gradient_norm = parameter.norm(), gradient.norm()
        if parameter_norm > 0 and gradient_norm > 0:
            gradient = gradient * (0.001 * parameter_norm / gradient_norm)
    momentum = 0.9 * momentum + gradient
    return parameter - learning_rate * momentum, momentum


def test_lars_steps_equal_the_official_maes_along_a_schedule():
    probe, steps = build().train(), 8
    optimizer = build_probe_lars(probe)
    schedule = WarmupCosine(peak=1.0, final=0.0, warmup_steps=3, total_steps=steps)
    scheduler = schedule_as_lambda(optimizer, schedule)
    with torch.no_grad():
        probe.heads[1].weight.zero_()  # without a norm there is no ratio
    parameters = [p.detach().clone() for head in probe.heads for p in (head.weight, head.bias)]
    momenta = [torch.zeros_like(p) for p in parameters]
    for step, batch in enumerate(batches(steps)):
        probe(**batch).loss.backward()
        gradients = [p.grad.clone() for head in probe.heads for p in (head.weight, head.bias)]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        for i, gradient in enumerate(gradients):
            rate = RATES[i // 2] * schedule(step)
            parameters[i], momenta[i] = official_lars(parameters[i], gradient, momenta[i], rate)
        actual = [p.detach() for head in probe.heads for p in (head.weight, head.bias)]
        torch.testing.assert_close(actual, parameters, rtol=1e-5, atol=1e-7)
    assert not torch.equal(actual[0], build().heads[0].weight)


def test_a_first_step_of_lars_has_its_hand_value():
    probe = build((2.0,))
    optimizer = build_probe_lars(probe)
    head = probe.heads[0]
    with torch.no_grad():
        head.weight.fill_(0.5)
    head.weight.grad, head.bias.grad = torch.full_like(head.weight, 8.0), torch.full_like(head.bias, 8.0)
    optimizer.step()
    # weight: lr · trust · ‖w‖ / ‖g‖ · g = 2 · 0.001 · 0.5 / 8 · 8; bias: lr · g
    torch.testing.assert_close(head.weight.detach(), torch.full_like(head.weight, 0.5 - 1e-3))
    torch.testing.assert_close(head.bias.detach(), torch.full_like(head.bias, -16.0))


def test_a_gradient_of_zero_moves_nothing():
    probe = build()
    before = [p.detach().clone() for p in probe.heads.parameters()]
    optimizer = build_probe_lars(probe)
    for parameter in probe.heads.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(probe.heads.parameters(), before, strict=True))


def test_heads_trained_at_once_equal_heads_trained_alone():
    together = train(build(), 6)
    for rate, head in zip(RATES, together.heads, strict=True):
        alone = train(build((rate,)), 6)
        torch.testing.assert_close(head.weight, alone.heads[0].weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(head.bias, alone.heads[0].bias, rtol=0, atol=1e-6)
        torch.testing.assert_close(together.norm.running_var, alone.norm.running_var)
    assert (together.heads[0].weight - together.heads[2].weight).abs().max() > 3e-4  # or equality would say nothing


def test_all_heads_start_from_the_same_weights_of_std_001():
    probe = LinearProbe(MIMAEModel(MIMAEConfig(**TINY)), feature_size=32, num_classes=1000, learning_rates=RATES)
    first = probe.heads[0].weight
    assert all(torch.equal(head.weight, first) for head in probe.heads)
    assert all(torch.all(head.bias == 0) for head in probe.heads)
    assert first.std().item() == pytest.approx(0.01, rel=0.02)
    assert len({head.weight.data_ptr() for head in probe.heads}) == len(RATES)  # equal, not shared


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_logits_are_those_of_the_normalised_features(pooling):
    probe = build(pooling=pooling).train()
    pixel_values = batches(1)[0]["pixel_values"]
    with torch.no_grad():
        tokens = probe.encoder.encode(pixel_values).last_hidden_state
        features = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1)
        normalised = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
        expected = normalised @ probe.heads[1].weight.T
        torch.testing.assert_close(probe(pixel_values).logits[:, 1], expected, rtol=1e-4, atol=1e-6)


def test_the_encoder_never_moves_and_stays_in_evaluation_mode():
    probe = build()
    before = {name: p.clone() for name, p in probe.encoder.state_dict().items()}
    train(probe, 3)
    assert probe.training
    assert probe.norm.training
    assert not any(module.training for module in probe.encoder.modules())
    assert all(p.grad is None and not p.requires_grad for p in probe.encoder.parameters())
    assert all(torch.equal(p, before[name]) for name, p in probe.encoder.state_dict().items())
    optimized = [p for group in build_probe_lars(probe).param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in probe.parameters() if p.requires_grad}


def test_the_loss_is_the_sum_of_the_heads_over_images_that_have_a_label():
    probe, batch = build().eval(), batches(1, size=4)[0]
    batch["labels"][2:] = -100
    output = probe(**batch)
    log_probabilities = output.logits[:2].log_softmax(dim=-1)
    per_head = [
        -torch.stack([log_probabilities[b, k, batch["labels"][b]] for b in range(2)]).mean() for k in range(len(RATES))
    ]
    torch.testing.assert_close(output.loss, sum(per_head))


def test_a_batch_of_padding_alone_has_loss_0():
    probe, batch = build(), batches(1)[0]
    loss = probe(batch["pixel_values"], torch.full((8,), -100)).loss
    loss.backward()
    assert loss == 0
    assert all(torch.all(p.grad == 0) for p in probe.heads.parameters())


def test_the_state_dict_leaves_the_encoder_out_and_loads_strictly():
    probe = train(build(), 3)
    state = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    assert not any(name.startswith("encoder") for name in state)
    fresh = build()
    fresh.load_state_dict(state)
    batch = batches(1)[0]
    torch.testing.assert_close(fresh.eval()(**batch).logits, probe.eval()(**batch).logits, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"heads\.0\.weight"):
        fresh.load_state_dict({name: tensor for name, tensor in state.items() if name != "heads.0.weight"})


def test_one_head_folded_into_a_linear_layer_gives_the_same_logits():
    probe = train(build(), 5).eval()
    pixel_values = batches(1)[0]["pixel_values"]
    for k in range(len(RATES)):
        logits = probe.as_linear(k)(probe.features(pixel_values))
        torch.testing.assert_close(logits, probe(pixel_values).logits[:, k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rates", [(), (0.1, 0.0), (-1.0,), (0.1, 0.1)])
def test_learning_rates_that_make_no_sense_are_refused(rates):
    with pytest.raises(ValueError, match="learning_rates"):
        build(rates)


def test_base_learning_rate_01_is_64_at_a_batch_of_16384():
    assert scaled_learning_rate(0.1, 16384, 1, "images", 256) == pytest.approx(6.4)


def test_metrics_of_all_heads_are_reported_and_the_best_named():
    labels = np.array([0, 1, 2, 3])
    right = [[0, 0, 0, 0], [0, 1, 2, 0], [0, 1, 2, 0]]  # what each head says; the last two are equally good
    predictions = np.array(right).T[:, :, None]  # (n, K, 1)

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float(np.mean(prediction.predictions[:, 0] == prediction.label_ids))}

    metrics = metrics_of_heads(RATES, accuracy)(EvalPrediction(predictions=predictions, label_ids=labels))
    assert metrics == {
        "accuracy": 0.75,
        "best_learning_rate": 2.0,
        "accuracy_lr_0.5": 0.25,
        "accuracy_lr_2": 0.75,
        "accuracy_lr_6.4": 0.75,
    }


def test_a_probe_of_separable_features_learns_them():
    """The whole thing at work: classes that differ in the mean colour of their images."""
    probe = build((0.5, 6.4))
    optimizer = build_probe_lars(probe)
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(40) % 2
    pixel_values = 0.3 * torch.randn(40, 3, 16, 16, generator=generator) + (2.0 * labels - 1)[:, None, None, None]
    losses = []
    for _ in range(30):
        losses.append(probe.train()(pixel_values, labels).loss.item())
        probe(pixel_values, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(2 * math.log(NUM_CLASSES), rel=0.05)
    accuracy = (probe.eval()(pixel_values).logits.argmax(dim=-1) == labels[:, None]).float().mean(dim=0)
    assert accuracy[1] == 1
