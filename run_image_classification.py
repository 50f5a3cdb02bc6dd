"""Use a pre-trained encoder: fine-tune it, probe it, or evaluate what was fine-tuned.

    python run_image_classification.py --task linear_probe    # of the demo's encoder, on embedded digits
    accelerate launch run_image_classification.py --config recipes/imagenet/classification/….yaml --output_dir out

    --task finetune      the whole model, with the augmentation and the layer decay of MAE's recipe
    --task linear_probe  a linear classifier on frozen features, trained by LARS at several learning rates at once
    --task knn           the nearest neighbours' votes on frozen features
    --task evaluate      a fine-tuned model on held-out images, on ImageNet-A, -R, -Sketch and -C, under corruptions

Exit codes: 0 done; 143 after SIGTERM and 138 after SIGUSR1 while training, with a checkpoint of that very step; 1 on
an error, or when all is done but the upload failed.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import nn
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, TrainingArguments, ViTImageProcessor

from mimae.data.arguments import PLACES
from mimae.data.augmentation import Mixing, Transform, finetuning_transform, mixing, normalized, probe_transform
from mimae.data.classification import ClassificationEvaluationLoader, ClassificationLoader
from mimae.data.processor import build_image_processor, channel_statistics
from mimae.data.sources import ImageSource
from mimae.data.subsets import SubsetSource, low_shot_indices, read_subset_file
from mimae.data.transforms import Normalization, evaluation_transform
from mimae.evaluation.metrics import TopKAccuracy
from mimae.evaluation.probes import knn_accuracies
from mimae.training.arguments import HubArguments, ModelArguments, RecipeError, flag_value, parse_arguments
from mimae.training.bad_images import BadImageLimit
from mimae.training.classes import class_names, label_map, numbered
from mimae.training.classification_arguments import ClassificationArguments, ClassificationDataArguments
from mimae.training.classification_results import write_classification_results
from mimae.training.classification_trainer import ClassificationTrainer, Tested
from mimae.training.families import CONFIG_CLASSES
from mimae.training.features import gather_features
from mimae.training.linear_probe import LinearProbe, build_probe_lars, metrics_of_heads
from mimae.training.metrics_log import MetricsLog
from mimae.training.monitors import probe_indices
from mimae.training.optimization import WarmupCosine, build_finetuning_adamw, schedule_as_lambda
from mimae.training.processes import limit_cpu_threads, on_main_process, start_logging
from mimae.training.publishing import claim_repository, publish
from mimae.training.results import device_name
from mimae.training.robustness_tests import RobustnessTest, corruption_test, imagenet_tests
from mimae.training.run_folder import claim_output_dir, clear_output_dir
from mimae.training.sealed_checkpoints import checkpoint_to_resume
from mimae.training.signals import RunStopped
from mimae.training.starting_model import StartingModel
from mimae.training.warm_start import UnfitCheckpointError

logger = logging.getLogger("mimae")

RECIPES = Path(__file__).parent / "recipes"
LR_BASE_BATCH = 256
# flags that a training's result follows from
SETTINGS = (
    "task",
    "seed",
    "untrained",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "layer_decay",
    "adam_beta1",
    "adam_beta2",
    "auto_augment",
    "random_erasing",
    "mixup",
    "cutmix",
    "label_smoothing",
    "ema_decay",
    "probe_learning_rates",
)
PICTURED_IMAGES = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one task and returns the exit code.

    Args:
        argv: flags; None = the command line.

    Raises:
        ValueError and its kin, before training starts: a flag, recipe, checkpoint or data set that cannot be used.
    """
    groups = (ModelArguments, ClassificationDataArguments, ClassificationArguments, HubArguments)
    (model_args, data_args, args, hub_args), model_fields, recipe = parse_arguments(
        argv, groups, CONFIG_CLASSES, default_recipe=default_recipe(argv), description=__doc__
    )
    output_dir = start_processes(args, recipe)
    set_seed(args.seed)
    run = ClassificationRun(model_args, data_args, args, hub_args, model_fields, output_dir)
    tasks = {"finetune": run.finetune, "linear_probe": run.linear_probe, "knn": run.knn, "evaluate": run.evaluate}
    try:
        results = tasks[args.task]()
    except RunStopped as stop:
        logger.info("stopped by %s; --resume_from_checkpoint latest goes on", stop)
        return stop.exit_code
    if not PartialState().is_main_process:
        return 0
    recipe_values = {**vars(model_args), **vars(data_args), **vars(args), **vars(hub_args), **model_fields}
    facts = {**run.facts(), "recipe": recipe_values}
    print(write_classification_results(output_dir, facts=facts, **results))
    return publish(output_dir, run.repo_id, hub_args.hub_private_repo)


def default_recipe(argv: Sequence[str] | None) -> Path:
    """Without --config: the task's recipe for digits, or for other images MAE's fine-tuning recipe."""
    if any(flag_value(argv, place) is not None for place in PLACES):
        return RECIPES / "classification.yaml"
    recipe = RECIPES / "digits" / f"{flag_value(argv, 'task')}.yaml"
    return recipe if recipe.exists() else RECIPES / "digits" / "finetune.yaml"


def start_processes(args: ClassificationArguments, recipe: Path) -> Path:
    """The run's folder, held by the main process; the first line of the log says how many processes there are."""
    # the main one may be long at converting or listing a data set, and the others wait for it
    PartialState(cpu=args.use_cpu, timeout=timedelta(hours=2))
    limit_cpu_threads(args.cpu_threads)
    start_logging(precision(args.mixed_precision), recipe)
    resumes = args.resume_from_checkpoint is not None
    return on_main_process(lambda: claim_output_dir(args.output_dir, recipe, args.overwrite_output_dir, resumes))


class ClassificationRun:
    """The four tasks, on the checkpoint and the images that the flags name."""

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: ClassificationDataArguments,
        args: ClassificationArguments,
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
            path, model_type=model_args.model_type, preset=model_args.preset, fields=model_fields
        )
        self.family, self.pooling = self.start.family, self.start.family.pooling(args.feature_pooling)
        is_model_of_probe = args.task == "linear_probe" and self.pooling == self.family.usual_pooling
        self.leaves_model = args.task == "finetune" or is_model_of_probe
        if hub_args.push_to_hub and not self.leaves_model:
            raise RecipeError(f"--push_to_hub: --task {args.task} with these flags leaves no model to push")
        config = self.start.config()
        if remark := self.family.remark(config):
            logger.info(remark)
        self.image_size, self.num_channels = config.image_size_2d, config.num_channels
        known = self.start.checkpoint.channel_statistics() if self.start.checkpoint else (None, None)
        self.mean, self.std = channel_statistics(
            self.num_channels, args.image_mean or known[0], args.image_std or known[1]
        )

    # --- tasks: each returns what `write_classification_results` takes ----------------------------------------------

    def finetune(self) -> dict[str, Any]:
        """Trains the whole model, tests it and saves it in the run's folder."""
        args = self.args
        names = class_names(self.training_images)
        model = self.load(self.family.classification_class, self.start.config(numbered(names)))
        transform = finetuning_transform(
            self.image_size,
            mean=self.mean,
            std=self.std,
            auto_augment=None if args.auto_augment == "none" else args.auto_augment,
            random_erasing=args.random_erasing,
            min_crop_scale=self.data_args.min_crop_scale,
            horizontal_flip=self.data_args.horizontal_flip,
        )
        mixed = mixing(
            len(names),
            args.per_device_train_batch_size,
            mixup=args.mixup,
            cutmix=args.cutmix,
            label_smoothing=args.label_smoothing,
        )
        loader, further = self.training_loader(transform, mixed), self.robustness_tests(names)
        learning_rate = self.scaled(args.base_learning_rate)
        optimizer = build_finetuning_adamw(
            model,
            learning_rate=learning_rate,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
            betas=(args.adam_beta1, args.adam_beta2),
        )
        trainer = self.trainer(
            model, loader, optimizer, learning_rate, accuracy_of_classes, average_decay=args.ema_decay
        )
        test = self.train_and_test(trainer)
        self.save(model)
        return self.tested(trainer, names, further, test)

    def linear_probe(self) -> dict[str, Any]:
        """Trains linear classifiers on frozen features, one for each learning rate, and tests them."""
        names = class_names(self.training_images)
        encoder = self.load_encoder()
        probe = LinearProbe(
            encoder,
            feature_size=encoder.config.hidden_size,
            num_classes=len(names),
            learning_rates=[self.scaled(rate) for rate in self.args.probe_learning_rates],
        )
        transform = probe_transform(
            self.image_size,
            mean=self.mean,
            std=self.std,
            min_crop_scale=self.data_args.min_crop_scale,
            horizontal_flip=self.data_args.horizontal_flip,
        )
        trainer = self.trainer(
            probe,
            self.training_loader(transform, None),
            build_probe_lars(probe),
            max(probe.learning_rates),
            metrics_of_heads(probe.learning_rates, accuracy_of_classes),
        )
        metrics, _, targets = self.train_and_test(trainer)
        if self.leaves_model:
            best = probe.as_linear(probe.learning_rates.index(metrics["best_learning_rate"]))
            self.save(self.probing_classifier(encoder, best, names))
        return {
            "test_images": len(targets),
            "metrics": metrics,
            "label_names": names,
            "features": self.pictured_features(encoder, names),
        }

    def knn(self) -> dict[str, Any]:
        """The weighted votes of the nearest training images."""
        names = class_names(self.training_images)
        encoder = self.load_encoder()
        label_map(self.held_out_images, names)  # raises before hours of work
        self.begin()
        train, test = self.features(encoder, self.training_images), self.features(encoder, self.held_out_images, names)
        pictured = self.pictured_features(encoder, names)
        if not PartialState().is_main_process:
            return {}
        accuracies = knn_accuracies(*train, *test, ks=self.args.knn_k, temperature=self.args.knn_temperature)
        best = max(accuracies, key=accuracies.__getitem__)
        by_k = {f"accuracy_k_{k}": accuracy for k, accuracy in accuracies.items()}
        return {
            "test_images": len(test[1]),
            "metrics": {"accuracy": accuracies[best], "best_k": best, **by_k},
            "label_names": names,
            "features": pictured,
        }

    def evaluate(self) -> dict[str, Any]:
        """Tests a classifier on the held-out images, and on the sets and corruptions that the flags name."""
        if self.start.checkpoint is None or not self.start.checkpoint.is_classifier:
            raise UnfitCheckpointError(
                f"{self.model_args.model_name_or_path} has no trained classifier: fine-tune it first, --task finetune"
            )
        config = self.start.config()
        names = [config.id2label[i] for i in range(config.num_labels)]
        model = self.load(self.family.classification_class, config, with_head=True)
        trainer, further = self.tester(model), self.robustness_tests(names)
        loader = self.evaluation_loader(self.held_out_images, names)
        self.begin()
        return self.tested(trainer, names, further, trainer.test(loader))

    def robustness_tests(self, names: Sequence[str]) -> dict[str, RobustnessTest]:
        """A test for each further set that the flags name: of a trainer's model, whose classes have these names.

        The sets are opened here: what is wrong with one is told before anything is trained.
        """
        data_args = self.data_args
        folders = {
            "imagenet_a": data_args.imagenet_a_dir,
            "imagenet_r": data_args.imagenet_r_dir,
            "imagenet_sketch": data_args.imagenet_sketch_dir,
            "imagenet_c": data_args.imagenet_c_dir,
        }
        read = {"image_size": self.image_size, "loader_of": self.evaluation_loader}
        tests = imagenet_tests(folders, names, tester_of=self.tester, **read)
        if data_args.corruptions:
            tests["corruptions"] = corruption_test(
                self.held_out_images,
                names,
                data_args.corruptions,
                crop_ratio=self.args.evaluation_crop_ratio,
                **read,
            )
        return tests

    def tested(
        self, trainer: ClassificationTrainer, names: Sequence[str], further: Mapping[str, RobustnessTest], test: Tested
    ) -> dict[str, Any]:
        """Results of a classifier: its test on the held-out images, and those on further sets."""
        metrics, classes, targets = test
        return {
            "test_images": len(targets),
            "metrics": metrics,
            "robustness": {key: further_test(trainer) for key, further_test in further.items()},
            "label_names": names,
            "predictions": (targets, classes[:, 0]),
            "features": self.pictured_features(trainer.model, names),
        }

    # --- images -----------------------------------------------------------------------------------------------------

    @cached_property
    def training_images(self) -> ImageSource:
        """The training split, or the part of it that the flags choose."""
        data_args = self.data_args
        with PartialState().main_process_first():
            source = data_args.open_split(data_args.train_split)
        if data_args.train_fraction is not None:
            indices = low_shot_indices(source.labels(), data_args.train_fraction, self.args.seed, source.label_names)
            return SubsetSource(source, indices)
        if data_args.train_subset_file is not None:
            return SubsetSource(source, read_subset_file(data_args.train_subset_file, source))
        return source

    @cached_property
    def held_out_images(self) -> ImageSource:
        """What is tested on.

        Raises:
            ValueError: there is nothing.
        """
        with PartialState().main_process_first():
            source = self.data_args.open_held_out()
        if source is None:
            raise ValueError(
                "there are no images to test on: give --validation_split, --validation_dir or --validation_files"
            )
        source.labels()  # all have one, or it is told now and not after the training
        return source

    def training_loader(self, transform: Transform, mixed: Mixing | None) -> ClassificationLoader:
        """Training batches for this process."""
        state = PartialState()
        return ClassificationLoader(
            self.training_images,
            transform=transform,
            num_channels=self.num_channels,
            per_device_batch_size=self.args.per_device_train_batch_size,
            mixing=mixed,
            num_processes=state.num_processes,
            process_index=state.process_index,
            seed=self.args.seed,
            num_workers=self.data_args.dataloader_num_workers,
            shuffle_window=self.data_args.shuffle_window,
            pin_memory=self.device.type == "cuda",
        )

    def evaluation_loader(
        self, source: ImageSource, names: Sequence[str], transform: nn.Module | None = None
    ) -> ClassificationEvaluationLoader:
        """Test batches for this process; labels are places in `names`, and `transform` replaces the usual crop."""
        state = PartialState()
        transform = transform or self.evaluation_transform
        return ClassificationEvaluationLoader(
            source,
            transform=normalized(transform, mean=self.mean, std=self.std),
            num_channels=self.num_channels,
            batch_size=self.args.per_device_eval_batch_size or self.args.per_device_train_batch_size,
            label_map=label_map(source, names),
            num_processes=state.num_processes,
            process_index=state.process_index,
            num_workers=self.data_args.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
        )

    @property
    def image_processor(self) -> ViTImageProcessor:
        return build_image_processor(self.image_size, self.mean, self.std)

    @property
    def evaluation_transform(self) -> nn.Module:
        return evaluation_transform(self.image_size, crop_ratio=self.args.evaluation_crop_ratio)

    # --- models -----------------------------------------------------------------------------------------------------

    def load_encoder(self) -> PreTrainedModel:
        """The encoder, whose `pooler_output` is pooled as the flags say."""
        return self.load(self.family.encoder_class, self.start.config(**self.family.poolings[self.pooling]))

    def load(
        self, model_class: type[PreTrainedModel], config: PreTrainedConfig, with_head: bool = False
    ) -> PreTrainedModel:
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

    def probing_classifier(self, encoder: PreTrainedModel, linear: nn.Linear, names: Sequence[str]) -> PreTrainedModel:
        """A frozen encoder and what a probe has learned on its features, as one model."""
        config = self.start.config(numbered(names), **self.family.poolings[self.pooling])
        model = self.family.classification_class(config)
        model.base_model.load_state_dict(encoder.state_dict())
        model.classifier.load_state_dict(linear.state_dict())
        return model

    def scaled(self, base_learning_rate: float) -> float:
        """lr = base · images of a step / 256."""
        args = self.args
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
        return base_learning_rate * batch / LR_BASE_BATCH

    # --- training and testing ---------------------------------------------------------------------------------------

    def trainer(
        self,
        model: nn.Module,
        loader: ClassificationLoader,
        optimizer: torch.optim.Optimizer,
        learning_rate: float,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]],
        **options: Any,
    ) -> ClassificationTrainer:
        """A Trainer with the schedule of all trainings here: linear warm-up, half-cosine, both per step.

        Args:
            learning_rate: the peak, of the optimiser's fastest group.
        """
        args = self.args
        steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
        schedule = WarmupCosine(
            peak=learning_rate,
            start=min(args.warmup_learning_rate, learning_rate),
            final=min(args.min_learning_rate, learning_rate),
            warmup_steps=round(args.warmup_epochs * steps_per_epoch),
            total_steps=args.max_train_steps or max(1, round(args.num_train_epochs * steps_per_epoch)),
        )
        logger.info(
            "%d steps, %d an epoch, on %d images; peak learning rate %.3g after %d steps",
            schedule.total_steps,
            steps_per_epoch,
            len(self.training_images),
            learning_rate,
            schedule.warmup_steps,
        )
        return ClassificationTrainer(
            model,
            self.training_arguments(schedule.total_steps, steps_per_epoch),
            settings=self.settings(schedule),
            train_loader=loader,
            eval_loader=self.evaluation_loader(self.held_out_images, class_names(self.training_images)),
            optimizers=(optimizer, schedule_as_lambda(optimizer, schedule)),
            compute_metrics=compute_metrics,
            processing_class=self.image_processor,  # every checkpoint has one
            callbacks=[MetricsLog(), BadImageLimit(loader, self.data_args.max_bad_image_fraction)],
            **options,
        )

    def settings(self, schedule: WarmupCosine) -> dict[str, Any]:
        """What a training's result follows from, as JSON holds it; a resumed one must have the same."""
        settings = {
            **self.model_fields,
            **{name: getattr(self.args, name) for name in SETTINGS},
            "feature_pooling": self.pooling,
            **{name: getattr(self.data_args, name) for name in ("min_crop_scale", "horizontal_flip")},
            **{f"schedule.{name}": value for name, value in asdict(schedule).items()},
            "images": self.training_images.fingerprint,
            "shuffle_window": self.data_args.shuffle_window if self.training_images.reads_blocks else None,
            "image_mean": self.mean,
            "image_std": self.std,
            "mixed_precision": precision(self.args.mixed_precision),
            "processes": PartialState().num_processes,
        }
        return json.loads(json.dumps(settings))

    def training_arguments(
        self, total_steps: int, steps_per_epoch: int, eval_strategy: str = "steps"
    ) -> TrainingArguments:
        """Our flags in the words of transformers."""
        args = self.args

        def interval(steps: int | None, epochs: float) -> int:
            return steps or max(1, round(epochs * steps_per_epoch))

        return TrainingArguments(
            output_dir=str(self.output_dir),
            max_steps=total_steps,
            per_device_train_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm or 0.0,
            eval_strategy=eval_strategy,
            eval_steps=interval(args.evaluation_steps, args.evaluation_epochs),
            save_strategy="steps",
            save_steps=interval(args.checkpointing_steps, args.checkpointing_epochs),
            save_total_limit=args.checkpoints_total_limit,
            logging_steps=args.logging_steps,
            logging_nan_inf_filter=False,
            report_to=args.report_to.split(","),
            disable_tqdm=True,
            seed=args.seed,
            use_cpu=args.use_cpu,
            bf16=precision(args.mixed_precision) == "bf16",
            fp16=precision(args.mixed_precision) == "fp16",
            torch_compile=args.torch_compile,
            ddp_find_unused_parameters=False,
            remove_unused_columns=False,
            label_names=["labels"],
        )

    def train_and_test(self, trainer: ClassificationTrainer) -> Tested:
        """Trains, from a checkpoint of the run's folder if the flags say so, and tests what came of it.

        Raises:
            FloatingPointError: the loss is not finite; no model is saved.
            RunStopped: a signal asked for it; a checkpoint is saved.
        """
        checkpoint, step = None, 0
        if self.args.resume_from_checkpoint is not None:
            checkpoint, step = checkpoint_to_resume(
                self.output_dir, self.args.resume_from_checkpoint, trainer.settings
            )
        self.begin()
        if step < trainer.args.max_steps:
            # dropped paths differ between processes; a checkpoint holds the random state of each
            torch.manual_seed(self.args.seed + PartialState().process_index)
            trainer.train_until_stopped(checkpoint)
        else:
            logger.info("%s is of the last step: nothing is left to train", checkpoint)
            trainer.take_over(checkpoint)
        metrics, classes, targets = trainer.test(trainer.eval_dataset)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the loss on held-out images is {metrics['loss']}, and no model is saved; a lower learning rate may "
                "help, a longer warm-up, or float32"
            )
        return metrics, classes, targets

    def begin(self) -> None:
        """Takes folder and repository into use: not before all that the run needs has been found good."""
        hub = self.hub_args
        self.repo_id = claim_repository(hub.push_to_hub, hub.hub_model_id, hub.hub_private_repo, self.output_dir)
        if self.args.overwrite_output_dir and self.args.resume_from_checkpoint is None:
            on_main_process(lambda: clear_output_dir(self.output_dir))

    def tester(self, model: nn.Module) -> ClassificationTrainer:
        """A Trainer that trains nothing."""
        return ClassificationTrainer(
            model,
            self.training_arguments(total_steps=1, steps_per_epoch=1, eval_strategy="no"),
            compute_metrics=accuracy_of_classes,
        )

    def features(
        self,
        model: nn.Module,
        source: ImageSource,
        names: Sequence[str] | None = None,
        indices: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, D) and labels (n,) of images, all by default; labels are places in `names`, or as they are."""
        features, labels = gather_features(
            model.to(self.device),
            source,
            np.arange(len(source)) if indices is None else indices,
            normalize=Normalization(self.mean, self.std, self.device),
            read={
                "transform": self.evaluation_transform,
                "num_channels": self.num_channels,
                "batch_size": self.args.per_device_eval_batch_size or self.args.per_device_train_batch_size,
                "num_workers": self.data_args.dataloader_num_workers,
            },
        )
        return features, labels if names is None else label_map(source, names)[labels]

    def pictured_features(self, model: nn.Module, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels of a part of the held-out images, for their map."""
        return self.features(model, self.held_out_images, names, probe_indices(self.held_out_images, PICTURED_IMAGES))

    # --- what is kept -----------------------------------------------------------------------------------------------

    def save(self, model: PreTrainedModel) -> None:
        """The model and its image processor, in the run's folder."""
        if PartialState().is_main_process:
            model.save_pretrained(self.output_dir)
            self.image_processor.save_pretrained(self.output_dir)

    def facts(self) -> dict[str, Any]:
        """What was done, to what, and on which machine."""
        state, data_args = PartialState(), self.data_args
        return {
            "task": self.args.task,
            "model_type": self.start.family.name,
            "model": self.model_args.model_name_or_path or self.model_args.preset or "a model of the recipe's sizes",
            "untrained": self.args.untrained,
            "dataset": "local images" if data_args.is_local else data_args.dataset_name or "digits",
            "training_images": None if self.args.task == "evaluate" else len(self.training_images),
            "seed": self.args.seed,
            "hardware": {"device": device_name(state.device), "processes": state.num_processes},
        }


def precision(mixed_precision: str | None) -> str:
    """The flag's, or what `accelerate launch` and its configuration say."""
    return mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def accuracy_of_classes(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 accuracy of ranked classes (n, 5)."""
    return TopKAccuracy().compute(predictions=prediction.predictions, references=prediction.label_ids)


if __name__ == "__main__":
    sys.exit(main())
