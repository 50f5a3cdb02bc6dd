"""Both models through transformers' Auto classes: with this package and, as Hub remote code, without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from references import TINY, TINY_SWIN
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
)

import mimae

SIZES = {"MIMAE": TINY, "MISimMIM": TINY_SWIN}
OWN_MODULES = {"MIMAE": "mimae", "MISimMIM": "misimmim"}


@pytest.fixture(params=SIZES)
def prefix(request) -> str:
    """What the names of a model's classes begin with."""
    return request.param


def config_of(prefix: str, **overrides) -> PreTrainedConfig:
    return getattr(mimae, f"{prefix}Config")(**{**SIZES[prefix], **overrides})


def model_of(prefix: str, purpose: str = "ForPreTraining", **overrides) -> PreTrainedModel:
    return getattr(mimae, prefix + purpose)(config_of(prefix, **overrides))


def test_auto_classes_find_the_model(tmp_path, prefix):
    model = model_of(prefix)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is type(model)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is getattr(mimae, f"{prefix}Model")
    assert torch.equal(encoder.layernorm.weight, model.base_model.layernorm.weight)
    assert type(AutoModel.from_config(model.config)) is type(encoder)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is getattr(mimae, f"{prefix}ForImageClassification")
    assert classifier.classifier.weight.shape[0] == 3


def test_a_saved_classifier_is_found_with_its_labels(tmp_path, prefix):
    labels = {0: "cat", 1: "dog"}
    model = model_of(prefix, "ForImageClassification", id2label=labels).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == labels
    pixel_values = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_a_saved_folder_carries_its_code(tmp_path, prefix):
    model_of(prefix).save_pretrained(tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    own = OWN_MODULES[prefix]
    assert code == {
        f"configuration_{own}.py",
        f"modeling_{own}.py",
        "configuration_mim.py",
        "modeling_mim.py",
        "masking.py",
        "mutual_information.py",
    }
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == f"configuration_{own}.{prefix}Config"
    assert auto_map["AutoModel"] == f"modeling_{own}.{prefix}Model"
    assert auto_map["AutoModelForPreTraining"] == f"modeling_{own}.{prefix}ForPreTraining"


WITHOUT_THE_PACKAGE = """
import sys

sys.modules["mimae"] = None  # an editable install must not help
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

torch.set_num_threads(1)


def check(folder, tensors, prefix):
    case = torch.load(tensors, weights_only=True)
    model = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == prefix + "ForPreTraining"
    assert type(model).__module__.startswith("transformers_modules.")
    encoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(encoder).__name__ == prefix + "Model", type(encoder)
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == prefix + "Config"
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == case["fixed"]
    with torch.no_grad():
        output = model(case["pixel_values"], noise=case["noise"])
        features = encoder(case["pixel_values"]).last_hidden_state
    for name in ("loss", "objective", "logits", "mi_active"):
        assert torch.equal(output[name], case[name]), name
    assert torch.equal(features, case["features"])
    model.save_pretrained(folder + "-again")
    assert AutoModelForPreTraining.from_pretrained(folder + "-again", trust_remote_code=True).mi_gate.is_open == 1
    classifier = AutoModelForImageClassification.from_pretrained(folder + "-classifier", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(classifier(case["pixel_values"]).logits, case["class_logits"])


for prefix in sys.argv[1:]:
    check(prefix + "/model", prefix + "/case.pt", prefix)
print("equal")
"""


def save_with_its_outputs(folder: Path, prefix: str) -> None:
    """A model, a classifier, and what both give here."""
    model = model_of(prefix, mi_gate_threshold=100.0, train_approximator=False)
    case = {"pixel_values": torch.randn(2, 3, 16, 16), "noise": torch.rand(2, 16)}
    model(**case)  # opens the gate
    model.eval().save_pretrained(folder / "model")
    classifier = model_of(prefix, "ForImageClassification").eval()
    classifier.save_pretrained(folder / "model-classifier")
    with torch.no_grad():
        output = model(**case)
        features = model.base_model(case["pixel_values"]).last_hidden_state
        class_logits = classifier(case["pixel_values"]).logits
    expected = {name: output[name] for name in ("loss", "objective", "logits", "mi_active")}
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert any(name.startswith("approximator.") for name in fixed)
    expected |= {"features": features, "class_logits": class_logits, "fixed": fixed}
    torch.save({**case, **expected}, folder / "case.pt")


def test_remote_code_works_without_this_package(tmp_path):
    for prefix in SIZES:
        save_with_its_outputs(tmp_path / prefix, prefix)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "hf" / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *SIZES]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("equal")
