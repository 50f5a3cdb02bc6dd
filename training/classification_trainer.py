"""`transformers.Trainer` for classifiers: ready-made loaders, light evaluation, averaged weights, no silent NaN.

Shapes: B images in a batch, n in a set, K classes. A model with several heads has logits (B, heads, K).
"""

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from ..data.classification import IGNORED_LABEL
from ..evaluation.metrics import ranked_classes
from .averaging import WeightAverage
from .sealed_checkpoints import SealedCheckpoints
from .signals import RunStopped, StopOnSignal, StopRequest

# metrics by name, the ranked classes (n, 5) that they are of, and the labels (n,)
Tested = tuple[dict[str, float], np.ndarray, np.ndarray]


class ClassificationTrainer(Trainer):
    """A `Trainer` whose batches come from loaders that are already this process's own.

    The loaders are handed on as they are, never to `accelerator.prepare`, which would cut them up once more. Each
    process has its share of the images from its own loader. Evaluation loaders must give all processes equally many
    batches of one size, padded with images of label -100: those count nowhere.

    Args:
        model, args, optimizers, callbacks, and what else `Trainer` takes: see there.
        train_loader: dicts of `pixel_values` (B, C, H, W) and `labels`, int64 (B,) or soft (B, K).
        eval_loader: the same with int64 labels; what `args.eval_strategy` evaluates on.
        compute_metrics: of an `EvalPrediction` with `predictions` (n, 5), the classes of each image, best first (fewer
            where there are fewer classes; (n, heads, 5) with several heads), and `label_ids` (n,); padding is gone.
        settings: what the result follows from, as JSON holds it: see `SealedCheckpoints`.
        average_decay: evaluate, and end with, averaged weights: see `WeightAverage`. None: the weights as trained.

    Raises:
        ValueError: `args.logging_nan_inf_filter` is set, which hides a loss that is not finite; no weight average in
            a checkpoint that is resumed with one.
        FloatingPointError: while training: the loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_loader: DataLoader | None = None,
        eval_loader: DataLoader | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        settings: dict[str, Any] | None = None,
        average_decay: float | None = None,
        **trainer_options: Any,
    ):
        if args.logging_nan_inf_filter:
            raise ValueError("logging_nan_inf_filter=True hides a loss that is not finite; set it to False")
        super().__init__(
            model,
            args,
            train_dataset=train_loader,  # not data sets, but Trainer looks for no more than their length and presence
            eval_dataset=eval_loader,
            compute_metrics=exact_metrics(compute_metrics or (lambda prediction: {})),
            preprocess_logits_for_metrics=rank_classes,
            **trainer_options,
        )
        self.add_callback(StopAtNonFiniteLoss)
        self.remove_callback(PrinterCallback)  # `MetricsLog` says it better
        self.weight_average = None
        if average_decay is not None:
            self.weight_average = WeightAverage(self.model, average_decay)
            self.add_callback(self.weight_average)
        self.settings = settings or {}
        self.add_callback(SealedCheckpoints(self.settings))  # the last one: what it seals must not change

    def get_train_dataloader(self) -> DataLoader:
        """The training loader as it was given."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_loader, and this trainer was given none")
        return self.train_dataset

    def get_eval_dataloader(self, eval_dataset: DataLoader | None = None) -> DataLoader:
        """This loader, or the one that the trainer was given, as it is."""
        loader = self.eval_dataset if eval_dataset is None else eval_dataset
        if loader is None:
            raise ValueError("evaluation needs an eval_loader, and this trainer was given none")
        return loader

    def train_until_stopped(self, checkpoint: str | os.PathLike | None = None) -> None:
        """Trains to the end, from a checkpoint if there is one, or to the step in which a stop signal comes.

        Raises:
            RunStopped: one has come before the last step; a checkpoint is saved.
        """
        with StopRequest() as stop_request:
            stop = StopOnSignal(stop_request)
            self.add_callback(stop)
            self.train(resume_from_checkpoint=checkpoint)
        if stop.signum and self.state.global_step < self.args.max_steps:
            raise RunStopped(stop.signum)

    def test(self, loader: DataLoader) -> Tested:
        """Evaluates on other images, and gives what the model said of each. Collective.

        Returns:
            `loss` and the metrics by their plain names, the ranked classes (n, 5) that they are of, and the labels
            (n,), int64; all on every process, without the padding.
        """
        output = self.evaluation_loop(loader, description="Test")
        classes, _ = output.predictions
        is_image = output.label_ids != IGNORED_LABEL
        metrics = self.compute_metrics(EvalPrediction(output.predictions, output.label_ids))
        return metrics, classes[is_image], output.label_ids[is_image]

    def take_over(self, checkpoint: str | os.PathLike) -> None:
        """Ends as the run did that finished at this checkpoint: with its weights, or with their average."""
        self._load_from_checkpoint(str(checkpoint))
        if self.weight_average:
            self.model.load_state_dict(self.weight_average.state_dict())

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer, with the averaged weights where they are kept, and the main process's running statistics.

        DDP brings these together in training passes only: without it each process would test a model of its own.
        """
        if self.args.world_size > 1:
            for buffer in self.model.buffers():
                broadcast(buffer)  # in place
        with self.weight_average.applied_to(self.model) if self.weight_average else contextlib.nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.weight_average:
            self.weight_average.load(resume_from_checkpoint)


class StopAtNonFiniteLoss(TrainerCallback):
    """Ends a run whose loss is no number any more; Trainer would go on to the last step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Raises: FloatingPointError, on all processes alike, because the logged loss is their mean."""
        losses = [logs[name] for name in ("loss", "train_loss", "eval_loss") if name in logs]
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(
                f"the loss was {losses[0]} by step {state.global_step}. A lower learning rate, a longer warm-up or "
                "a max_grad_norm may help, or bf16 or float32 in place of fp16; go on from a checkpoint before it"
            )


def rank_classes(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What evaluation keeps of a batch's logits (B, …, K), where … is nothing or heads.

    Returns:
        The best classes in order, int64 (B, …, 5), and the cross-entropy of each image, float32 (B, …).
    """
    targets = labels.clamp(min=0).view(-1, *[1] * (logits.ndim - 1)).expand(*logits.shape[:-1], 1)
    return ranked_classes(logits), -logits.float().log_softmax(dim=-1).gather(-1, targets).squeeze(-1)


def exact_metrics(
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Metrics over the images that are no padding, and their mean loss, of what `rank_classes` kept.

    It replaces Trainer's own loss, a mean over batches in which the padded last one weighs as much as any.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        classes, losses = prediction.predictions
        is_image = prediction.label_ids != IGNORED_LABEL
        loss = losses[is_image].mean(axis=0).sum()  # over images; over heads
        real = EvalPrediction(predictions=classes[is_image], label_ids=prediction.label_ids[is_image])
        return {"loss": float(loss), **compute_metrics(real)}

    return compute
