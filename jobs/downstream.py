"""What every downstream script does: from the flags to a starting model, a training that resumes, and its results."""

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..data.batches.supervised import TrainingLoader
from ..data.images.transforms import channel_statistics
from ..data.sources.base import RowSource
from ..families.warm_start import Model, StartingModel
from ..flags.downstream import DownstreamArguments
from ..flags.hub import HubArguments
from ..flags.model import ModelArguments
from ..flags.option import compared_values
from ..training.hf_trainer.base import DownstreamTrainer
from ..training.hf_trainer.callbacks import BadImageLimit, MetricsCallback, checkpoint_to_resume
from ..training.optimization import WarmupSchedule, build_finetuning_adamw, in_steps, schedule_as_lambda
from ..training.processes import on_main_process
from ..training.signals import RunStopped
from .publishing import claim_repository, publish
from .results import device_name
from .run_folder import clear_output_dir
from .start import precision

logger = logging.getLogger("mimae")


class DownstreamRun(ABC):
    """One run of a downstream script, on the checkpoint and the images that its flags name.

    Args:
        data_args: flags of the data: `dataloader_num_workers`, `max_bad_image_fraction`, and what the subclass reads.
        model_fields: of the model's configuration, as recipe and flags set them.

    Raises:
        ValueError and its kin: a checkpoint that cannot be used, or that lies in `output_dir`.
    """

    IS_DENSE: ClassVar[bool] = False  # whether the model is built on a backbone

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: Any,
        args: DownstreamArguments,
        hub_args: HubArguments,
        model_fields: Mapping[str, Any],
        output_dir: Path,
    ):
        self.model_args, self.data_args, self.args, self.hub_args = model_args, data_args, args, hub_args
        self.model_fields, self.output_dir = model_fields, output_dir
        self.repo_id: str | None = None
        self.device = PartialState().device
        path = model_args.model_name_or_path
        if path is not None and output_dir.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise ValueError(f"--output_dir {output_dir} holds the model that the run starts from: take another")
        self.start = StartingModel(
            path,
            model_type=model_args.model_type,
            preset=model_args.preset,
            fields=model_fields,
            is_dense=self.IS_DENSE,
        )
        self.family = self.start.family
        config = self.start.config()
        if remark := self.family.remark(config):
            logger.info(remark)
        self.image_size, self.patch_size = config.image_size_2d, config.patch_size
        self.num_channels = config.num_channels
        known = self.start.checkpoint.channel_statistics() if self.start.checkpoint else (None, None)
        self.mean, self.std = channel_statistics(
            self.num_channels, args.image_mean or known[0], args.image_std or known[1]
        )

    # --- what a task brings -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def training_images(self) -> RowSource:
        """What is trained on."""

    @property
    @abstractmethod
    def image_processor(self) -> BaseImageProcessor:
        """What prepares images for the model that the run leaves."""

    # --- from its flags to its results ------------------------------------------------------------------------------

    def execute(self, task: Callable[[], Mapping[str, Any]], write_results: Callable[..., str]) -> int:
        """Does a task, writes its results, uploads them if the flags say so, and returns the script's exit code.

        `task` gives what `write_results` takes beside `output_dir` and `facts`.
        """
        try:
            results = task()
        except RunStopped as stop:
            logger.info("stopped by %s; --resume_from_checkpoint latest goes on", stop)
            return stop.exit_code
        if not PartialState().is_main_process:
            return 0
        groups = (self.model_args, self.data_args, self.args, self.hub_args)
        recipe = {name: value for group in groups for name, value in vars(group).items()} | dict(self.model_fields)
        print(write_results(self.output_dir, facts={**self.facts(), "recipe": recipe}, **results))
        return publish(self.output_dir, self.repo_id, self.hub_args.hub_private_repo)

    def facts(self) -> dict[str, Any]:
        """What was done, to what, and on which machine."""
        state = PartialState()
        return {
            "model_type": self.family.name,
            "model": self.model_args.model_name_or_path or self.model_args.preset or "a model of the recipe's sizes",
            "untrained": self.args.untrained,
            "seed": self.args.seed,
            "hardware": {"device": device_name(state.device), "processes": state.num_processes},
        }

    # --- models -----------------------------------------------------------------------------------------------------

    def load(self, model_class: type[Model], config: PreTrainedConfig, with_head: bool = False) -> Model:
        """The model as `StartingModel.load` makes it, and as the flags ask for."""
        model = self.start.load(
            model_class,
            config,
            untrained=self.args.untrained,
            attn_implementation=self.model_args.attn_implementation,
            with_head=with_head,
        )
        if self.model_args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def save(self, model: PreTrainedModel) -> None:
        """The model and its image processor, in the run's folder. Collective."""

        def write() -> None:
            model.save_pretrained(self.output_dir)
            self.image_processor.save_pretrained(self.output_dir)

        on_main_process(write)

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def training_loader_options(self) -> dict[str, Any]:
        """What every `TrainingLoader` of this process takes."""
        state = PartialState()
        return {
            "per_device_batch_size": self.args.per_device_train_batch_size,
            "num_processes": state.num_processes,
            "process_index": state.process_index,
            "seed": self.args.seed,
            "num_workers": self.data_args.dataloader_num_workers,
            "pin_memory": self.device.type == "cuda",
        }

    def finetuning_optimizer(self, model: Any, learning_rate: float) -> torch.optim.Optimizer:
        """AdamW with the layer decay that the flags ask for; the learning rate is that of the head."""
        args = self.args
        return build_finetuning_adamw(
            model,
            learning_rate=learning_rate,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
            betas=(args.adam_beta1, args.adam_beta2),
        )

    def steps_per_epoch(self, loader: TrainingLoader) -> int:
        """Optimiser steps."""
        return math.ceil(len(loader) / self.args.gradient_accumulation_steps)

    def total_steps(self, loader: TrainingLoader) -> int:
        """Optimiser steps of the whole run."""
        return in_steps(self.args.max_train_steps, self.args.num_train_epochs, self.steps_per_epoch(loader))

    def trainer_options(
        self, loader: TrainingLoader, optimizer: torch.optim.Optimizer, schedule: WarmupSchedule
    ) -> dict[str, Any]:
        """What every `DownstreamTrainer` that trains takes; `schedule` is of the optimiser's fastest group."""
        steps_per_epoch = self.steps_per_epoch(loader)
        logger.info(
            f"{schedule.total_steps} steps, {steps_per_epoch} an epoch, on {len(self.training_images)} images; "
            f"peak learning rate {schedule.peak:.3g} after {schedule.warmup_steps} steps"
        )
        return {
            "args": self.training_arguments(schedule.total_steps, steps_per_epoch),
            "settings": self.settings(schedule),
            "train_loader": loader,
            "optimizers": (optimizer, schedule_as_lambda(optimizer, schedule)),
            "processing_class": self.image_processor,  # every checkpoint has one
            "callbacks": [MetricsCallback(), BadImageLimit(loader, self.data_args.max_bad_image_fraction)],
        }

    def settings(self, schedule: WarmupSchedule) -> dict[str, Any]:
        """What a training's result follows from, as JSON holds it; a resumed one must have the same."""
        settings = {
            **self.model_fields,
            **compared_values(self.data_args, self.args),
            **{f"schedule.{name}": value for name, value in asdict(schedule).items()},
            "images": self.training_images.fingerprint,
            "image_mean": self.mean,
            "image_std": self.std,
            "mixed_precision": precision(self.args.mixed_precision),
            "processes": PartialState().num_processes,
        }
        return json.loads(json.dumps(settings))

    def training_arguments(
        self, total_steps: int, steps_per_epoch: int, eval_strategy: str = "steps"
    ) -> TrainingArguments:
        """Our flags as transformers' arguments."""
        args, number_type = self.args, precision(self.args.mixed_precision)
        return TrainingArguments(
            output_dir=str(self.output_dir),
            max_steps=total_steps,
            per_device_train_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm or 0.0,
            eval_strategy=eval_strategy,
            eval_steps=in_steps(args.evaluation_steps, args.evaluation_epochs, steps_per_epoch),
            save_strategy="steps",
            save_steps=in_steps(args.checkpointing_steps, args.checkpointing_epochs, steps_per_epoch),
            save_total_limit=args.checkpoints_total_limit,
            logging_steps=args.logging_steps,
            logging_nan_inf_filter=False,
            report_to=args.report_to.split(","),
            disable_tqdm=True,
            seed=args.seed,
            use_cpu=args.use_cpu,
            bf16=number_type == "bf16",
            fp16=number_type == "fp16",
            torch_compile=args.torch_compile,
            ddp_find_unused_parameters=False,
            remove_unused_columns=False,
            label_names=["labels"],
        )

    def train(self, trainer: DownstreamTrainer) -> None:
        """Trains, from a checkpoint of the run's folder if the flags say so.

        Raises:
            FloatingPointError: the loss is not finite; no model is saved.
            RunStopped: a signal asked for it; a checkpoint is saved.
        """
        checkpoint, step, resume = None, 0, self.args.resume_from_checkpoint
        if resume is not None:
            checkpoint, step = checkpoint_to_resume(self.output_dir, resume, trainer.settings)
        self.begin()
        if checkpoint is None or step < trainer.args.max_steps:
            # dropped paths differ between processes; a checkpoint holds the random state of each
            torch.manual_seed(self.args.seed + PartialState().process_index)
            trainer.train_until_stopped(checkpoint)
        else:
            logger.info("%s is of the last step: nothing is left to train", checkpoint)
            trainer.take_over(checkpoint)

    def begin(self) -> None:
        """Claims folder and repository, once everything that the run needs has been checked."""
        self.repo_id = claim_repository(self.hub_args, self.output_dir)
        if self.args.overwrite_output_dir and self.args.resume_from_checkpoint is None:
            on_main_process(lambda: clear_output_dir(self.output_dir))
