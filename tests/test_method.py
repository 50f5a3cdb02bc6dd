"""What the method promises whatever the encoder: each test runs on MI-MAE (ViT) and on MI-SimMIM (Swin)."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from references import TINY, TINY_SWIN
from sklearn.datasets import load_digits
from transformers import PreTrainedModel, Trainer, TrainingArguments

from mimae import MIMAEConfig, MIMAEForPreTraining, MISimMIMConfig, MISimMIMForPreTraining

MODELS = {
    "mimae": (MIMAEConfig, MIMAEForPreTraining, TINY),
    "misimmim": (MISimMIMConfig, MISimMIMForPreTraining, TINY_SWIN),
}
# of both, at these sizes
NUM_UNITS = 16
TERMS = ("reconstruction_loss", "mi_max_loss", "mi_min_loss", "approximation_loss")
FIXED = ("position_embeddings", "decoder_pos_embed")
Build = Callable[..., PreTrainedModel]


@pytest.fixture(params=MODELS)
def build(request) -> Build:
    """Makes the small model of a family, with these fields of its configuration on top."""
    config_class, model_class, sizes = MODELS[request.param]
    return lambda **overrides: model_class(config_class(**{**sizes, **overrides}))


def images(num_images: int = 3, channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(num_images, channels, height, width)


# The terms, and who is moved by them


@pytest.mark.parametrize("threshold", [None, 1e-9])
def test_loss_is_equation_11_with_each_weight_applied_once(build, threshold):
    model = build(reconstruction_weight=0.5, mi_max_weight=0.25, mi_min_weight=7, mi_gate_threshold=threshold)
    output = model(images())
    gate = 1 if threshold is None else 0
    assert output.mi_active == gate
    information = 0.25 * output.mi_max_loss + 7 * output.mi_min_loss
    torch.testing.assert_close(output.objective, 0.5 * output.reconstruction_loss + gate * information)
    torch.testing.assert_close(output.loss, output.objective + output.approximation_loss)
    assert information.abs() > 0.1  # or the gate would not show


def gradients(model: PreTrainedModel, term: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a term by parameter, where it has any.

    Keys' biases are left out: softmax does not see them, and their gradient is 0 up to rounding.
    """
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.endswith("k_proj.bias")
    }
    grads = torch.autograd.grad(term, parameters.values(), retain_graph=True, allow_unused=True)
    pairs = zip(parameters, grads, strict=True)
    return {name: grad for name, grad in pairs if grad is not None and grad.abs().max() > 0}


def reachable(model: PreTrainedModel, *parts: str) -> set[str]:
    """Names that should be reached: the parameters of these parts, less fixed positions and the keys' biases."""
    prefixes = tuple(f"{model.base_model_prefix if part == 'encoder' else part}." for part in parts)
    return {
        name
        for name, _ in model.named_parameters()
        if name.startswith(prefixes) and not name.endswith((*FIXED, "k_proj.bias"))
    }


@pytest.mark.parametrize("unit", ["pooled", "token"])
@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("reconstruction_loss", ("encoder", "decoder")),
        ("mi_max_loss", ("encoder",)),
        ("mi_min_loss", ("encoder",)),
        ("approximation_loss", ("approximator",)),
        ("objective", ("encoder", "decoder")),
        ("loss", ("encoder", "decoder", "approximator")),
    ],
)
def test_each_term_reaches_exactly_its_own_parameters(build, term, parts, unit):
    model = build(mi_gate_threshold=None, approximator_unit=unit)
    assert gradients(model, model(images())[term]).keys() == reachable(model, *parts)


def test_one_backward_equals_the_three_of_algorithm_1(build):
    model = build(mi_gate_threshold=None)
    output = model(images())
    sets = {
        "encoder": output.reconstruction_loss + output.mi_max_loss + 10 * output.mi_min_loss,
        "decoder": output.reconstruction_loss,
        "approximator": output.approximation_loss,
    }
    expected = {}
    for part, term in sets.items():
        grads = gradients(model, term)
        expected |= {name: grads[name] for name in reachable(model, part)}
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_a_closed_gate_leaves_reconstruction_alone_to_move_the_encoder(build):
    model = build(mi_gate_threshold=1e-9)
    output = model(images())
    assert output.mi_active == 0
    expected = gradients(model, output.reconstruction_loss)
    moved = gradients(model, output.loss)
    for name in reachable(model, "encoder", "decoder"):
        torch.testing.assert_close(moved[name], expected[name], rtol=0, atol=0, msg=name)
    assert reachable(model, "approximator") <= moved.keys()  # V is fitted before the gate opens


def test_an_open_gate_changes_the_gradient_of_the_encoder_only(build):
    # negative control of the test above
    model = build(mi_gate_threshold=None)
    output = model(images())
    alone, moved = gradients(model, output.reconstruction_loss), gradients(model, output.loss)
    for name in reachable(model, "encoder"):
        assert not torch.allclose(alone[name], moved[name], rtol=0.05), name
    for name in reachable(model, "decoder"):
        assert torch.equal(alone[name], moved[name]), name


def test_an_untrained_approximator_is_frozen_and_its_loss_is_not_in_the_loss(build):
    model = build(train_approximator=False, mi_gate_threshold=None)
    output = model(images())
    assert not any(parameter.requires_grad for parameter in model.approximator.parameters())
    assert torch.equal(output.loss, output.objective)
    assert output.approximation_loss > 0  # still reported
    output.loss.backward()
    assert gradients(model, model(images()).mi_min_loss).keys() == reachable(model, "encoder")


@pytest.mark.parametrize("train_approximator", [True, False])
def test_what_is_fixed_stays_fixed_after_loading(tmp_path, build, train_approximator):
    model = build(train_approximator=train_approximator)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for again in (model, loaded):
        for name, parameter in again.named_parameters():
            fixed = name.endswith(FIXED) or (name.startswith("approximator.") and not train_approximator)
            assert parameter.requires_grad is not fixed, name
    encoder = type(model.base_model).from_pretrained(tmp_path)
    assert all(parameter.requires_grad is not name.endswith(FIXED) for name, parameter in encoder.named_parameters())


def test_no_approximator_is_built_where_nothing_is_minimised(build):
    model = build(mi_min_weight=0, mi_gate_threshold=None)
    assert model.approximator is None
    assert not any("approximator" in name for name in model.state_dict())
    output = model(images())
    assert output.mi_min_loss == output.approximation_loss == 0
    torch.testing.assert_close(output.loss, output.reconstruction_loss + output.mi_max_loss)


def test_negatives_cost_nothing_where_nothing_is_maximised(build):
    assert build(mi_max_weight=0)(images()).mi_max_loss == 0


# The gate in the model


def test_gate_opens_in_training_only_stays_open_and_survives_a_save(tmp_path, build):
    model = build(mi_gate_threshold=100.0)
    assert model.eval()(images()).mi_active == 0
    assert model.train()(images()).mi_active == 1
    model.mi_gate.threshold = 0.0
    assert model(images()).mi_active == 1
    assert model.eval()(images()).mi_active == 1

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.mi_gate.is_open == 1
    loaded.mi_gate.threshold = 0.0
    assert loaded.train()(images()).mi_active == 1


def test_behind_an_open_gate_the_terms_come_in_linearly(tmp_path, build):
    model = build(mi_gate_threshold=0.0, mi_ramp_steps=4)
    assert [model.train()(images()).mi_active.item() for _ in range(2)] == [0, 0]  # closed: nothing is counted
    model.mi_gate.threshold = 100.0
    outputs = [model(images()) for _ in range(3)]
    assert [output.mi_active.item() for output in outputs] == [0.25, 0.5, 0.75]
    for output in outputs:
        information = output.mi_max_loss + 10 * output.mi_min_loss
        torch.testing.assert_close(output.objective, output.reconstruction_loss + output.mi_active * information)

    assert model.eval()(images()).mi_active == 0.75  # only training moves it
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).to(torch.bfloat16).train()
    assert [loaded(images().bfloat16()).mi_active.item() for _ in range(2)] == [1, 1]


def test_a_ramp_without_a_threshold_begins_with_the_training(build):
    model = build(mi_gate_threshold=None, mi_ramp_steps=2)
    assert [model.train()(images()).mi_active.item() for _ in range(3)] == [0.5, 1, 1]


def test_a_gate_that_closes_begins_its_ramp_anew(build):
    model = build(mi_gate_threshold=100.0, mi_gate_mode="step", mi_ramp_steps=4).train()
    assert [model(images()).mi_active.item() for _ in range(2)] == [0.25, 0.5]
    model.mi_gate.threshold = 0.0
    assert model(images()).mi_active == 0
    model.mi_gate.threshold = 100.0
    assert model(images()).mi_active == 0.25


def test_a_closed_gate_survives_a_save(tmp_path, build):
    model = build()
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).mi_gate.is_open == 0


# Masks, precision, execution


@pytest.mark.parametrize("image_size", [16, (8, 24), (24, 8)])
def test_unpatchify_undoes_patchify(build, image_size):
    model = build(image_size=image_size, window_size=2)
    pixel_values = images(2, 3, *model.config.image_size_2d)
    assert torch.equal(model.unpatchify(model.patchify(pixel_values)), pixel_values)


def test_masks_of_drawn_noise_differ_between_calls_and_follow_the_seed(build):
    model, pixel_values = build(), images()
    torch.manual_seed(1)
    first, second = model(pixel_values), model(pixel_values)
    torch.manual_seed(1)
    assert torch.equal(first.mask, model(pixel_values).mask)
    assert not torch.equal(first.mask, second.mask)
    assert torch.all((1 - first.mask).sum(dim=1) == 1)  # drawn masks partition the image, too


def test_gradient_checkpointing_changes_no_loss_and_no_gradient(build):
    model = build(mi_gate_threshold=None)
    pixel_values, noise = images(), torch.rand(3, NUM_UNITS)
    plain = model(pixel_values, noise)
    plain.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    recomputed = []
    for name, module in model.named_modules():
        if name.endswith(".attention"):
            module.register_forward_pre_hook(lambda *_: recomputed.append(1))
    model.gradient_checkpointing_enable()
    checkpointed = model(pixel_values, noise)
    calls_forward = len(recomputed)
    checkpointed.loss.backward()
    assert len(recomputed) > calls_forward  # blocks ran again in the backward pass
    assert torch.equal(checkpointed.loss, plain.loss)
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_training_without_logits_learns_the_same(build):
    torch.manual_seed(0)
    model = build(mi_gate_threshold=None).double()
    pixel_values, noise = images().double(), torch.rand(3, *model.config.noise_shape)
    found = []
    for return_logits in (True, False):
        output = model(pixel_values, noise=noise, return_logits=return_logits)
        assert (output.logits is not None) == return_logits
        found.append((output.loss, gradients(model, output.loss)))
    (whole, of_whole), (masked, of_masked) = found
    torch.testing.assert_close(masked, whole, rtol=1e-12, atol=0)
    assert of_masked.keys() == of_whole.keys()
    for name, gradient in of_whole.items():
        torch.testing.assert_close(of_masked[name], gradient, rtol=1e-9, atol=1e-12)


def test_autocast_keeps_the_loss_terms_in_float32(build):
    model = build(mi_gate_threshold=None)
    pixel_values, noise = images(), torch.rand(3, NUM_UNITS)
    expected = model(pixel_values, noise)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values, noise)
    assert output.logits.dtype == torch.bfloat16  # autocast did act
    for name in (*TERMS, "loss", "objective"):
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name], expected[name], rtol=0.1, atol=0.05)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_loading_in_bfloat16_keeps_the_approximator_in_float32(tmp_path, build):
    build(mi_gate_threshold=None).save_pretrained(tmp_path)
    model = type(build()).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.approximator.parameters()} == {torch.float32}
    assert {p.dtype for part in (model.base_model, model.decoder) for p in part.parameters()} == {torch.bfloat16}
    output = model(images().bfloat16())
    assert output.loss.isfinite()
    for name in TERMS:
        assert output[name].dtype == torch.float32
    output.loss.backward()


@pytest.mark.parametrize("by_config", [True, False])
def test_return_dict_false_gives_tuples(build, by_config):
    model = build()
    pixel_values, noise = images(), torch.rand(3, NUM_UNITS)
    loss = model(pixel_values, noise).loss
    features = model.base_model(pixel_values).last_hidden_state
    if by_config:
        model.config.return_dict = False
    kwargs = {} if by_config else {"return_dict": False}
    as_tuple, encoder_tuple = model(pixel_values, noise, **kwargs), model.base_model(pixel_values, **kwargs)
    assert isinstance(as_tuple, tuple)
    assert isinstance(encoder_tuple, tuple)
    assert torch.equal(as_tuple[0], loss)
    assert torch.equal(encoder_tuple[0], features)


def test_compiles_as_one_graph(build):
    model = build(mi_gate_threshold=100.0)
    pixel_values, noise = images(), torch.rand(3, NUM_UNITS)
    expected = model(pixel_values, noise)
    expected.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.mi_gate.is_open.zero_()
    torch._dynamo.reset()

    output = torch.compile(model, fullgraph=True, backend="aot_eager")(pixel_values, noise)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.mi_active == model.mi_gate.is_open == 1  # the gate's state moves inside the graph
    for name, p in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-6, msg=name)


# What is refused


def test_images_of_another_size_are_refused_with_the_remedy(build):
    model = build()
    for call in (model, model.base_model):
        with pytest.raises(ValueError, match=r"24 x 16 .* 16 x 16.*interpolate_pos_encoding"):
            call(images(height=24))


@pytest.mark.parametrize("strategy", ["orthogonal", "independent"])
@pytest.mark.parametrize("shape", [(3, 15), (3, 17), (2, 16), (3, 3, 16), (3, 4, 15), (3, 2, 15), (16,)])
def test_noise_that_does_not_fit_is_refused(build, strategy, shape):
    with pytest.raises(ValueError, match="noise"):
        build(mask_strategy=strategy)(images(), noise=torch.rand(shape))


def test_noise_of_the_other_strategy_is_refused(build):
    # one permutation where the configuration declares independent masks would quietly train another ablation
    with pytest.raises(ValueError, match="noise"):
        build(mask_strategy="independent")(images(), noise=torch.rand(3, NUM_UNITS))
    num_views = build().config.num_views
    with pytest.raises(ValueError, match="noise"):
        build(mask_strategy="orthogonal")(images(), noise=torch.rand(3, num_views, NUM_UNITS))


# Training by the plain Trainer


class Digits(torch.utils.data.Dataset):
    """Digits of 8 x 8 pixels, each pixel doubled."""

    def __init__(self):
        pixels = load_digits().images[:128].astype(np.float32) / 8 - 1
        self.pixels = torch.from_numpy(pixels).unsqueeze(1).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index]}


def test_the_plain_trainer_trains_saves_and_evaluates(tmp_path, build):
    model = build(num_channels=1, norm_pix_loss=False, mi_gate_threshold=None)
    seen_by_metrics = []

    def compute_metrics(prediction) -> dict[str, float]:
        seen_by_metrics.append(prediction.predictions)
        return {"count": float(len(prediction.label_ids))}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=60,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=24,  # does not divide 128: the last batch is smaller
        learning_rate=1e-3,
        logging_steps=10,
        save_steps=60,
        report_to=[],
        disable_tqdm=True,
        label_names=["pixel_values"],  # as in transformers' own MIM examples: this is what asks for a loss
    )
    data = Digits()
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=compute_metrics)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert after["eval_loss"] < before
    assert after["eval_count"] == 128
    assert len(seen_by_metrics) == 2

    loaded = type(model).from_pretrained(tmp_path / "checkpoint-60").eval()
    pixel_values, noise = data.pixels[:4], torch.rand(4, NUM_UNITS)
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values, noise).loss, model.eval()(pixel_values, noise).loss)
