"""Pre-train with MI-MAE or MI-SimMIM, plain MAE or SimMIM: arguments → data, model, trainer → result.

    accelerate launch run_mim_pretrain.py                                     # the demo, on embedded digits
    accelerate launch run_mim_pretrain.py --model_type misimmim               # the same on a Swin
    accelerate launch run_mim_pretrain.py --config recipes/imagenet/mimae_vit_base_200e.yaml --output_dir out
    accelerate launch run_mim_pretrain.py --config … --output_dir out --resume_from_checkpoint latest

Exit codes: 0 done; 143 after SIGTERM and 138 after SIGUSR1, with a checkpoint of that very step; 1 on an error,
with a checkpoint of the last whole step where images cannot be read.
"""

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

from mimae.configuration_mim import MIMConfigMixin
from mimae.data.batches.loaders import PretrainingLoader, evaluation_batches
from mimae.data.images.transforms import (
    Normalization,
    build_image_processor,
    channel_statistics,
    evaluation_transform,
    pretraining_transform,
)
from mimae.data.sources.opening import ImageSource
from mimae.families.family import Family
from mimae.families.registry import CONFIG_CLASSES, family_named
from mimae.families.warm_start import compare_with_checkpoint, pretraining_model
from mimae.flags.data import DataArguments
from mimae.flags.model import ModelArguments
from mimae.flags.model_fields import config_fields
from mimae.flags.option import compared_values
from mimae.flags.pretraining import PretrainingArguments
from mimae.flags.recipes import flag_value, parse_arguments
from mimae.flags.scripts import PRETRAINING
from mimae.jobs.monitors import Evaluation, Probe, ReconstructionMonitor, probe_indices
from mimae.jobs.publishing import claim_repository, publish
from mimae.jobs.results import device_name, write_results
from mimae.jobs.run_folder import clear_output_dir, run_name
from mimae.jobs.start import start_processes
from mimae.modeling_mim import MIMForPreTrainingMixin
from mimae.training.attention import default_attention
from mimae.training.checkpoints.store import CheckpointStore
from mimae.training.optimization import (
    WarmupCosine,
    WarmupMultiStep,
    WarmupSchedule,
    build_adamw,
    in_steps,
    scaled_learning_rate,
)
from mimae.training.processes import main_process_first, on_main_process, together
from mimae.training.protocols import TrainingObserver
from mimae.training.signals import RunStopped
from mimae.training.trainer import Intervals, Pretrainer

logger = logging.getLogger("mimae")

RECIPES = Path(__file__).parent / "recipes"
NUM_PICTURES = 8


def main(argv: Sequence[str] | None = None, observer: TrainingObserver | None = None) -> int:
    """Runs one pre-training and returns the exit code.

    Args:
        argv: flags; None = the command line.
        observer: is told what the training does.

    Raises:
        ValueError and its kin, before training starts: a flag, recipe, data set or folder that cannot be used.
    """
    default_recipe = RECIPES / family_named(flag_value(argv, "model_type")).default_recipe
    (model_args, data_args, args, hub_args), model_fields, recipe = parse_arguments(
        argv, PRETRAINING, CONFIG_CLASSES, default_recipe=default_recipe, description=__doc__
    )
    family = family_named(model_args.model_type)
    config = family.build_config(model_args.preset, model_fields)
    start = None if args.resume_from_checkpoint is not None else model_args.model_name_or_path
    remarks = [] if start is None else compare_with_checkpoint(family, config, start)
    output_dir = start_processes(args, recipe)
    accelerator = build_accelerator(args, output_dir)
    for remark in remarks:
        logger.info("warm start: %s", remark)
    set_seed(args.seed)
    source, probe_source = main_process_first(
        lambda: (data_args.open_split(data_args.train_split), data_args.open_held_out())
    )
    model = build_model(family, config, model_args, start, accelerator)
    mean, std = channel_statistics(config.num_channels, args.image_mean, args.image_std)
    normalization = Normalization(mean, std, accelerator.device)
    processor = build_image_processor(config.image_size_2d, mean, std)
    loader = build_loader(source, config, data_args, args, accelerator)
    steps_per_epoch = loader.samples_used // loader.images_per_step
    schedule = build_schedule(args, steps_per_epoch, loader.images_per_step, config.num_views)
    evaluation = build_evaluation(source, probe_source, config, data_args, args, normalization, output_dir)

    def save_model(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    repo_id = claim_repository(hub_args, output_dir)
    if args.torch_compile:
        model.compile()
    checkpoints = CheckpointStore(output_dir, args.checkpoints_total_limit)
    trainer = Pretrainer(
        accelerator=accelerator,
        model=model,
        optimizer=build_adamw(model, weight_decay=args.weight_decay, betas=(args.adam_beta1, args.adam_beta2)),
        loader=loader,
        normalize=normalization,
        schedule=schedule,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm,
        max_nonfinite_steps=args.max_nonfinite_steps,
        intervals=Intervals(
            logging=args.logging_steps,
            checkpointing=in_steps(args.checkpointing_steps, args.checkpointing_epochs, steps_per_epoch),
            evaluation=in_steps(args.evaluation_steps, args.evaluation_epochs, steps_per_epoch),
        ),
        output_dir=output_dir,
        checkpoints=checkpoints,
        settings=run_settings(data_args, args, config, normalization, loader, schedule, accelerator),
        save_model=save_model,
        evaluate=partial(evaluation, model, accelerator),
        max_bad_image_fraction=data_args.max_bad_image_fraction,
        observer=observer,
    )
    if args.resume_from_checkpoint is not None:
        trainer.resume(on_main_process(lambda: checkpoints.resolve(args.resume_from_checkpoint)))
    elif args.overwrite_output_dir:
        on_main_process(lambda: clear_output_dir(output_dir))
    plain = {name: value for name, value in trainer.settings.items() if isinstance(value, int | float | str)}
    together(lambda: accelerator.init_trackers("mimae", config={"recipe": run_name(recipe), **plain}))

    started = time.perf_counter()
    try:
        trainer.train()
    except RunStopped as stop:
        remedy = "; --resume_from_checkpoint latest goes on" if trainer.progress.step else ", with nothing to save"
        logger.info("stopped by %s at step %d%s", stop, trainer.progress.step, remedy)
        return stop.exit_code
    finally:
        accelerator.end_training()
    if accelerator.is_main_process:
        save_model(output_dir)
        facts = {
            **facts_of(model_args, data_args, config, trainer),
            **{"epochs": trainer.progress.step / steps_per_epoch, "seed": args.seed},
            "seconds": time.perf_counter() - started,
            "recipe": {**vars(model_args), **vars(data_args), **vars(args), **vars(hub_args), **model_fields},
        }
        picture = evaluation.newest_picture
        print(write_results(output_dir, facts=facts, loss_terms=model.loss_terms, picture=picture))
        return publish(output_dir, repo_id, hub_args.hub_private_repo)
    return 0


def build_model(
    family: Family, config: MIMConfigMixin, model_args: ModelArguments, start: str | None, accelerator: Accelerator
) -> MIMForPreTrainingMixin:
    """The model, from scratch or with the weights of the checkpoint `start`."""
    attention = model_args.attn_implementation or default_attention(accelerator.device, accelerator.mixed_precision)
    model = pretraining_model(family, config, start, attention)
    logger.info("attention: %s", model.config._attn_implementation)
    if model_args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def build_accelerator(args: PretrainingArguments, output_dir: Path) -> Accelerator:
    """Device, precision and trackers; the processes have met already."""
    return Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to.split(","),
        # not output_dir itself: a folder "mimae" in it would hide the package from whoever works there
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / "tensorboard"),
    )


def build_loader(
    source: ImageSource,
    config: MIMConfigMixin,
    data_args: DataArguments,
    args: PretrainingArguments,
    accelerator: Accelerator,
) -> PretrainingLoader:
    """Batches for this process."""
    global_batch_size = args.per_device_train_batch_size * accelerator.num_processes
    return PretrainingLoader(
        source,
        transform=pretraining_transform(
            config.image_size_2d,
            min_scale=data_args.min_crop_scale,
            horizontal_flip=data_args.horizontal_flip,
            interpolation=args.crop_interpolation,
        ),
        num_channels=config.num_channels,
        noise_shape=config.noise_shape,
        per_device_batch_size=args.per_device_train_batch_size,
        images_per_step=global_batch_size * args.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        seed=args.seed,
        num_workers=data_args.dataloader_num_workers,
        shuffle_window=data_args.shuffle_window,
        samples_per_epoch=data_args.samples_per_epoch,
        pin_memory=accelerator.device.type == "cuda",
    )


def build_schedule(
    args: PretrainingArguments, steps_per_epoch: int, images_per_step: int, num_views: int
) -> WarmupSchedule:
    """Learning rate and length of the run."""
    warmup_steps = args.warmup_steps
    common: dict[str, Any] = {
        "peak": scaled_learning_rate(
            args.base_learning_rate, images_per_step, num_views, args.lr_batch_unit, args.lr_base_batch
        ),
        "start": args.warmup_learning_rate,
        "warmup_steps": round(args.warmup_epochs * steps_per_epoch) if warmup_steps is None else warmup_steps,
        "total_steps": in_steps(args.max_train_steps, args.num_train_epochs, steps_per_epoch),
    }
    if args.lr_scheduler_type == "multistep":
        milestones = tuple(round(epoch * steps_per_epoch) for epoch in args.lr_milestone_epochs or ())
        schedule: WarmupSchedule = WarmupMultiStep(**common, milestones=milestones, gamma=args.lr_gamma)
    else:
        schedule = WarmupCosine(**common, final=args.min_learning_rate)
    logger.info(
        f"{schedule.total_steps} steps, {steps_per_epoch} an epoch, of {images_per_step} images "
        f"({images_per_step * num_views} views); "
        f"peak learning rate {schedule.peak:.3g} after {schedule.warmup_steps} steps"
    )
    return schedule


def build_evaluation(
    source: ImageSource,
    probe_source: ImageSource | None,
    config: MIMConfigMixin,
    data_args: DataArguments,
    args: PretrainingArguments,
    normalization: Normalization,
    output_dir: Path,
) -> Evaluation:
    """Pictures of a few images, and a probe where there are labels."""
    read: dict[str, Any] = {
        "transform": evaluation_transform(config.image_size_2d, crop_ratio=args.evaluation_crop_ratio),
        "num_channels": config.num_channels,
        "batch_size": args.per_device_train_batch_size,
        "num_workers": data_args.dataloader_num_workers,
    }
    held_out = probe_source or source
    shown = probe_indices(held_out, NUM_PICTURES)
    batch = next(evaluation_batches(held_out, indices=shown, **{**read, "num_workers": 0}), None)
    if batch is None:
        raise ValueError(f"none of {len(shown)} images can be decoded, beginning with {held_out.describe(shown[0])}")
    noise = torch.rand(len(batch["labels"]), *config.noise_shape, generator=torch.Generator().manual_seed(args.seed))
    pictures = ReconstructionMonitor(batch["pixel_values"], noise, normalization)

    probe = None
    if not (args.probe_samples and source.has_labels and held_out.has_labels):
        logger.info("no probe: %s", "the images have no labels" if args.probe_samples else "--probe_samples 0")
    elif source.label_names != held_out.label_names:
        raise ValueError(
            f"the validation images have the classes {held_out.label_names}, the training images "
            f"{source.label_names}: give the same to both, or --probe_samples 0 for no probe"
        )
    else:
        indices = probe_indices(source, args.probe_samples), probe_indices(held_out, args.probe_samples)
        if held_out is source:
            indices = indices[0][::2], indices[0][1::2]
            logger.info(
                "no validation split: the probe is fitted on one half of its training images, tested on the other"
            )
        probe = Probe(source, indices[0], held_out, indices[1], normalize=normalization, read=read)
    return Evaluation(output_dir / "reconstructions", pictures, probe)


def run_settings(
    data_args: DataArguments,
    args: PretrainingArguments,
    config: MIMConfigMixin,
    normalization: Normalization,
    loader: PretrainingLoader,
    schedule: WarmupSchedule,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What a run's result follows from, as JSON holds it; a resumed run must have the same."""
    settings = {
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in config_fields(type(config))},
        **compared_values(data_args, args),
        **{f"schedule.{name}": value for name, value in asdict(schedule).items()},
        "images": loader.source.fingerprint,
        "images_per_epoch": loader.num_samples,
        "images_per_forward": loader.global_batch_size,
        "shuffle_window": data_args.shuffle_window if loader.source.reads_blocks else None,
        "image_mean": normalization.mean,
        "image_std": normalization.std,
        "mixed_precision": accelerator.mixed_precision,
    }
    if not config.gather_negatives:
        settings["per_device_train_batch_size"] = args.per_device_train_batch_size
    return json.loads(json.dumps(settings))


def facts_of(
    model_args: ModelArguments, data_args: DataArguments, config: MIMConfigMixin, trainer: Pretrainer
) -> dict[str, Any]:
    """Facts of a finished run, for the card and the terminal."""
    accelerator = trainer.accelerator
    return {
        "task": "pretraining",
        "model_type": config.model_type,
        "model": model_args.model_name_or_path or model_args.preset or "a model of the recipe's sizes",
        "dataset": data_args.dataset_name
        or ("local images" if data_args.train_dir or data_args.data_files else "digits"),
        "num_images": trainer.loader.num_samples,
        "steps": trainer.progress.step,
        "hardware": {"device": device_name(accelerator.device), "processes": accelerator.num_processes},
        "gate_opened_at_step": trainer.meter.gate_opened_at,
        "gate_threshold": config.mi_gate_threshold,
        "information_terms": config.mi_max_weight > 0 or config.mi_min_weight > 0,
        "skipped_steps": trainer.meter.skipped_steps,
        "bad_images": trainer.bad_images.count,
    }


if __name__ == "__main__":
    sys.exit(main())
