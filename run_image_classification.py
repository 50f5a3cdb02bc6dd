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

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import nn
from transformers import EvalPrediction, ViTImageProcessor

from mimae.data.batches.classification import ClassificationEvaluationLoader, ClassificationLoader
from mimae.data.images.augmentation import Mixing, Transform, finetuning_transform, mixing, normalized, probe_transform
from mimae.data.images.transforms import Normalization, build_image_processor, evaluation_transform
from mimae.data.sources.opening import ImageSource
from mimae.data.sources.subsets import SubsetSource, low_shot_indices, read_subset_file
from mimae.evaluation.metrics import TopKAccuracy
from mimae.evaluation.probes import knn_accuracies
from mimae.evaluation.robustness import class_names, label_map, numbered
from mimae.families.registry import CONFIG_CLASSES
from mimae.families.warm_start import UnfitCheckpointError
from mimae.flags.classification import ClassificationArguments, ClassificationDataArguments
from mimae.flags.option import RecipeError
from mimae.flags.recipes import flag_value, names_images, parse_arguments
from mimae.flags.scripts import CLASSIFICATION
from mimae.jobs.downstream import DownstreamRun
from mimae.jobs.downstream_results import write_classification_results
from mimae.jobs.monitors import gather_features, probe_indices
from mimae.jobs.robustness import RobustnessTest, corruption_test, imagenet_tests
from mimae.jobs.start import start_processes
from mimae.modeling_mim import MIMEncoderMixin, MIMForImageClassificationMixin
from mimae.training.hf_trainer.classification import ClassificationTrainer, Tested
from mimae.training.linear_probe import LinearProbe, build_probe_lars, metrics_of_heads
from mimae.training.optimization import WarmupCosine, WarmupSchedule
from mimae.training.processes import main_process_first

logger = logging.getLogger("mimae")

RECIPES = Path(__file__).parent / "recipes"
LR_BASE_BATCH = 256
PICTURED_IMAGES = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one task and returns the exit code.

    Args:
        argv: flags; None = the command line.

    Raises:
        ValueError and its kin, before training starts: a flag, recipe, checkpoint or data set that cannot be used.
    """
    (model_args, data_args, args, hub_args), model_fields, recipe = parse_arguments(
        argv, CLASSIFICATION, CONFIG_CLASSES, default_recipe=default_recipe(argv), description=__doc__
    )
    output_dir = start_processes(args, recipe)
    set_seed(args.seed)
    run = ClassificationRun(model_args, data_args, args, hub_args, model_fields, output_dir)
    tasks = {"finetune": run.finetune, "linear_probe": run.linear_probe, "knn": run.knn, "evaluate": run.evaluate}
    return run.execute(tasks[args.task], write_classification_results)


def default_recipe(argv: Sequence[str] | None) -> Path:
    """Without --config: the task's recipe for digits, or for other images MAE's fine-tuning recipe."""
    if names_images(argv, CLASSIFICATION):
        return RECIPES / "classification.yaml"
    recipe = RECIPES / "digits" / f"{flag_value(argv, 'task')}.yaml"
    return recipe if recipe.exists() else RECIPES / "digits" / "finetune.yaml"


class ClassificationRun(DownstreamRun):
    """The four tasks, on the checkpoint and the images that the flags name."""

    data_args: ClassificationDataArguments
    args: ClassificationArguments

    def __init__(self, *groups: Any):
        super().__init__(*groups)
        task = self.args.task
        self.pooling = self.family.pooling(self.args.feature_pooling)
        is_model_of_probe = task == "linear_probe" and self.pooling == self.family.usual_pooling
        self.leaves_model = task == "finetune" or is_model_of_probe
        if self.hub_args.push_to_hub and not self.leaves_model:
            raise RecipeError(f"--push_to_hub: --task {task} with these flags leaves no model to push")

    # --- tasks: each returns what `write_classification_results` takes ----------------------------------------------

    def finetune(self) -> dict[str, Any]:
        """Trains the whole model, tests it and saves it in the run's folder."""
        args = self.args
        names = class_names(self.training_images)
        model = self.load(self.family.classification_class, self.start.config(numbered(names)))
        transform = finetuning_transform(
            self.image_size,
            auto_augment=None if args.auto_augment == "none" else args.auto_augment,
            random_erasing=args.random_erasing,
            **self.training_crop,
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
        optimizer = self.finetuning_optimizer(model, learning_rate)
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
        trainer = self.trainer(
            probe,
            self.training_loader(probe_transform(self.image_size, **self.training_crop), None),
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

        The sets are opened here, so that errors are reported before anything is trained.
        """
        data_args = self.data_args
        sets = ("imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_c")
        folders = {name: getattr(data_args, f"{name}_dir") for name in sets}
        read: dict[str, Any] = {"image_size": self.image_size, "loader_of": self.evaluation_loader}
        tests = imagenet_tests(folders, names, tester_of=self.tester, **read)
        if data_args.corruptions:
            read["crop_ratio"] = self.args.evaluation_crop_ratio
            tests["corruptions"] = corruption_test(self.held_out_images, names, data_args.corruptions, **read)
        return tests

    def tested(
        self, trainer: ClassificationTrainer, names: Sequence[str], further: Mapping[str, RobustnessTest], test: Tested
    ) -> dict[str, Any]:
        """Results of a classifier: its test on the held-out images, and those on further sets."""
        metrics, classes, targets = test
        classifier: Any = trainer.model
        return {
            "test_images": len(targets),
            "metrics": metrics,
            "robustness": {key: further_test(trainer) for key, further_test in further.items()},
            "label_names": names,
            "predictions": (targets, classes[:, 0]),
            "features": self.pictured_features(classifier, names),
        }

    # --- images -----------------------------------------------------------------------------------------------------

    @cached_property
    def training_images(self) -> ImageSource:
        """The training split, or the part of it that the flags choose."""
        data_args = self.data_args
        source = main_process_first(lambda: data_args.open_split(data_args.train_split))
        if data_args.train_fraction is not None:
            indices = low_shot_indices(source.labels(), data_args.train_fraction, self.args.seed, source.label_names)
            return SubsetSource(source, indices)
        if data_args.train_subset_file is not None:
            return SubsetSource(source, read_subset_file(data_args.train_subset_file, source))
        return source

    @cached_property
    def held_out_images(self) -> ImageSource:
        """The held-out images.

        Raises:
            ValueError: there is nothing.
        """
        source = main_process_first(self.data_args.open_held_out)
        if source is None:
            raise ValueError(
                "there are no images to test on: give --validation_split, --validation_dir or --validation_files"
            )
        source.labels()  # all have one, or it is told now and not after the training
        return source

    def training_loader(self, transform: Transform, mixed: Mixing | None) -> ClassificationLoader:
        """Training batches for this process."""
        return ClassificationLoader(
            self.training_images,
            transform=transform,
            num_channels=self.num_channels,
            mixing=mixed,
            shuffle_window=self.data_args.shuffle_window,
            **self.training_loader_options,
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
            label_map=label_map(source, names),
            num_processes=state.num_processes,
            process_index=state.process_index,
            **self.evaluation_reading,
            pin_memory=self.device.type == "cuda",
        )

    @property
    def image_processor(self) -> ViTImageProcessor:
        """Resizes to the model's size, and normalises."""
        return build_image_processor(self.image_size, self.mean, self.std)

    @property
    def training_crop(self) -> dict[str, Any]:
        """What every transform of training images takes."""
        flip, scale = self.data_args.horizontal_flip, self.data_args.min_crop_scale
        return {"mean": self.mean, "std": self.std, "min_crop_scale": scale, "horizontal_flip": flip}

    @property
    def evaluation_reading(self) -> dict[str, Any]:
        """How test images are read, but for their transform."""
        return {
            "num_channels": self.num_channels,
            "batch_size": self.args.per_device_eval_batch_size or self.args.per_device_train_batch_size,
            "num_workers": self.data_args.dataloader_num_workers,
        }

    @property
    def evaluation_transform(self) -> nn.Module:
        return evaluation_transform(self.image_size, crop_ratio=self.args.evaluation_crop_ratio)

    # --- models -----------------------------------------------------------------------------------------------------

    def load_encoder(self) -> MIMEncoderMixin:
        """The encoder, whose `pooler_output` is pooled as the flags say."""
        return self.load(self.family.encoder_class, self.start.config(**self.family.poolings[self.pooling]))

    def probing_classifier(
        self, encoder: MIMEncoderMixin, linear: nn.Linear, names: Sequence[str]
    ) -> MIMForImageClassificationMixin:
        """A frozen encoder and the classifier probed on its features, as one model."""
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
        """A Trainer with a linear warm-up to the learning rate of the optimiser's fastest group, and a half-cosine."""
        args = self.args
        schedule = WarmupCosine(
            peak=learning_rate,
            start=min(args.warmup_learning_rate, learning_rate),
            final=min(args.min_learning_rate, learning_rate),
            warmup_steps=round(args.warmup_epochs * self.steps_per_epoch(loader)),
            total_steps=self.total_steps(loader),
        )
        return ClassificationTrainer(
            model,
            eval_loader=self.evaluation_loader(self.held_out_images, class_names(self.training_images)),
            compute_metrics=compute_metrics,
            **self.trainer_options(loader, optimizer, schedule),
            **options,
        )

    def settings(self, schedule: WarmupSchedule) -> dict[str, Any]:
        """Those of any training, the pooling of features, and how many rows of a stream are shuffled together."""
        return {
            **super().settings(schedule),
            "feature_pooling": self.pooling,
            "shuffle_window": self.data_args.shuffle_window if self.training_images.reads_blocks else None,
        }

    def train_and_test(self, trainer: ClassificationTrainer) -> Tested:
        """Trains the model and tests it.

        Raises:
            FloatingPointError, RunStopped: see `train`; also where the loss on held-out images is not finite.
        """
        self.train(trainer)
        metrics, classes, targets = trainer.test(trainer.eval_dataset)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the loss on held-out images is {metrics['loss']}, and no model is saved; a lower learning rate may "
                "help, a longer warm-up, or float32"
            )
        return metrics, classes, targets

    def tester(self, model: nn.Module) -> ClassificationTrainer:
        """A Trainer that trains nothing."""
        return ClassificationTrainer(
            model,
            self.training_arguments(total_steps=1, steps_per_epoch=1, eval_strategy="no"),
            compute_metrics=accuracy_of_classes,
        )

    def features(
        self,
        model: MIMEncoderMixin | MIMForImageClassificationMixin,
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
            read={"transform": self.evaluation_transform, **self.evaluation_reading},
        )
        return features, labels if names is None else label_map(source, names)[labels]

    def pictured_features(
        self, model: MIMEncoderMixin | MIMForImageClassificationMixin, names: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels of a part of the held-out images, for their map."""
        return self.features(model, self.held_out_images, names, probe_indices(self.held_out_images, PICTURED_IMAGES))

    def facts(self) -> dict[str, Any]:
        """Those of any run, and the images."""
        data_args = self.data_args
        return {
            "task": self.args.task,
            **super().facts(),
            "dataset": "local images" if data_args.is_local else data_args.dataset_name or "digits",
            "training_images": None if self.args.task == "evaluate" else len(self.training_images),
        }


def accuracy_of_classes(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 accuracy of ranked classes (n, 5)."""
    return TopKAccuracy().compute(predictions=prediction.predictions, references=prediction.label_ids)


if __name__ == "__main__":
    sys.exit(main())
