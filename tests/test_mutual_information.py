"""The information terms against loops over their formulas, closed forms, torch.distributions, and their properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from references import TINY, club_by_loops, gaussian_log_likelihood, info_nce_by_loops
from torch import distributions
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mimae import MIMAEConfig, MIMAEForPreTraining, mutual_information
from mimae.mutual_information import (
    GaussianApproximator,
    InformationGate,
    club_upper_bound,
    gather_views,
    gaussian_negative_log_likelihood,
    info_nce_loss,
    information_terms,
    mean_over_processes,
)

TEMPERATURE = 0.07


def gaussians(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, dtype=dtype), 0.1 + torch.rand(shape, dtype=dtype)


# Eq. 7-8


@pytest.mark.parametrize(("num_images", "num_views"), [(1, 2), (1, 4), (3, 2), (3, 4), (2, 6)])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_info_nce_is_the_double_loop_over_pairs(num_images, num_views, temperature):
    views = torch.randn(num_images, num_views, 8)
    expected = info_nce_by_loops(views.double(), temperature)
    torch.testing.assert_close(info_nce_loss(views, temperature).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_images", "num_views"), [(1, 2), (3, 2), (5, 4), (2, 8)])
def test_info_nce_of_equal_features_is_the_log_of_the_other_views(num_images, num_views):
    loss = info_nce_loss(torch.ones(num_images, num_views, 8), TEMPERATURE)
    expected = (num_views - 1) / num_views * math.log(num_views * num_images - 1)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("num_images", "num_views"), [(3, 2), (5, 4), (2, 8)])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_info_nce_of_identical_views_and_orthogonal_images_has_a_closed_form(num_images, num_views, temperature):
    views = torch.eye(8)[:num_images].unsqueeze(1).expand(-1, num_views, -1)
    negatives = (num_views - 1) + (num_images - 1) * num_views * math.exp(-1 / temperature)
    expected = (num_views - 1) / num_views * math.log(negatives)
    assert info_nce_loss(views, temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_info_nce_of_four_perfect_views_stays_above_zero():
    # the other positives stay in the denominator: 3/4 · ln 3
    perfect = torch.eye(8).unsqueeze(1)
    assert info_nce_loss(perfect.expand(-1, 4, -1), TEMPERATURE).item() == pytest.approx(0.824, abs=1e-3)
    assert info_nce_loss(perfect.expand(-1, 2, -1), TEMPERATURE).item() == pytest.approx(0, abs=1e-4)


def test_info_nce_of_one_view_is_zero():
    assert info_nce_loss(torch.randn(5, 1, 8), TEMPERATURE) == 0


def test_info_nce_ignores_the_scale_of_the_features():
    views = torch.randn(3, 4, 8)
    scales = 0.1 + 10 * torch.rand(3, 4, 1)
    torch.testing.assert_close(info_nce_loss(views * scales, TEMPERATURE), info_nce_loss(views, TEMPERATURE))


def test_info_nce_survives_a_zero_feature():
    views = torch.randn(3, 4, 8)
    views[0, 0] = 0
    views.requires_grad_()
    loss = info_nce_loss(views, TEMPERATURE)
    loss.backward()
    assert loss.isfinite()
    assert views.grad.isfinite().all()


@pytest.mark.parametrize("num_processes", [2, 3])
def test_info_nce_averaged_over_processes_is_that_of_the_global_batch(num_processes):
    whole = torch.randn(6, 4, 8, requires_grad=True)
    expected = info_nce_loss(whole, TEMPERATURE)
    (expected_grad,) = torch.autograd.grad(expected, whole)

    losses = [info_nce_loss(part, TEMPERATURE, whole, r) for r, part in enumerate(whole.chunk(num_processes))]
    loss = sum(losses) / num_processes
    (grad,) = torch.autograd.grad(loss, whole)

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_info_nce_gradient_needs_the_gathered_views():
    # negative control: with other processes' views detached, the averaged gradient is another one
    whole = torch.randn(6, 4, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(info_nce_loss(whole, TEMPERATURE), whole)
    losses = [info_nce_loss(part, TEMPERATURE, whole.detach(), rank) for rank, part in enumerate(whole.chunk(2))]
    (grad,) = torch.autograd.grad(sum(losses) / 2, whole)
    assert (grad - expected).abs().max() > 0.01 * expected.abs().max()


def test_info_nce_is_float32_under_autocast():
    views = torch.randn(8, 4, 16)
    expected = info_nce_loss(views, TEMPERATURE)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce_loss(views, TEMPERATURE)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


# Eq. 7-8 of more views than fit into memory at once


class Sizes(TorchDispatchMode):
    """Entries of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *made])
        return result


def entries_of(views: torch.Tensor) -> tuple[int, int]:
    """What the loss and its gradient make: the largest tensor, and the sum of what is kept for the backward pass."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with Sizes() as sizes:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = info_nce_loss(views, TEMPERATURE)
        loss.backward()
    return sizes.largest, sum(kept.values())


@pytest.fixture
def rows_of(monkeypatch):
    """Has the similarity of so many columns computed so many rows at a time."""
    return lambda num_rows, num_columns: monkeypatch.setattr(
        mutual_information, "MAX_SIMILARITIES", num_rows * num_columns + num_columns - 1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 5, 6, 11])  # of 12: even chunks, and a last one of 2 rows or of 1
def test_info_nce_by_rows_is_the_double_loop_over_pairs(num_rows, dtype, rows_of):
    views = torch.randn(3, 4, 8, dtype=dtype, requires_grad=True)
    expected = info_nce_by_loops(views.double(), TEMPERATURE)
    (expected_grad,) = torch.autograd.grad(expected, views)
    rows_of(num_rows, 12)
    loss = info_nce_loss(views, TEMPERATURE)
    (grad,) = torch.autograd.grad(loss, views)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_info_nce_by_rows_of_gathered_views_is_that_of_the_whole_similarity(rank, rows_of):
    whole = torch.randn(9, 4, 8, requires_grad=True)

    def loss_and_grad() -> tuple[torch.Tensor, torch.Tensor]:
        loss = info_nce_loss(whole[3 * rank : 3 * rank + 3], TEMPERATURE, whole, rank)
        return loss, *torch.autograd.grad(loss, whole)

    expected = loss_and_grad()
    rows_of(5, 36)
    torch.testing.assert_close(loss_and_grad(), expected)


def test_info_nce_by_rows_is_float32_under_autocast(rows_of):
    views = torch.randn(3, 4, 8, requires_grad=True)
    rows_of(5, 12)
    expected = info_nce_loss(views, TEMPERATURE)
    (expected_grad,) = torch.autograd.grad(expected, views)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce_loss(views, TEMPERATURE)
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, views)[0], expected_grad)


def test_info_nce_never_makes_nor_keeps_more_than_its_bound(rows_of):
    views = torch.randn(32, 4, 2, requires_grad=True)
    bound = 16 * 128
    largest, kept = entries_of(views)
    assert largest == 128 * 128  # without need, all at once
    assert kept > largest
    rows_of(16, 128)
    largest, kept = entries_of(views)
    assert largest == bound
    assert kept < bound


def test_a_similarity_of_just_the_bound_is_computed_at_once(monkeypatch):
    monkeypatch.setattr(mutual_information, "MAX_SIMILARITIES", 12 * 12)
    largest, kept = entries_of(torch.randn(3, 4, 2, requires_grad=True))
    assert kept > largest == 12 * 12


@pytest.mark.parametrize("num_rows", [5, 12])
def test_info_nce_is_one_graph(num_rows, rows_of):
    views = torch.randn(3, 4, 8, requires_grad=True)
    rows_of(num_rows, 12)
    expected, loss = (
        f(views, TEMPERATURE)
        for f in (info_nce_loss, torch.compile(info_nce_loss, fullgraph=True, backend="aot_eager"))
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, views)[0] for value in (loss, expected)))


# Eq. 9 and 33


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_approximation_loss_is_the_negative_log_likelihood(reduction):
    latent = torch.randn(3, 4, 8, dtype=torch.float64)
    mean, variance = gaussians(3, 4, 8)
    log_prob = distributions.Normal(mean, variance.sqrt()).log_prob(latent)
    expected = -(log_prob.mean() if reduction == "mean" else log_prob.sum(dim=-1).mean())
    loss = gaussian_negative_log_likelihood(latent, mean, variance, reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_approximation_loss_by_token_is_the_mean_over_the_tokens():
    latent = torch.randn(2, 3, 8, dtype=torch.float64)
    mean, variance = gaussians(2, 3, 5, 8)
    terms = [
        gaussian_log_likelihood(latent[b, j], mean[b, j, v], variance[b, j, v])
        for b in range(2)
        for j in range(3)
        for v in range(5)
    ]
    loss = gaussian_negative_log_likelihood(latent, mean, variance)
    torch.testing.assert_close(loss, -torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


def test_approximation_loss_is_least_at_the_moments_of_the_latent():
    latent = 2 + 3 * torch.randn(50, 4, 1)
    mean, variance = latent.mean().expand_as(latent), latent.var(unbiased=False).expand_as(latent)
    best = gaussian_negative_log_likelihood(latent, mean, variance)
    for other_mean, other_variance in [(mean + 0.5, variance), (mean, 1.5 * variance), (mean, variance / 1.5)]:
        assert gaussian_negative_log_likelihood(latent, other_mean, other_variance) > best


# Eq. 10 and 34


@pytest.mark.parametrize("num_views", [2, 4])
def test_club_is_the_double_loop_over_masks(num_views):
    latent = torch.randn(3, num_views, 8, dtype=torch.float64)
    mean, variance = gaussians(3, num_views, 8)
    expected = club_by_loops(latent, mean, variance)
    torch.testing.assert_close(club_upper_bound(latent, mean, variance).double(), expected, rtol=1e-5, atol=1e-6)


def test_club_by_token_is_the_mean_over_the_tokens():
    latent = torch.randn(2, 3, 8, dtype=torch.float64)
    mean, variance = gaussians(2, 3, 5, 8)
    per_token = [club_by_loops(latent, mean[:, :, v], variance[:, :, v]) for v in range(5)]
    bound = club_upper_bound(latent, mean, variance)
    torch.testing.assert_close(bound.double(), torch.stack(per_token).mean(), rtol=1e-5, atol=1e-6)


def test_club_with_a_shared_variance_is_the_covariance_of_latent_and_mean():
    latent = torch.randn(5, 4, 8, dtype=torch.float64)
    mean, variance = gaussians(5, 4, 8)
    shared = variance[:, :1].expand_as(mean)
    covariance = (latent * mean).mean(dim=1) - latent.mean(dim=1) * mean.mean(dim=1)  # (B, D), over the masks
    expected = (covariance / variance[:, 0]).mean()
    torch.testing.assert_close(club_upper_bound(latent, mean, shared).double(), expected, rtol=1e-4, atol=1e-5)


def test_club_with_a_shared_variance_is_linear_in_the_latent():
    latent, other = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    mean, variance = gaussians(3, 4, 8)
    shared = variance[:, :1].expand_as(mean)
    together = club_upper_bound(2 * latent - 3 * other, mean, shared)
    apart = 2 * club_upper_bound(latent, mean, shared) - 3 * club_upper_bound(other, mean, shared)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_club_is_affine_in_the_mean_for_any_variance():
    latent = torch.randn(3, 4, 8, dtype=torch.float64)
    mean, variance = gaussians(3, 4, 8)
    other = torch.randn_like(mean)
    together = club_upper_bound(latent, mean + other, variance) + club_upper_bound(latent, 0 * mean, variance)
    apart = club_upper_bound(latent, mean, variance) + club_upper_bound(latent, other, variance)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_club_is_zero_for_one_view_and_for_equal_views():
    mean, variance = gaussians(3, 4, 8)
    assert club_upper_bound(torch.randn(3, 1, 8), mean[:, :1], variance[:, :1]) == 0
    equal = torch.randn(3, 1, 8).expand(-1, 4, -1)
    torch.testing.assert_close(club_upper_bound(equal, mean, variance).double(), torch.zeros((), dtype=torch.float64))


def test_club_can_be_negative():
    latent = torch.randn(3, 4, 8)
    assert club_upper_bound(latent, -latent, torch.ones_like(latent)) < 0


@pytest.mark.parametrize("shape", [(3, 4, 8), (3, 4, 5, 8)])
def test_sum_over_features_is_the_mean_times_their_number(shape):
    latent = torch.randn(3, 4, 8)
    mean, variance = gaussians(*shape, dtype=torch.float32)
    for term in (club_upper_bound, gaussian_negative_log_likelihood):
        by_sum, by_mean = (term(latent, mean, variance, reduction) for reduction in ("sum", "mean"))
        torch.testing.assert_close(by_sum, 8 * by_mean)


def test_club_does_not_lose_its_digits_to_large_latents():
    # the two log-likelihoods are about 1e5 here, their difference about 1
    latent = 300 + torch.randn(3, 4, 8)
    mean, variance = 300 + torch.randn(3, 4, 8), torch.full((3, 4, 8), 0.5)
    expected = club_by_loops(latent.double(), mean.double(), variance.double())
    torch.testing.assert_close(club_upper_bound(latent, mean, variance).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("term", [club_upper_bound, gaussian_negative_log_likelihood])
def test_gaussian_terms_are_float32_under_autocast(term):
    latent = torch.randn(3, 4, 8)
    mean, variance = gaussians(3, 4, 8, dtype=torch.float32)
    expected = term(latent, mean, variance)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(term(latent, mean, variance), expected)


# The approximator V (Sec. 5.4)


def test_approximator_is_three_layers_with_one_activation_between_and_one_after():
    approximator = GaussianApproximator(in_features=5, out_features=8, hidden_features=6, variance_eps=0.01)
    visible = torch.randn(3, 4, 5)
    mean, variance = approximator(visible)

    def branch(prefix: str) -> torch.Tensor:
        weights = dict(approximator.named_parameters())
        layers = sorted({name.rsplit(".", 1)[0] for name in weights if name.startswith(prefix)})
        first, second, last = ((weights[f"{layer}.weight"], weights[f"{layer}.bias"]) for layer in layers)
        hidden = F.gelu(visible @ first[0].T + first[1])
        return (hidden @ second[0].T + second[1]) @ last[0].T + last[1]

    torch.testing.assert_close(mean, F.leaky_relu(branch("mean.")))
    torch.testing.assert_close(variance, F.relu(branch("variance.")) + 0.01)


def test_branches_of_the_approximator_share_nothing():
    approximator = GaussianApproximator(in_features=5, out_features=8, hidden_features=6, variance_eps=0.01)
    parameters = dict(approximator.named_parameters())
    for index, branch in enumerate(("mean", "variance")):
        output = approximator(torch.randn(3, 5))[index].sum()
        grads = torch.autograd.grad(output, parameters.values(), allow_unused=True)
        reached = {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}
        assert reached == {name for name in parameters if name.startswith(f"{branch}.")}


def test_approximator_starts_with_a_variance_near_one():
    approximator = MIMAEForPreTraining(MIMAEConfig(**TINY)).approximator
    mean, variance = approximator(torch.zeros(2, 32))
    assert torch.equal(mean, torch.zeros(2, 32))
    assert torch.equal(variance, torch.full((2, 32), 1.01))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_approximator_is_float32_under_autocast(dtype):
    approximator = GaussianApproximator(in_features=5, out_features=8, hidden_features=6, variance_eps=0.01)
    visible = torch.randn(3, 5).to(dtype)
    expected = approximator(visible.float())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = approximator(visible)
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.dtype == torch.float32
        assert torch.equal(output, wanted)


def test_variance_is_positive_and_dead_units_are_counted():
    approximator = GaussianApproximator(in_features=5, out_features=8, hidden_features=6, variance_eps=0.01)
    last = [module for module in approximator.variance if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_(torch.tensor([-1e3] * 2 + [1e3] * 6))
    latent, visible = torch.randn(3, 4, 8), torch.randn(3, 4, 5)
    settings = {"temperature": 0.07, "gather_negatives": True, "reduction": "mean"}
    terms = information_terms(latent, visible, approximator, **settings)
    assert terms.dead_variance_fraction == 0.25
    assert terms.min_variance == torch.tensor(0.01)
    assert terms.approximation_loss.isfinite()
    torch.testing.assert_close(terms.latent_norm, latent.norm(dim=-1).mean())


def test_terms_that_are_switched_off_are_zero():
    settings = {"gather_negatives": True, "reduction": "mean"}
    latent = torch.randn(3, 4, 8, requires_grad=True)
    terms = information_terms(latent, torch.randn(3, 4, 5), None, temperature=None, **settings)
    assert terms.mi_max_loss == terms.mi_min_loss == terms.approximation_loss == 0
    assert not terms.mi_max_loss.requires_grad


# The gate (Assumption 3)


def states(gate: InformationGate, *losses: float) -> list[float]:
    return [gate(torch.tensor(loss)).item() for loss in losses]


def test_gate_opens_strictly_below_the_threshold_and_stays_open():
    gate = InformationGate(threshold=0.5, mode="latch")
    assert gate.is_open == 0
    assert states(gate, 0.9, 0.5, 0.5 - 1e-4, 0.9, math.nan) == [0, 0, 1, 1, 1]
    assert gate.is_open == 1


def test_step_mode_decides_at_each_step():
    assert states(InformationGate(0.5, "step"), 0.9, 0.4, 0.5, 0.3, math.nan) == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("mode", ["latch", "step"])
def test_nan_and_infinity_open_nothing(mode):
    assert states(InformationGate(0.5, mode), math.nan, math.inf) == [0, 0]


@pytest.mark.parametrize("mode", ["latch", "step"])
def test_without_a_threshold_the_gate_is_always_open(mode):
    gate = InformationGate(None, mode)
    assert states(gate, 100.0, math.nan) == [1, 1]
    assert states(gate.eval(), 100.0) == [1]


@pytest.mark.parametrize("mode", ["latch", "step"])
def test_evaluation_never_moves_the_gate(mode):
    gate = InformationGate(0.5, mode)
    assert states(gate.eval(), 0.1) == [0]
    assert states(gate.train(), 0.9, 0.1) == [0, 1]
    assert states(gate.eval(), 0.9) == [1]


def test_gate_carries_no_gradient():
    loss = torch.tensor(0.4, requires_grad=True)
    assert not InformationGate(0.5, "latch")(loss).requires_grad


def test_earlier_answers_of_the_gate_do_not_change_later():
    gate = InformationGate(0.5, "latch")
    before = gate(torch.tensor(0.9))
    gate(torch.tensor(0.1))
    assert before == 0


# One process


def test_alone_nothing_is_gathered_and_the_mean_is_the_value():
    assert gather_views(torch.randn(2, 3, 4)) == (None, 0)
    value = torch.tensor(0.3, requires_grad=True)
    assert mean_over_processes(value) == value
    assert not mean_over_processes(value).requires_grad
