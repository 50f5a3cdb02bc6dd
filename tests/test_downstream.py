"""`DownstreamRun` with a dense task of real parts: from flags to a model and its results, stopped and resumed."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from references import TINY
from safetensors.torch import load_file
from torch import nn
from transformers import UperNetForSemanticSegmentation, ViTImageProcessor

from mimae import MIMAEConfig, MIMAEForPreTraining
from mimae.data.dense import DenseEvaluationLoader, DenseLoader
from mimae.data.processor import build_image_processor
from mimae.data.segmentation import SegmentationSource, open_segmentation_source
from mimae.data.segmentation_augmentation import segmentation_evaluation_transform, segmentation_training_transform
from mimae.dense.upernet import build_upernet
from mimae.training.arguments import HubArguments, ModelArguments, RecipeError
from mimae.training.checkpoints import write_json
from mimae.training.dense_arguments import SegmentationArguments, SegmentationDataArguments
from mimae.training.dense_results import write_dense_results
from mimae.training.dense_trainer import DenseTrainer
from mimae.training.downstream import DownstreamRun
from mimae.training.optimization import WarmupPolynomial, build_finetuning_adamw

ENCODER = {**TINY, "num_hidden_layers": 6}
SHORT = {
    "max_train_steps": 4,
    "warmup_steps": 1,
    "per_device_train_batch_size": 2,
    "crop_size": 16,
    "learning_rate": 1e-3,
    "checkpointing_steps": 2,
    "evaluation_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
}


class Segmentation(DownstreamRun):
    """What a script for segmentation adds, as briefly as can be."""

    IS_DENSE = True
    SETTINGS = (*DownstreamRun.SETTINGS, "crop_size")

    @cached_property
    def training_images(self) -> SegmentationSource:
        return open_segmentation_source(train_dir=self.data_args.train_dir)

    @property
    def image_processor(self) -> ViTImageProcessor:
        return build_image_processor(self.image_size, self.mean, self.std)

    def facts(self) -> dict[str, Any]:
        return {"task": "segmentation", **super().facts(), "dataset": "halves"}

    def run(self) -> dict[str, Any]:
        args, images, statistics = self.args, self.training_images, {"mean": self.mean, "std": self.std}
        backbone = self.load(self.family.backbone_class, self.start.config(add_fpn=True))
        model = build_upernet(backbone, id2label=dict(enumerate(images.class_names)), channels=8, auxiliary_channels=8)
        transform = segmentation_training_transform(args.crop_size, short_side=16, long_side_limit=32, **statistics)
        loader = DenseLoader(
            images, transform=transform, num_channels=self.num_channels, **self.training_loader_options
        )
        schedule = WarmupPolynomial(
            peak=args.learning_rate,
            warmup_steps=args.warmup_steps,
            total_steps=self.total_steps(self.steps_per_epoch(loader)),
        )
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = build_finetuning_adamw(
            model,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
            betas=betas,
        )
        options = self.trainer_options(loader, optimizer, schedule)
        trainer = DenseTrainer(model, evaluate_model=self.accuracy, **options)
        self.train(trainer)
        self.save(model)
        return {"test_images": len(images), "metrics": trainer.test()}

    def accuracy(self, model: nn.Module) -> dict[str, float]:
        transform = segmentation_evaluation_transform(16, 32, mean=self.mean, std=self.std)
        samples = DenseEvaluationLoader(self.training_images, transform=transform, num_channels=self.num_channels)
        right = [
            (model(sample.pixel_values[None]).logits.argmax(1) == sample.target).float().mean() for sample in samples
        ]
        return {"overall_accuracy": torch.stack(right).mean().item()}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Noise whose right half is brighter, and of class 1."""
    folder = tmp_path_factory.mktemp("halves")
    for kind in ("images", "masks"):
        (folder / kind / "train").mkdir(parents=True)
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, 8:] = 1
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 100, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels + 150 * mask[..., None]).save(folder / "images" / "train" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / "train" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    MIMAEForPreTraining(MIMAEConfig(**ENCODER)).save_pretrained(folder)
    return folder


def execute(images: Path, model: Path, output_dir: Path, **values: Any) -> int:
    torch.manual_seed(0)
    run = Segmentation(
        ModelArguments(model_name_or_path=str(model)),
        SegmentationDataArguments(train_dir=str(images)),
        SegmentationArguments(output_dir=str(output_dir), **{**SHORT, **values}),
        HubArguments(),
        {"drop_path_rate": 0.1},
        output_dir,
    )
    return run.execute(run.run, write_dense_results)


def test_a_dense_run_leaves_a_model_that_loads_its_metrics_and_its_card(images, pretrained, tmp_path):
    assert execute(images, pretrained, tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 <= results["metrics"]["overall_accuracy"] <= 1
    assert results["recipe"]["drop_path_rate"] == 0.1
    model = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert model.config.backbone_config.drop_path_rate == 0.1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_overall_accuracy" in line] == [2, 4]
    assert {"README.md", "curves.png", "preprocessor_config.json"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "checkpoint-2" / "manifest.json").exists()


def test_a_resumed_dense_run_ends_as_an_uninterrupted_one_and_only_with_its_own_settings(images, pretrained, tmp_path):
    assert execute(images, pretrained, tmp_path / "whole") == 0
    for name in ("checkpoint-2", "metrics.jsonl"):
        path = tmp_path / "parts" / name
        path.parent.mkdir(exist_ok=True)
        (tmp_path / "whole" / name).rename(path)
    with pytest.raises(ValueError, match="crop_size"):
        execute(images, pretrained, tmp_path / "parts", resume_from_checkpoint="latest", crop_size=32)
    assert execute(images, pretrained, tmp_path / "parts", resume_from_checkpoint="latest") == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_a_dense_run_from_a_swin_is_refused(images, tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "misimmim"})
    with pytest.raises(RecipeError, match="'misimmim' has no backbone"):
        execute(images, tmp_path, tmp_path / "run")
