"""`DownstreamTrainer` for segmentation and detection, whose evaluation is the task's own."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from .base import DownstreamTrainer

# Collective, of the model in evaluation mode: metrics by their plain names, the same on every process.
EvaluateModel = Callable[[nn.Module], dict[str, float]]


class DenseTrainer(DownstreamTrainer):
    """A `DownstreamTrainer` that hands the model to a function of the task, and logs the parts of its loss.

    Every `…_loss` in the model's output is logged beside `loss`: its mean over the same steps.

    Args:
        model, args, options: see `DownstreamTrainer`.
        evaluate_model: gives metrics, all of them finite; what is not defined must be left out. It runs without
            gradients and in the precision of training, and gathers over processes by itself.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, evaluate_model: EvaluateModel, **options: Any):
        # Trainer evaluates nothing where there is no data set; `evaluate_model` has one of its own
        super().__init__(model, args, eval_loader=(), **options)
        self.evaluate_model = evaluate_model
        # sums over micro-batches, on the device, and the optimiser steps that these make up
        self._part_sums: dict[str, torch.Tensor] = {}
        self._summed_steps = 0.0
        self._newest: tuple[int, dict[str, float]] | None = None  # step and metrics of the last evaluation

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As in Trainer; also sums up the parts of the loss."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        share = 1 / self.current_gradient_accumulation_steps
        for name, part in outputs.items():
            if name.endswith("_loss"):
                self._part_sums[name] = self._part_sums.get(name, 0.0) + share * part.detach()
        self._summed_steps += share
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; adds the parts of the loss, as means over steps and processes."""
        if "loss" in logs:
            logs.update(self._mean_parts())
        super().log(logs, start_time)

    def _mean_parts(self) -> dict[str, float]:
        """Of the steps since it was called last. Collective."""
        names, sums, steps = list(self._part_sums), list(self._part_sums.values()), self._summed_steps
        self._part_sums, self._summed_steps = {}, 0.0
        if not names:
            return {}
        return dict(zip(names, self.accelerator.reduce(torch.stack(sums) / steps, "mean").tolist(), strict=True))

    def test(self) -> dict[str, float]:
        """The task's metrics of the current model, by their plain names. Collective.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        was_training = self.model.training
        with self.model_to_evaluate() as model, torch.no_grad(), self.accelerator.autocast():
            metrics = self.evaluate_model(model.eval())
        self.model.train(was_training)
        if broken := {name: value for name, value in metrics.items() if not math.isfinite(value)}:
            raise FloatingPointError(
                f"by step {self.state.global_step} the evaluation gives {broken}. A lower learning rate or a longer "
                "warm-up may help, or bf16 or float32 in place of fp16; go on from a checkpoint before it"
            )
        return metrics

    def final_metrics(self) -> dict[str, float]:
        """The task's metrics after the training, from the last step's evaluation if there was one. Collective."""
        if self._newest is not None and self._newest[0] == self.args.max_steps:
            return self._newest[1]
        return self.test()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`test`, logged and told to the callbacks, as in Trainer, whose other arguments have no meaning here."""
        self._newest = self.state.global_step, self.test()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._newest[1].items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
