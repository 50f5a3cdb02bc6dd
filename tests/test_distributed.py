"""Two real processes (gloo) against one on the same global batch. This file is also what each process runs."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forking import run_forked
from references import TINY, TINY_SWIN
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import mimae.mutual_information
from mimae import MIMAEConfig, MIMAEForPreTraining, MISimMIMConfig, MISimMIMForPreTraining

NUM_PROCESSES = 2
NUM_STEPS = 4
NUM_IMAGES = 8  # of the global batch
TERMS = ("loss", "objective", "reconstruction_loss", "mi_max_loss", "mi_min_loss", "approximation_loss", "mi_active")
MODELS = {
    "mimae": (MIMAEForPreTraining, MIMAEConfig, TINY),
    "misimmim": (MISimMIMForPreTraining, MISimMIMConfig, TINY_SWIN),
}
# behind a closed gate L_rec is 1.559, 1.487, 1.467 in MI-MAE and 0.943, 0.879, 0.854 in MI-SimMIM: the second opens at
# the third step
THRESHOLDS = {
    "mimae": {"open": None, "opens": 1.477},
    "misimmim": {"open": None, "opens": 0.867},
}
CASES = [(model_type, case) for model_type, thresholds in THRESHOLDS.items() for case in thresholds]


def build(model_type: str = "mimae", **overrides) -> PreTrainedModel:
    """The same model on every process; λ = (1, 1, 10) by default."""
    torch.manual_seed(0)
    model_class, config_class, sizes = MODELS[model_type]
    return model_class(config_class(**{**sizes, **overrides}))


def train(rank: int, world_size: int, threshold: float | None, **overrides) -> dict:
    """A few steps of AdamW on this process's share of each global batch: every loss term, and the weights at last."""
    model = build(mi_gate_threshold=threshold, **overrides)
    parallel = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(NUM_STEPS):
        pixel_values = torch.randn(NUM_IMAGES, 3, 16, 16, generator=generator).chunk(world_size)[rank]
        noise = torch.rand(NUM_IMAGES, 16, generator=generator).chunk(world_size)[rank]
        output = parallel(pixel_values, noise=noise)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.stack([output[name].detach() for name in TERMS]))
    return {"history": torch.stack(history), "weights": model.state_dict()}


def gather_without_gradient(latent_vector: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The usual mistake: the other processes' views carry no gradient back, only the local slice does."""
    parts = [torch.empty_like(latent_vector) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, latent_vector.detach())
    parts[dist.get_rank()] = latent_vector
    return torch.cat(parts), dist.get_rank()


def straddle(rank: int) -> dict:
    """L_rec of each process, and the gate of each, for thresholds just above and just below their mean."""
    model = build(norm_pix_loss=False)
    torch.manual_seed(2)
    pixel_values, noise = (1 + 2 * rank) * torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    with torch.no_grad():
        own = model.eval()(pixel_values, noise=noise).reconstruction_loss
        losses = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(losses, own)
        mean = torch.stack(losses).mean().item()
        active = []
        for threshold in (1.01 * mean, 0.99 * mean):
            model = build(norm_pix_loss=False, mi_gate_threshold=threshold).train()
            active.append(model(pixel_values, noise=noise).mi_active)
    return {"losses": torch.stack(losses), "mean": torch.tensor(mean), "active": torch.stack(active)}


def run_process(rank: int, folder: Path):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=NUM_PROCESSES)
    results = {
        (model_type, case): train(rank, NUM_PROCESSES, THRESHOLDS[model_type][case], model_type=model_type)
        for model_type, case in CASES
    }
    results["local negatives"] = train(rank, NUM_PROCESSES, None, gather_negatives=False)
    results["straddle"] = straddle(rank)

    original = mimae.mutual_information.gather_views
    mimae.mutual_information.gather_views = gather_without_gradient
    results["no gradient"] = train(rank, NUM_PROCESSES, None)
    mimae.mutual_information.gather_views = original

    # sum over processes of Σ_w (rank + 1)·(w + 1)·gathered[w]: the gradient of process r is (r + 1)·Σ(rank + 1)
    local = torch.full((1, 2, 3), float(rank), requires_grad=True)
    gathered, reported_rank = original(local)
    weights = torch.arange(1.0, NUM_PROCESSES + 1)[:, None, None]
    ((rank + 1) * weights * gathered).sum().backward()
    results["gather"] = {"gathered": gathered.detach(), "grad": local.grad, "rank": torch.tensor(reported_rank)}

    results["world_size"] = torch.tensor(dist.get_world_size())
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("distributed")
    result = run_forked(Path(__file__), [str(folder)], num_processes=NUM_PROCESSES)
    assert result.returncode == 0, result.output
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES)]


def largest_difference(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Over all weights but the keys' biases, which softmax does not see: Adam makes steps of their rounding errors."""
    assert weights.keys() == others.keys()
    names = [name for name in weights if not name.endswith("k_proj.bias")]
    return max((weights[name] - others[name]).abs().max().item() for name in names)


def test_the_processes_are_two(processes):
    assert [process["world_size"].item() for process in processes] == [NUM_PROCESSES] * NUM_PROCESSES


@pytest.mark.parametrize(("model_type", "case"), CASES)
def test_two_processes_equal_one_on_the_same_global_batch(processes, model_type, case):
    threshold = THRESHOLDS[model_type][case]
    alone = train(0, 1, threshold, model_type=model_type)
    first, second = (process[model_type, case] for process in processes)
    history = torch.stack([first["history"], second["history"]])
    torch.testing.assert_close(history.mean(dim=0), alone["history"], rtol=2e-5, atol=2e-5)
    assert largest_difference(first["weights"], second["weights"]) == 0
    # of the absolute error the decoder's bias gets a sum of signs; where it cancels, Adam makes a step of the rounding
    assert largest_difference(first["weights"], alone["weights"]) < 5e-5

    moved = largest_difference(alone["weights"], build(model_type, mi_gate_threshold=threshold).state_dict())
    assert moved > 1e-3  # or equality would say nothing
    active = alone["history"][:, TERMS.index("mi_active")].tolist()
    assert active == {"open": [1, 1, 1, 1], "opens": [0, 0, 1, 1]}[case]


def test_a_gather_without_gradient_would_be_noticed(processes):
    alone = train(0, 1, None)
    # its first loss is right, its gradient is not
    first = torch.stack([process["no gradient"]["history"][0] for process in processes]).mean(dim=0)
    torch.testing.assert_close(first, alone["history"][0], rtol=2e-5, atol=2e-5)
    assert largest_difference(processes[0]["no gradient"]["weights"], alone["weights"]) > 2e-4


def test_gather_negatives_false_keeps_to_the_negatives_of_the_process(processes):
    index = TERMS.index("mi_max_loss")
    local = torch.stack([process["local negatives"]["history"][0, index] for process in processes]).mean()
    assert local < train(0, 1, None)["history"][0, index] - 0.1  # fewer negatives, a smaller partition sum


def test_gathered_views_are_in_rank_order_and_their_gradient_is_summed_over_processes(processes):
    total = sum(range(1, NUM_PROCESSES + 1))
    for rank, process in enumerate(processes):
        result = process["gather"]
        assert result["rank"] == rank
        assert result["gathered"][:, 0, 0].tolist() == list(range(NUM_PROCESSES))
        assert torch.all(result["grad"] == (rank + 1) * total)


def test_the_gate_follows_the_mean_over_processes_on_all_of_them(processes):
    low, high = processes[0]["straddle"]["losses"]
    mean = processes[0]["straddle"]["mean"]
    assert low < 0.99 * mean < 1.01 * mean < high  # alone, the two would decide differently
    for process in processes:
        assert process["straddle"]["active"].tolist() == [1, 0]


if __name__ == "__main__":
    run_process(int(os.environ["RANK"]), Path(sys.argv[1]))
