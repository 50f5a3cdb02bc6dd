"""docs/architecture.md's recipe *Add a loss term*, followed on a toy: a field of the output, and the forward pass."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from runs import metrics, pretrain, series

from mimae import MIMAEForPreTraining, MISimMIMForPreTraining
from mimae.families import registry
from mimae.modeling_mim import LossTerm, MIMForPreTrainingOutput, loss_term

WEIGHT = 0.5


@dataclass
class ToyOutput(MIMForPreTrainingOutput):
    """sparsity_loss: mean of |ẑ|."""

    sparsity_loss: torch.FloatTensor | None = loss_term("L_sparse", "a toy", "Sparsity of the latents")


class ToyForPreTraining(MIMAEForPreTraining):
    """MI-MAE with one more term."""

    output_class = ToyOutput

    def forward(self, *args, **kwargs) -> ToyOutput:
        output = super().forward(*args, **kwargs)
        term = output.latent_vector.abs().mean()
        return ToyOutput(**{**output, "loss": output.loss + WEIGHT * term}, sparsity_loss=term)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> tuple[Path, list[str]]:
    """A short run of the script on it, and the titles of the curves that it has drawn."""
    folder, titles, set_title = tmp_path_factory.mktemp("toy") / "run", [], Axes.set_title

    def noting_title(axes: Axes, title: str, **options):
        titles.append(title)
        return set_title(axes, title, **options)

    family = replace(registry.FAMILIES["mimae"], pretraining_class=ToyForPreTraining)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, "mimae", family)
        patch.setattr(Axes, "set_title", noting_title)
        assert pretrain(folder, model_type="mimae", max_train_steps=4, gradient_accumulation_steps=2) == 0
    return folder, titles


def test_the_term_is_logged_at_each_step_and_trains(toy_run):
    folder, _ = toy_run
    term, loss, objective, approximation = (
        series(folder, name) for name in ("sparsity_loss", "loss", "objective", "approximation_loss")
    )
    assert term.keys() == {1, 2, 3, 4}
    for step, value in term.items():
        assert value > 0
        assert loss[step] == pytest.approx(objective[step] + approximation[step] + WEIGHT * value, rel=1e-5)
    assert all("grad_norm" in line for line in metrics(folder) if "loss" in line)


def test_the_term_is_among_the_results_and_the_curves_by_its_name(toy_run):
    folder, titles = toy_run
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["sparsity_loss"] == series(folder, "sparsity_loss")[4]
    assert "Sparsity of the latents, $L_\\mathrm{sparse}$" in titles
    assert "Reconstruction, $L_\\mathrm{rec}$" in titles
    assert "sparsity_loss" in (folder / "README.md").read_text()


def test_the_terms_of_the_model_it_was_made_of_are_what_they_were():
    """In this order: checkpoints of a training hold sums of these scalars without their names."""
    expected = (
        *("loss", "objective", "reconstruction_loss", "mi_max_loss", "mi_min_loss", "approximation_loss"),
        *("mi_active", "latent_norm", "min_variance", "dead_variance_fraction"),
    )
    for model_class in (MIMAEForPreTraining, MISimMIMForPreTraining):
        assert model_class.scalars.fget(model_class) == expected
    assert ToyForPreTraining.scalars.fget(ToyForPreTraining) == (*expected, "sparsity_loss")
    terms = ToyForPreTraining.loss_terms.fget(ToyForPreTraining)
    assert list(terms) == [*expected[1:6], "sparsity_loss"]
    assert terms["mi_max_loss"] == LossTerm("L_max", "Eq. 7, InfoNCE", "Agreement between views (InfoNCE)")
