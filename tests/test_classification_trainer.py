"""`ClassificationTrainer` at work: its loaders, its loss and metrics, averaged weights, resuming, two processes.

This file is also what each of two processes runs.
"""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forking import run_forked
from references import TINY
from safetensors.torch import load_file
from sklearn.metrics import top_k_accuracy_score
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from mimae import MIMAEConfig, MIMAEForImageClassification, MIMAEModel
from mimae.training.hf_trainer.averaging import AVERAGE_FILE, WeightAverage
from mimae.training.hf_trainer.classification import ClassificationTrainer, rank_classes
from mimae.training.linear_probe import LinearProbe, build_probe_lars, metrics_of_heads
from mimae.training.optimization import WarmupCosine, build_finetuning_adamw, schedule_as_lambda

NUM_CLASSES = 7
NUM_IMAGES = 24


class Classifier(nn.Module):
    """A linear one on 4 x 4 pixels, with dropout where a test wants random numbers in the forward pass."""

    def __init__(self, dropout: float = 0.0, num_classes: int = NUM_CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(16, num_classes, bias=False)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.linear(self.dropout(pixel_values.flatten(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels, ignore_index=-100), "logits": logits}


def images(number: int = NUM_IMAGES, num_classes: int = NUM_CLASSES, size: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(3 if size > 4 else 1, size, size, generator=generator),
            "labels": int(torch.randint(num_classes, (), generator=generator)),
        }
        for _ in range(number)
    ]


def padded(samples: list[dict], batch_size: int) -> list[dict]:
    """Filled up to whole batches with images that have no label."""
    missing = -len(samples) % batch_size
    return samples + [{"pixel_values": torch.full_like(samples[0]["pixel_values"], 9.0), "labels": -100}] * missing


def arguments(folder: Path, **values) -> TrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
    }
    return TrainingArguments(str(folder), **{**defaults, **values})


def sgd(model: nn.Module, learning_rate: float = 0.1) -> tuple:
    """Plain gradient descent at a constant rate: what a step does can be written down."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {
        "accuracy": float(np.mean(prediction.predictions[:, 0] == prediction.label_ids)),
        "top5_accuracy": float(np.mean((prediction.predictions == prediction.label_ids[:, None]).any(axis=1))),
        "images": len(prediction.label_ids),
    }


def trainer_of(model: nn.Module, folder: Path, batch_size: int = 8, **options) -> ClassificationTrainer:
    """One that trains on all the images, eight at a time."""
    values = options.pop("arguments", {})
    loaders = {
        "train_loader": DataLoader(images(), batch_size=batch_size),
        "eval_loader": DataLoader(padded(images(13), 4), batch_size=4),
        "compute_metrics": accuracy,
        "optimizers": sgd(model),
    }
    options = {**loaders, **options}
    return ClassificationTrainer(model, arguments(folder, **values), **options)


class Recorder(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.weights.append(model.linear.weight.detach().clone())


class StopAt(TrainerCallback):
    """Saves after a step and ends training, as a time limit would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


# ---- two processes


def train_and_evaluate(folder: Path, rank: int, num_processes: int, micro_batch: int) -> dict:
    """Three steps on global batches of 8, then an evaluation of 13 images; this process sees its share alone."""
    model = Classifier()
    share = [s for start in range(0, NUM_IMAGES, 8) for s in images()[start : start + 8][rank::num_processes]]
    own_part = 16 // num_processes
    evaluation = padded(images(13), 16)[rank * own_part : (rank + 1) * own_part]
    trainer = trainer_of(
        model,
        folder,
        train_loader=DataLoader(share, batch_size=micro_batch),
        eval_loader=DataLoader(evaluation, batch_size=4),
        average_decay=0.5,
        arguments={
            "gradient_accumulation_steps": 8 // num_processes // micro_batch,
            "per_device_train_batch_size": micro_batch,
        },
    )
    trainer.train()
    metrics = trainer.evaluate()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "world_size": trainer.args.world_size,
        "parallel": type(trainer.model_wrapped).__name__,
        "weight": model.linear.weight.tolist(),
        "losses": losses,
        "metrics": {name: metrics[name] for name in ("eval_loss", "eval_accuracy", "eval_images")},
    }


def run_process(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    result = train_and_evaluate(folder, rank, int(os.environ["WORLD_SIZE"]), micro_batch=2)
    (folder / f"{rank}.json").write_text(json.dumps(result))


def test_two_processes_that_accumulate_equal_one_on_the_same_global_batch(tmp_path):
    result = run_forked(Path(__file__), [str(tmp_path)], num_processes=2)
    assert result.returncode == 0, result.output[-4000:]
    alone = train_and_evaluate(tmp_path / "alone", 0, 1, micro_batch=8)
    assert (alone["world_size"], alone["parallel"]) == (1, "Classifier")
    assert alone["metrics"]["eval_images"] == 13
    start = Classifier().linear.weight.tolist()
    assert np.abs(np.subtract(alone["weight"], start)).max() > 1e-2  # or equality would say nothing
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (result["world_size"], result["parallel"]) == (2, "DistributedDataParallel")
        np.testing.assert_allclose(result["weight"], alone["weight"], atol=1e-6)
        np.testing.assert_allclose(result["losses"], alone["losses"], atol=1e-4)  # rounded in the log
        assert result["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)


# ---- training


def test_loaders_are_handed_on_as_they_are(tmp_path):
    trainer = trainer_of(Classifier(), tmp_path)
    assert trainer.get_train_dataloader() is trainer.train_dataset
    assert trainer.get_eval_dataloader() is trainer.eval_dataset
    other = DataLoader(images(4), batch_size=4)
    assert trainer.get_eval_dataloader(other) is other
    assert trainer.evaluate(other, metric_key_prefix="other")["other_images"] == 4


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_gradient_accumulation_equals_the_whole_batch(tmp_path, micro_batch):
    whole, parts = Classifier(), Classifier()
    trainer_of(whole, tmp_path).train()
    accumulation = {"gradient_accumulation_steps": 8 // micro_batch, "per_device_train_batch_size": micro_batch}
    trainer_of(parts, tmp_path, batch_size=micro_batch, arguments=accumulation).train()
    torch.testing.assert_close(parts.linear.weight, whole.linear.weight, rtol=1e-5, atol=1e-6)
    assert (whole.linear.weight - Classifier().linear.weight).abs().max() > 1e-2


def test_a_max_grad_norm_of_0_leaves_gradients_as_they_are(tmp_path):
    model, reference = Classifier(), Classifier()
    samples = [{**sample, "pixel_values": 100 * sample["pixel_values"]} for sample in images(8)]
    trainer_of(model, tmp_path, train_loader=DataLoader(samples, batch_size=8)).train()
    batch = next(iter(DataLoader(samples, batch_size=8)))
    reference(**batch)["loss"].backward()
    assert reference.linear.weight.grad.norm() > 50
    torch.testing.assert_close(model.linear.weight, reference.linear.weight - 0.1 * reference.linear.weight.grad)


def test_soft_labels_train(tmp_path):
    hard, soft = Classifier(), Classifier()
    one_hot = [
        {**s, "labels": nn.functional.one_hot(torch.tensor(s["labels"]), NUM_CLASSES).float()} for s in images()
    ]
    trainer_of(hard, tmp_path).train()
    trainer_of(soft, tmp_path, train_loader=DataLoader(one_hot, batch_size=8)).train()
    torch.testing.assert_close(soft.linear.weight, hard.linear.weight)


def test_a_loss_that_is_not_finite_ends_the_run_with_what_to_do(tmp_path):
    samples = images()
    samples[9]["pixel_values"][0, 0, 0] = math.inf  # in the second batch
    trainer = trainer_of(Classifier(), tmp_path, train_loader=DataLoader(samples, batch_size=8))
    with pytest.raises(FloatingPointError, match=r"by step 2\. A lower learning rate"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_filter_that_would_hide_such_a_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="logging_nan_inf_filter"):
        trainer_of(Classifier(), tmp_path, arguments={"logging_nan_inf_filter": True})


def test_a_missing_loader_is_named(tmp_path):
    trainer = trainer_of(Classifier(), tmp_path, train_loader=None, eval_loader=None)
    with pytest.raises(ValueError, match="train_loader"):
        trainer.train()
    with pytest.raises(ValueError, match="eval_loader"):
        trainer.evaluate()


def test_fine_tuning_logs_the_peaks_rate_and_saves_a_model_that_loads(tmp_path):
    model = MIMAEForImageClassification(MIMAEConfig(**TINY, num_labels=NUM_CLASSES, drop_path_rate=0.1))
    optimizer = build_finetuning_adamw(model, learning_rate=1e-3, weight_decay=0.05, layer_decay=0.5)
    schedule = WarmupCosine(peak=1e-3, final=1e-5, warmup_steps=2, total_steps=6)
    trainer = trainer_of(
        model,
        tmp_path,
        train_loader=DataLoader(images(size=16), batch_size=8),
        eval_loader=DataLoader(padded(images(13, size=16), 4), batch_size=4),
        optimizers=(optimizer, schedule_as_lambda(optimizer, schedule)),
        arguments={"num_train_epochs": 2, "gradient_accumulation_steps": 1},
    )
    trainer.train()
    logged = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert logged == pytest.approx([schedule(step) for step in range(6)])
    trainer.save_model()
    loaded = MIMAEForImageClassification.from_pretrained(tmp_path).eval()
    pixel_values = torch.stack([sample["pixel_values"] for sample in images(4, size=16)])
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model.eval()(pixel_values).logits)


# ---- evaluation


@pytest.mark.parametrize("num_classes", [NUM_CLASSES, 3])
def test_metrics_and_loss_are_those_of_the_images_without_the_padding(tmp_path, num_classes):
    model, samples = Classifier(num_classes=num_classes), images(13, num_classes)
    metrics = trainer_of(model, tmp_path, eval_loader=DataLoader(padded(samples, 4), batch_size=4)).evaluate()
    labels = np.array([sample["labels"] for sample in samples])
    with torch.no_grad():
        output = model.eval()(torch.stack([s["pixel_values"] for s in samples]), torch.tensor(labels))
    assert metrics["eval_images"] == 13
    assert metrics["eval_loss"] == pytest.approx(output["loss"].item(), rel=1e-5)
    assert metrics["eval_accuracy"] == np.mean(output["logits"].argmax(dim=-1).numpy() == labels)
    all_labels = range(num_classes)
    k = min(5, num_classes - 1)
    expected = top_k_accuracy_score(labels, output["logits"].numpy(), k=k, labels=all_labels)
    assert metrics["eval_top5_accuracy"] == (expected if num_classes > 5 else 1.0)


def test_a_test_gives_the_metrics_and_what_they_are_of(tmp_path):
    model, samples = Classifier(), images(6)
    trainer = trainer_of(model, tmp_path, eval_loader=None)
    metrics, classes, labels = trainer.test(DataLoader(padded(samples, 4), batch_size=4))
    assert labels.tolist() == [sample["labels"] for sample in samples]
    assert (classes.shape, classes.dtype) == ((6, 5), np.int64)
    assert set(metrics) == {"loss", "accuracy", "top5_accuracy", "images"}
    assert metrics["accuracy"] == np.mean(classes[:, 0] == labels)
    with torch.no_grad():
        logits = model(torch.stack([s["pixel_values"] for s in samples]), torch.tensor(labels))["logits"]
    np.testing.assert_array_equal(classes, logits.argsort(dim=-1, descending=True)[:, :5])


def test_five_classes_of_each_image_are_kept_best_first():
    logits = torch.tensor([[0.1, 0.7, 0.3, 0.2, 0.6, 0.5, 0.4]])
    classes, losses = rank_classes(logits, torch.tensor([4]))
    assert classes.tolist() == [[1, 4, 5, 6, 2]]
    torch.testing.assert_close(losses, nn.functional.cross_entropy(logits, torch.tensor([4]), reduction="none"))
    classes, losses = rank_classes(logits.repeat(2, 3, 1), torch.tensor([4, -100]))  # three heads
    assert (classes.shape, losses.shape) == ((2, 3, 5), (2, 3))


def test_a_probe_trains_and_resumes_with_checkpoints_of_its_heads_alone(tmp_path):
    def probe_trainer(folder: Path, *callbacks: TrainerCallback) -> ClassificationTrainer:
        torch.manual_seed(0)
        encoder = MIMAEModel(MIMAEConfig(**TINY))
        probe = LinearProbe(encoder, feature_size=32, num_classes=NUM_CLASSES, learning_rates=(0.5, 4.0))
        optimizer = build_probe_lars(probe)
        schedule = WarmupCosine(peak=1.0, final=0.0, warmup_steps=1, total_steps=6)
        return trainer_of(
            probe,
            folder,
            train_loader=DataLoader(images(size=16), batch_size=8),
            eval_loader=DataLoader(padded(images(13, size=16), 4), batch_size=4),
            optimizers=(optimizer, schedule_as_lambda(optimizer, schedule)),
            compute_metrics=metrics_of_heads(probe.learning_rates, accuracy),
            callbacks=list(callbacks),
            arguments={"num_train_epochs": 2},
        )

    whole = probe_trainer(tmp_path / "whole")
    whole.train()
    probe_trainer(tmp_path / "parts", StopAt(4)).train()
    saved = load_file(tmp_path / "parts" / "checkpoint-4" / "model.safetensors")
    assert not any(name.startswith("encoder") for name in saved)
    resumed = probe_trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    metrics = resumed.evaluate()
    assert {"eval_accuracy", "eval_best_learning_rate", "eval_accuracy_lr_0.5", "eval_accuracy_lr_4"} <= set(metrics)
    assert metrics["eval_accuracy"] == max(metrics["eval_accuracy_lr_0.5"], metrics["eval_accuracy_lr_4"])


# ---- averaged weights


def test_the_final_model_is_the_average_by_its_recursion(tmp_path):
    model, recorder = Classifier(), Recorder()
    expected = model.linear.weight.detach().clone()
    trainer_of(model, tmp_path, average_decay=0.8, callbacks=[recorder]).train()
    assert len(recorder.weights) == 3
    for weight in recorder.weights:
        expected = 0.8 * expected + 0.2 * weight
    torch.testing.assert_close(model.linear.weight.detach(), expected)
    assert (expected - recorder.weights[-1]).abs().max() > 1e-3


def test_evaluation_sees_the_average_and_training_goes_on_as_if_there_were_none(tmp_path):
    plain, averaged = Recorder(), Recorder()
    trainer_of(Classifier(), tmp_path, callbacks=[plain]).train()
    trainer = trainer_of(
        Classifier(),
        tmp_path,
        average_decay=0.8,
        callbacks=[averaged],
        arguments={"eval_strategy": "steps", "eval_steps": 1},
    )
    start = trainer.model.linear.weight.detach().clone()
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(plain.weights, averaged.weights, strict=True))
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    reference = Classifier()
    with torch.no_grad():
        reference.linear.weight.copy_(0.8 * start + 0.2 * plain.weights[0])
    expected = trainer_of(reference, tmp_path).evaluate()["eval_loss"]
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        reference.linear.weight.copy_(plain.weights[0])
    assert abs(trainer_of(reference, tmp_path).evaluate()["eval_loss"] - expected) > 1e-3


@pytest.mark.parametrize("step", [2, 3, 5])
def test_an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, step):
    def averaging_trainer(folder: Path, *callbacks: TrainerCallback) -> ClassificationTrainer:
        return trainer_of(
            Classifier(dropout=0.5),
            folder,
            average_decay=0.7,
            callbacks=list(callbacks),
            arguments={"num_train_epochs": 2},
        )

    whole = averaging_trainer(tmp_path / "whole")
    whole.train()
    averaging_trainer(tmp_path / "parts", StopAt(step)).train()
    resumed = averaging_trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert torch.equal(resumed.model.linear.weight, whole.model.linear.weight)


def test_a_checkpoint_holds_the_trained_weights_and_their_average_beside_them(tmp_path):
    recorder = Recorder()
    trainer_of(Classifier(), tmp_path, average_decay=0.8, callbacks=[recorder, StopAt(2)]).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert torch.equal(load_file(checkpoint / "model.safetensors")["linear.weight"], recorder.weights[1])
    average = load_file(checkpoint / AVERAGE_FILE)["linear.weight"]
    start = Classifier().linear.weight.detach()
    expected = 0.8 * (0.8 * start + 0.2 * recorder.weights[0]) + 0.2 * recorder.weights[1]
    torch.testing.assert_close(average, expected)
    assert not list(checkpoint.glob(".*"))


def test_the_best_checkpoints_average_is_what_a_run_ends_with(tmp_path):
    model = Classifier()
    trainer = trainer_of(
        model,
        tmp_path,
        average_decay=0.5,
        optimizers=sgd(model, learning_rate=50.0),  # away from the start, which is best
        arguments={
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "num_train_epochs": 2,
        },
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    assert torch.equal(model.linear.weight, load_file(best / AVERAGE_FILE)["linear.weight"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


def test_a_checkpoint_without_an_average_is_refused_when_one_is_wanted(tmp_path):
    trainer_of(Classifier(), tmp_path, callbacks=[StopAt(2)]).train()
    trainer = trainer_of(Classifier(), tmp_path, average_decay=0.8)
    with pytest.raises(ValueError, match=r"checkpoint-2 holds no weight_average\.safetensors"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, math.nan])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        WeightAverage(Classifier(), decay)


if __name__ == "__main__":
    run_process(Path(sys.argv[1]))
