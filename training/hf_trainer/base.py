"""`transformers.Trainer` for downstream tasks: ready-made loaders, averaged weights, stops, and no silent NaN."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..processes import Agreement, together
from ..signals import RunStopped, StopRequest
from .averaging import WeightAverage
from .callbacks import SealedCheckpoints, StopAtNonFiniteLoss, StopOnSignal


class DownstreamTrainer(Trainer):
    """A `Trainer` whose batches come from loaders that are already this process's own.

    The loaders are handed on as they are, never to `accelerator.prepare`, which would cut them up once more. Each
    process has its share of the images from its own loader.

    Args:
        model, args, optimizers, callbacks, and what else `Trainer` takes: see there. The model's loss is a mean over
            the images of a batch.
        train_loader: batches for the model's `forward`.
        eval_loader: the same; what `args.eval_strategy` evaluates on.
        settings: what the result follows from, as JSON holds it: see `SealedCheckpoints`.
        average_decay: evaluate, and end with, averaged weights: see `WeightAverage`. None: the weights as trained.

    Raises:
        ValueError: `args.logging_nan_inf_filter` is set, which hides a loss that is not finite; no weight average in
            a checkpoint that is resumed with one.
        FloatingPointError: while training: the loss is not finite.
    """

    model: nn.Module
    train_dataset: Any  # the loaders, see `__init__`
    eval_dataset: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_loader: DataLoader[Any] | None = None,
        eval_loader: Iterable[Any] | None = None,
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
            **trainer_options,
        )
        # Trainer takes a `forward` with further keywords, as UperNet's is, for one that divides a sum over all
        # accumulated batches, and would divide no more
        self.model_accepts_loss_kwargs = False
        self.add_callback(StopAtNonFiniteLoss)
        self.remove_callback(PrinterCallback)  # `MetricsCallback` says it better
        self.weight_average = None if average_decay is None else WeightAverage(self.model, average_decay)
        if self.weight_average:
            self.add_callback(self.weight_average)
        self.settings = settings or {}
        self.add_callback(SealedCheckpoints(self.settings))  # the last one: what it seals must not change

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training loader as it was given."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_loader, and this trainer was given none")
        return self.train_dataset

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This loader, or the one that the trainer was given, as it is."""
        loader = self.eval_dataset if eval_dataset is None else eval_dataset
        if loader is None:
            raise ValueError("evaluation needs an eval_loader, and this trainer was given none")
        return loader

    def train_until_stopped(self, checkpoint: str | os.PathLike[str] | None = None) -> None:
        """Trains to the end, from a checkpoint if there is one, or to the step in which a stop signal comes.

        Raises:
            RunStopped: one has come before the last step; a checkpoint is saved.
        """
        with StopRequest(Agreement()) as stop_request:
            stop = StopOnSignal(stop_request)
            self.add_callback(stop)
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.signum and self.state.global_step < self.args.max_steps:
            raise RunStopped(stop.signum)

    def take_over(self, checkpoint: str | os.PathLike[str]) -> None:
        """Takes the weights, or their average, of the run that finished at this checkpoint."""
        self._load_from_checkpoint(str(checkpoint))
        if self.weight_average:
            self.model.load_state_dict(self.weight_average.state_dict())

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer, on `model_to_evaluate`."""
        with self.model_to_evaluate():
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def model_to_evaluate(self) -> Iterator[nn.Module]:
        """A context in which the model has the averaged weights, if any, and the main process's running statistics.

        DDP synchronises these in training passes only: without this each process would test a model of its own.
        """
        if self.args.world_size > 1:
            for buffer in self.model.buffers():
                broadcast(buffer)  # in place
        with self.weight_average.applied_to(self.model) if self.weight_average else contextlib.nullcontext():
            yield self.model

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        together(lambda: super(DownstreamTrainer, self)._save_checkpoint(model, trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.weight_average:
            self.weight_average.load(resume_from_checkpoint)
