"""`DenseTrainer`: nested batches, an evaluation of the task's own, parts of the loss, accumulation, two processes.

This file is also what each of two processes runs.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import run_forked
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from mimae.training.hf_trainer.averaging import AVERAGE_FILE
from mimae.training.hf_trainer.callbacks import MetricsCallback
from mimae.training.hf_trainer.dense import DenseTrainer
from mimae.training.signals import RunStopped

NUM_IMAGES = 12


class Detector(nn.Module):
    """Its boxes are one linear layer's of the image; `**kwargs` is what UperNet's `forward` has, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, pixel_values: torch.Tensor, labels: list[dict[str, torch.Tensor]], **kwargs: Any) -> dict:
        boxes = self.linear(self.norm(pixel_values.flatten(1)))
        targets = torch.stack([label["boxes"].mean(dim=0) for label in labels])
        box_loss, size_loss = (boxes - targets).square().mean(), boxes.abs().mean()
        return {"loss": box_loss + size_loss, "boxes": boxes, "box_loss": box_loss, "size_loss": size_loss}


def images(number: int = NUM_IMAGES) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(1, 2, 2, generator=generator),
            "labels": {
                "boxes": torch.randn(1 + n % 3, 4, generator=generator),
                "labels": torch.zeros(1 + n % 3).long(),
            },
        }
        for n in range(number)
    ]


def collate(samples: list[dict]) -> dict[str, Any]:
    labels = [sample["labels"] for sample in samples]
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.stack(labels) if isinstance(labels[0], torch.Tensor) else labels,
    }


def loader(samples: list[dict], batch_size: int) -> DataLoader:
    return DataLoader(samples, batch_size=batch_size, collate_fn=collate)


def weight_metrics(model: nn.Module) -> dict[str, float]:
    """A metric that tells which weights it was given, and whether in evaluation mode."""
    return {"weight": model.linear.weight.sum().item(), "in_training": float(model.training)}


def trainer_of(folder: Path, batch_size: int = 4, samples: list[dict] | None = None, **options: Any) -> DenseTrainer:
    values = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "num_train_epochs": 1,
        "remove_unused_columns": False,
        "per_device_train_batch_size": batch_size,
        **options.pop("arguments", {}),
    }
    model = options.pop("model", None) or Detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return DenseTrainer(
        model,
        TrainingArguments(str(folder), **values),
        train_loader=loader(samples or images(), batch_size),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        **{"evaluate_model": weight_metrics, **options},
    )


def logged(trainer: DenseTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def run_process(folder: Path) -> None:
    """Trains on this process's half of each global batch of four."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    share = [sample for start in range(0, NUM_IMAGES, 4) for sample in images()[start : start + 4][rank::2]]
    model = Detector()
    model.norm = nn.Identity()
    trainer = trainer_of(folder, 2, share, model=model)
    trainer.train()
    result = {"weight": model.linear.weight.tolist(), "parts": logged(trainer, "box_loss")}
    (folder / f"{rank}.json").write_text(json.dumps({**result, "world_size": trainer.args.world_size}))


def test_two_processes_equal_one_in_weights_and_in_the_parts_of_the_loss(tmp_path):
    result = run_forked(Path(__file__), [str(tmp_path)], num_processes=2)
    assert result.returncode == 0, result.output[-4000:]
    model = Detector()
    model.norm = nn.Identity()
    alone = trainer_of(tmp_path / "alone", 4, model=model)
    alone.train()
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["world_size"] == 2
        torch.testing.assert_close(torch.tensor(result["weight"]), model.linear.weight.detach())
        assert result["parts"] == pytest.approx(logged(alone, "box_loss"), rel=1e-5)


def test_the_parts_of_the_loss_are_logged_as_means_that_add_up_to_it(tmp_path):
    trainer = trainer_of(
        tmp_path, arguments={"logging_steps": 2, "num_train_epochs": 2}, callbacks=[MetricsCallback()]
    )
    trainer.train()
    losses, boxes, sizes = (logged(trainer, name) for name in ("loss", "box_loss", "size_loss"))
    assert len(losses) == len(boxes) == 3
    assert losses == pytest.approx([sum(parts) for parts in zip(boxes, sizes, strict=True)], rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["box_loss"] for line in lines if "box_loss" in line] == boxes


def test_the_first_logged_part_is_the_models_own_over_its_first_batch(tmp_path):
    expected = Detector()(**collate(images()[:4]))["box_loss"].item()
    trainer = trainer_of(tmp_path)
    trainer.train()
    assert logged(trainer, "box_loss")[0] == pytest.approx(expected, rel=1e-6)


class Segmenter(Detector):
    """Labels are one tensor, in which Trainer would count items for models whose `forward` takes keywords."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> dict:
        return super().forward(pixel_values, [{"boxes": label[None]} for label in labels])


@pytest.mark.parametrize("model_class", [Detector, Segmenter])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulated_batches_equal_the_whole_batch(tmp_path, model_class, micro_batch):
    samples = images()
    if model_class is Segmenter:
        samples = [{**sample, "labels": sample["labels"]["boxes"].mean(dim=0)} for sample in samples]

    def trained(batch_size: int) -> DenseTrainer:
        model = model_class()
        model.norm = nn.Identity()  # its statistics are of a micro-batch
        steps = {"gradient_accumulation_steps": 4 // batch_size}
        trainer = trainer_of(tmp_path, batch_size, samples, model=model, arguments=steps)
        trainer.train()
        return trainer

    whole, parts = trained(4), trained(micro_batch)
    torch.testing.assert_close(parts.model.linear.weight, whole.model.linear.weight)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)
    assert logged(parts, "box_loss") == pytest.approx(logged(whole, "box_loss"), rel=1e-5)


def test_evaluation_is_the_tasks_own_in_evaluation_mode_logged_and_told_to_callbacks(tmp_path):
    told = []

    class Tell(TrainerCallback):
        def on_evaluate(self, args, state, control, *, metrics, **kwargs):
            told.append(metrics)

    trainer = trainer_of(tmp_path, callbacks=[Tell()], arguments={"eval_strategy": "steps", "eval_steps": 1})
    trainer.train()
    assert logged(trainer, "eval_in_training") == [0.0, 0.0, 0.0]
    assert [metrics["eval_weight"] for metrics in told] == logged(trainer, "eval_weight")
    assert logged(trainer, "eval_weight")[-1] == trainer.test()["weight"] == trainer.model.linear.weight.sum().item()
    assert trainer.evaluate(metric_key_prefix="other")["other_in_training"] == 0.0


def test_training_goes_on_in_training_mode_after_an_evaluation(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.model.train()
    trainer.test()
    assert trainer.model.training
    trainer.model.eval()
    trainer.test()
    assert not trainer.model.training


def test_the_average_is_evaluated_and_training_goes_on_as_if_there_were_none(tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1}
    plain = trainer_of(tmp_path, arguments=arguments)
    averaged = trainer_of(tmp_path, arguments=arguments, average_decay=0.5)
    start = plain.model.linear.weight.sum().item()
    plain.train()
    averaged.train()
    weights = logged(plain, "eval_weight")
    expected = [0.5 * start + 0.5 * weights[0]]
    for weight in weights[1:]:
        expected.append(0.5 * expected[-1] + 0.5 * weight)
    assert logged(averaged, "eval_weight") == pytest.approx(expected, rel=1e-5)
    assert logged(averaged, "loss") == logged(plain, "loss")


def test_a_metric_that_is_not_finite_ends_the_run_by_its_name(tmp_path):
    trainer = trainer_of(tmp_path, evaluate_model=lambda model: {"mean_iou": math.nan, "accuracy": 1.0})
    with pytest.raises(FloatingPointError, match=r"\{'mean_iou': nan\}\. A lower learning rate"):
        trainer.evaluate()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    samples = images()
    samples[5]["labels"]["boxes"][0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="by step 2"):
        trainer_of(tmp_path, samples=samples).train()


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    arguments = {"max_steps": 3}
    whole = trainer_of(tmp_path / "whole", average_decay=0.5, arguments=arguments)
    whole.train_until_stopped()
    with pytest.raises(RunStopped):
        trainer_of(tmp_path / "run", average_decay=0.5, arguments=arguments, callbacks=[Stop()]).train_until_stopped()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert {"manifest.json", "settings.json", AVERAGE_FILE} <= {path.name for path in checkpoint.iterdir()}
    resumed = trainer_of(tmp_path / "run", average_decay=0.5, arguments=arguments)
    resumed.train_until_stopped(checkpoint)
    assert torch.equal(resumed.model.linear.weight, whole.model.linear.weight)


if __name__ == "__main__":
    run_process(Path(sys.argv[1]))
