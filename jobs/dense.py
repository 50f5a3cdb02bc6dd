"""What segmentation and detection have in common: a model on a backbone, trained, tested and shown in a picture."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedModel

from ..data.batches.dense import DenseEvaluationLoader, DenseLoader, DenseSample
from ..data.images.transforms import DenseTransform
from ..data.sources.dense import DenseSource
from ..dense.model import DenseModelMixin
from ..families.registry import CONFIG_CLASSES
from ..flags.data import ReadingArguments
from ..flags.dense import DenseArguments
from ..flags.option import RecipeError
from ..flags.recipes import parse_arguments
from ..training.hf_trainer.dense import DenseTrainer
from ..training.optimization import WarmupSchedule
from ..training.processes import everywhere, on_main_process
from .downstream import DownstreamRun
from .downstream_results import write_dense_results
from .start import start_processes

PICTURED_IMAGES = 8
PICTURE = "predictions.png"


class DenseRun(DownstreamRun):
    """One run of a dense task, by what `DownstreamRun` takes.

    While it evaluates, the main process keeps what was predicted of the first images.

    Raises:
        RecipeError: a field of the model that the task itself sets.
    """

    IS_DENSE: ClassVar[bool] = True
    TASK: ClassVar[str]  # as `write_dense_results` calls it
    GROUPS: ClassVar[tuple[type, ...]]  # its flags

    data_args: ReadingArguments
    args: DenseArguments

    def __init__(self, *groups: Any):
        super().__init__(*groups)
        if "add_fpn" in self.model_fields:
            raise RecipeError("add_fpn: the task says whether the encoder has a pyramid of its own; leave it out")
        self.predictions: dict[int, Any] = {}  # of images to draw, by index
        self.per_class: dict[str, float | None] | None = None  # of the newest evaluation, where the task has it

    @classmethod
    def execute_flags(cls, argv: Sequence[str] | None, *, default_recipe: Path, description: str) -> int:
        """Does what the flags say, None being the command line's, and returns the script's exit code.

        Raises:
            ValueError and its kin, before training starts: a flag, recipe, checkpoint or data set that cannot be used;
                while it reads, an image whose annotation has a class that the set does not have.
        """
        groups, model_fields, recipe = parse_arguments(
            argv, cls.GROUPS, CONFIG_CLASSES, default_recipe=default_recipe, description=description
        )
        output_dir = start_processes(groups[2], recipe)
        set_seed(groups[2].seed)
        run = cls(*groups, model_fields, output_dir)
        return run.execute(run.finetune, write_dense_results)

    # --- what a task brings -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def training_images(self) -> DenseSource:
        """The images to train on."""

    @property
    @abstractmethod
    def held_out_images(self) -> DenseSource:
        """The held-out images."""

    @property
    @abstractmethod
    def training_transform(self) -> DenseTransform:
        """Augmentation."""

    @property
    @abstractmethod
    def evaluation_transform(self) -> DenseTransform:
        """The transform of held-out images."""

    @abstractmethod
    def build_model(self) -> DenseModelMixin:
        """The model, its backbone from the checkpoint that the flags name."""

    @abstractmethod
    def schedule(self, total_steps: int) -> WarmupSchedule:
        """The learning rate of the heads."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on the held-out images. Collective."""

    @abstractmethod
    def draw(self, path: Path) -> None:
        """Draws `predictions` beside the truth."""

    # --- the run ----------------------------------------------------------------------------------------------------

    def finetune(self) -> dict[str, Any]:
        """Trains the whole model, tests it and saves it in the run's folder."""
        self.check_classes()
        model = self.build_model()
        transform, options = self.training_transform, self.training_loader_options
        loader = DenseLoader(self.training_images, transform=transform, num_channels=self.num_channels, **options)
        optimizer = self.finetuning_optimizer(model, self.args.learning_rate)
        options = self.trainer_options(loader, optimizer, self.schedule(self.total_steps(loader)))
        trainer = DenseTrainer(model, evaluate_model=self.evaluate, **options)
        self.train(trainer)
        metrics = trainer.final_metrics()
        self.save(model)
        on_main_process(lambda: self.draw(self.output_dir / PICTURE) if self.predictions else None)
        return {
            "test_images": len(self.held_out_images) - len(everywhere(self.evaluation_loader.bad_images)),
            "metrics": metrics,
            "per_class": self.per_class,
            "pictures": [PICTURE],
        }

    def load_backbone(self, **fields: Any) -> PreTrainedModel:
        """The encoder with the checkpoint's weights, and these fields on top of its configuration."""
        backbone_class: Any = self.family.backbone_class  # there is one: see `StartingModel`
        return self.load(backbone_class, self.start.config(**fields))

    def facts(self) -> dict[str, Any]:
        """Those of every run, and the training data."""
        return {
            **super().facts(),
            "task": self.TASK,
            "dataset": self.training_images.name,
            "training_images": len(self.training_images),
        }

    def check_classes(self) -> None:
        """Raises a ValueError where the held-out images have other classes, before hours of work."""
        here, there = self.training_images.class_names, self.held_out_images.class_names
        if here != there:
            differing = sorted(set(here) ^ set(there)) or "their order"
            raise ValueError(
                f"{self.held_out_images.name} has other classes than {self.training_images.name}: {differing}; both "
                "must list the same"
            )

    @cached_property
    def evaluation_loader(self) -> DenseEvaluationLoader:
        """This process's part of the held-out images."""
        state = PartialState()
        return DenseEvaluationLoader(
            self.held_out_images,
            transform=self.evaluation_transform,
            num_channels=self.num_channels,
            num_processes=state.num_processes,
            process_index=state.process_index,
            num_workers=self.data_args.dataloader_num_workers,
        )

    def held_out_samples(self) -> Iterator[DenseSample]:
        """This process's samples, on its device."""
        for sample in self.evaluation_loader:
            yield sample._replace(pixel_values=sample.pixel_values.to(self.device))

    def remember(self, sample: DenseSample, prediction: Any) -> None:
        """Keeps the newest prediction of an image that is to be drawn."""
        if sample.index in self.predictions or len(self.predictions) < PICTURED_IMAGES:
            self.predictions[sample.index] = prediction

    def decoded(self, index: int) -> tuple[Any, Any]:
        """A held-out image without transform, and its target."""
        source = self.held_out_images
        return source.decode(index, source.read(index), self.num_channels)
