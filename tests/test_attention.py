"""The attention by plain products: the same function as torch's, and taken where it is the faster one."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from runs import TINY_MODEL, TINY_SWIN_MODEL, pretrain, series
from torch.autograd.graph import saved_tensors_hooks

from mimae import MIMAEForPreTraining
from mimae.training.attention import MATMUL, default_attention, matmul_attention, multiplies_bfloat16

needs_bfloat16 = pytest.mark.skipif(not multiplies_bfloat16(), reason="needs a CPU with avx512_bf16")


def tokens(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value of 3 images, 2 heads, 5 or 7 tokens of 8 features, laid out as in a model."""
    return [torch.randn(3, length, 2, 8, dtype=dtype).transpose(1, 2).requires_grad_() for length in (5, 7, 7)]


def output_and_grads(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, weights)]


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("mask_shape", [None, (1, 2, 5, 7), (3, 1, 5, 7)])
def test_matmul_attention_and_its_gradients_are_those_of_torch(mask_shape, scaling):
    query, key, value = tokens()
    mask = None if mask_shape is None else torch.randn(mask_shape, requires_grad=True)
    inputs = [x for x in (query, key, value, mask) if x is not None]
    output, probabilities = matmul_attention(None, query, key, value, mask, scaling=scaling)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling).transpose(1, 2)
    assert probabilities is None
    assert output.is_contiguous()
    for ours, theirs in zip(output_and_grads(output, *inputs), output_and_grads(expected, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask_dtype", [None, torch.float32, torch.bfloat16])
def test_matmul_attention_in_bfloat16_is_that_of_float64_to_rounding(mask_dtype):
    inputs = tokens(torch.bfloat16)
    mask = None if mask_dtype is None else torch.randn(1, 2, 5, 7).bfloat16()
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=None if mask is None else mask.double())
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = matmul_attention(None, *inputs, mask if mask is None else mask.to(mask_dtype))
    assert output.dtype == torch.bfloat16
    for ours, exact in zip(
        output_and_grads(output, *inputs), output_and_grads(expected.transpose(1, 2), *wide), strict=True
    ):
        assert (ours - exact).norm() < 2**-6 * exact.norm()


def test_nothing_wide_is_kept_for_the_backward_pass_under_autocast():
    # autocast would widen the softmax to float32: twice the memory, and slower
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.dtype)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda tensor: tensor):
        matmul_attention(None, *tokens(torch.bfloat16), torch.zeros(5, 7))
    assert set(kept) == {torch.bfloat16}


def test_masked_tokens_are_not_attended_to():
    query, key, value = tokens()
    mask = torch.zeros(1, 1, 5, 7)
    mask[..., 4:] = -math.inf
    output, _ = matmul_attention(None, query, key, value, mask)
    expected, _ = matmul_attention(None, query, key[:, :, :4], value[:, :, :4], None)
    torch.testing.assert_close(output, expected)


def test_a_boolean_mask_is_refused():
    with pytest.raises(ValueError, match=r"torch\.bool is for sdpa"):
        matmul_attention(None, *tokens(), torch.ones(5, 7, dtype=torch.bool))


def test_dropout_drops_probabilities_and_keeps_their_mean():
    query, key, _ = tokens()
    ones = torch.ones(3, 2, 7, 1000)  # an output is the sum of what is left of a row
    output, _ = matmul_attention(None, query, key, ones, None, dropout=0.25)
    assert (output[..., :1] == output).all()  # of a row, not of a feature
    torch.manual_seed(0)
    sums = torch.stack([matmul_attention(None, query, key, ones[..., :1], None, dropout=0.25)[0] for _ in range(2000)])
    torch.testing.assert_close(sums.mean(dim=0), torch.ones(3, 5, 2, 1), rtol=0, atol=0.05)
    assert sums.std() > 0.1


def test_matmul_attention_is_one_graph():
    inputs = tokens(torch.bfloat16)
    compiled = torch.compile(matmul_attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = (attend(None, *inputs, None)[0] for attend in (compiled, matmul_attention))
    for ours, theirs in zip(output_and_grads(output, *inputs), output_and_grads(expected, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


# The choice


def test_only_a_cpu_in_bfloat16_gets_matmul_attention():
    expected = MATMUL if multiplies_bfloat16() else None
    assert default_attention(torch.device("cpu"), "bf16") == expected
    for device, precision in [("cpu", "no"), ("cpu", "fp16"), ("cuda", "bf16"), ("mps", "bf16")]:
        assert default_attention(torch.device(device), precision) is None


def test_a_cpu_without_instructions_for_bfloat16_keeps_the_choice_of_transformers(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert default_attention(torch.device("cpu"), "bf16") is None


@pytest.fixture
def new_precision():
    """accelerate lets a process have one precision; here others come before and after."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def attention_of_run(folder, capsys, **values) -> str:
    """Trains for two steps and returns the attention that the log names."""
    assert pretrain(folder, max_train_steps=2, probe_samples=0, **values) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "attention: " in line]
    assert all(math.isfinite(loss) for loss in series(folder, "loss").values())
    assert MATMUL not in (folder / "config.json").read_text()
    return line.split("attention: ")[1]


@needs_bfloat16
@pytest.mark.parametrize("model", [TINY_MODEL, TINY_SWIN_MODEL], ids=["vit", "swin"])
def test_a_run_in_bfloat16_on_a_cpu_trains_with_matmul_attention_and_a_warm_start_too(
    model, new_precision, tmp_path, capsys
):
    values = {"model": model, "mixed_precision": "bf16"}
    assert attention_of_run(tmp_path / "run", capsys, **values) == MATMUL
    warm = {**values, "model_name_or_path": tmp_path / "run"}
    assert attention_of_run(tmp_path / "warm", capsys, **warm) == MATMUL


def test_a_run_takes_the_attention_that_its_user_names(new_precision, tmp_path, capsys):
    values = {"mixed_precision": "bf16", "attn_implementation": "sdpa"}
    assert attention_of_run(tmp_path / "run", capsys, **values) == "sdpa"


def test_a_run_in_float32_has_the_attention_of_transformers(new_precision, tmp_path, capsys):
    assert attention_of_run(tmp_path / "run", capsys, mixed_precision="no") == "sdpa"
    assert MIMAEForPreTraining.from_pretrained(tmp_path / "run").config._attn_implementation == "sdpa"
