"""Whole runs: what they learn, what they leave, how they end, and that a resumed run is the run never stopped."""

import contextlib
import json
import os
import signal
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import drawn
from forking import run_forked
from PIL import Image
from runs import SCRIPT, TINY_SWIN_MODEL, SignalAfter, flags, metrics, pretrain, series, weights, write_shards
from transformers import BertConfig

from mimae import MIMAEConfig, MIMAEForPreTraining
from mimae.hub.push import files_to_push
from mimae.jobs.run_folder import OutputDirNotEmptyError, claim_output_dir, clear_output_dir
from mimae.training.bad_images import TooManyBadImagesError
from mimae.training.checkpoints.files import CheckpointError
from mimae.training.checkpoints.store import verify
from mimae.training.protocols import TrainingObserver
from mimae.training.trainer import NonFiniteError, Pretrainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """One finished run, for tests that only look."""
    folder = tmp_path_factory.mktemp("short") / "run"
    with drawn():
        assert pretrain(folder) == 0
    return folder


def assert_same_run(one, other):
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name
    for name in ("loss", "reconstruction_loss", "mi_max_loss", "grad_norm"):
        assert series(one, name) == series(other, name)


def test_a_run_leaves_model_card_curves_pictures_and_metrics(short_run):
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "metrics.jsonl"):
        assert (short_run / name).stat().st_size > 0
    for name in ("curves.png", "reconstructions.png", "reconstructions/step-0000000.png"):
        assert Image.open(short_run / name).size > (100, 100)
    assert MIMAEForPreTraining.from_pretrained(short_run).config.num_masks == 4
    assert str(short_run) not in (short_run / "README.md").read_text()


def test_a_run_leaves_its_results_with_recipe_seed_versions_and_hardware(short_run):
    results = json.loads((short_run / "results.json").read_text())
    assert (results["task"], results["dataset"], results["seed"]) == ("pretraining", "digits", 0)
    assert (results["steps"], results["skipped_steps"], results["gate_opened_at_step"]) == (13, 0, None)
    assert results["hardware"]["processes"] == 1
    assert results["recipe"]["hidden_size"] == 32
    assert results["recipe"]["max_train_steps"] == 13
    assert results["versions"]["torch"] == version("torch")
    assert "commit" in results
    for name in ("objective", "reconstruction_loss", "mi_max_loss", "mi_min_loss", "approximation_loss"):
        assert results["metrics"][name] == series(short_run, name)[13]
    for name in ("knn_accuracy", "linear_accuracy"):
        assert results["metrics"][name] == series(short_run, name)[13]
        assert results["probe_before"][name] == series(short_run, name)[0]


def test_what_is_uploaded_of_the_results_names_no_place_of_this_machine(short_run):
    assert str(short_run) in (short_run / "results.json").read_text()
    uploaded = json.loads(files_to_push(short_run, "someone/model")["results.json"])
    assert str(short_run.parent) not in json.dumps(uploaded)
    assert uploaded["metrics"] == json.loads((short_run / "results.json").read_text())["metrics"]


def test_every_loss_term_speed_and_gate_are_logged_at_each_step(short_run):
    lines = [line for line in metrics(short_run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 14))
    expected = {"loss", "objective", "reconstruction_loss", "mi_max_loss", "mi_min_loss", "approximation_loss"}
    expected |= {"mi_active", "learning_rate", "views_per_second", "grad_norm", "skipped_steps", "min_variance"}
    assert all(expected <= line.keys() for line in lines)
    probes = [line for line in metrics(short_run) if "knn_accuracy" in line]
    assert [line["step"] for line in probes] == [0, 13]


class Diary(TrainingObserver):
    """Writes down what it is told, and the pixels of the second step go out dark."""

    def __init__(self):
        self.entries = []

    def on_pixels(self, step, pixel_values):
        self.entries.append(("pixels", step))
        return torch.zeros_like(pixel_values) if step == 2 else pixel_values

    def on_forward(self, step, batch, output):
        self.entries.append(("forward", step, len(batch["index"])))

    def on_gradients(self, step, model):
        self.entries.append(("gradients", step))
        self.before = [p.detach().clone() for p in model.parameters()]
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())

    def on_update(self, step, model):
        changed = any(not torch.equal(p, old) for p, old in zip(model.parameters(), self.before, strict=True))
        self.entries.append(("update", step, changed))

    def on_step(self, step):
        self.entries.append(("step", step))

    @contextlib.contextmanager
    def saving(self, step):
        self.entries.append(("saving", step))
        yield
        self.entries.append(("saved", step))


def test_an_observer_is_told_of_each_pass_update_and_save_in_order_and_may_change_the_pixels(tmp_path):
    diary = Diary()
    settings = {"max_train_steps": 2, "gradient_accumulation_steps": 2, "checkpointing_steps": 2, "warmup_epochs": 0}
    assert pretrain(tmp_path / "run", observer=diary, norm_pix_loss=False, **settings) == 0
    forward = [[("pixels", step), ("forward", step, 256)] * 2 for step in (1, 2)]
    updates = [[("gradients", step), ("update", step, True), ("step", step)] for step in (1, 2)]
    expected = [*forward[0], *updates[0], *forward[1], *updates[1], ("saving", 2), ("saved", 2)]
    assert diary.entries == expected
    # dark images are easily predicted
    assert (
        series(tmp_path / "run", "reconstruction_loss")[2] < 0.5 * series(tmp_path / "run", "reconstruction_loss")[1]
    )


def test_all_state_of_a_trainer_is_born_in_its_constructor(tmp_path, monkeypatch):
    born, made = {}, []

    def remembering(trainer):
        parts = (trainer, trainer.metrics, trainer.bad_images, trainer._stop_request, trainer.meter)
        born.update({part: set(vars(part)) for part in parts})
        made.append(trainer)
        train(trainer)

    train = Pretrainer.train
    monkeypatch.setattr(Pretrainer, "train", remembering)
    assert pretrain(tmp_path / "run", max_train_steps=2) == 0
    assert made[0].progress.step == 2
    assert {part: set(vars(part)) for part in born} == born


@pytest.mark.parametrize(
    ("threshold", "steps"),
    [
        (0.9, 36),
        pytest.param(0.65, 90, marks=pytest.mark.extended),
        pytest.param(0.5, 400, marks=pytest.mark.extended, id="the default"),
    ],
)
def test_a_digits_run_lowers_reconstruction_and_opens_the_gate_at_its_threshold(tmp_path, capsys, threshold, steps):
    size = {"patch_size": 2, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 192}
    size |= {"decoder_hidden_size": 48, "decoder_intermediate_size": 192}  # 64 patches, as in the demo
    length = {"per_device_train_batch_size": 64, "max_train_steps": steps, "warmup_epochs": 1.0}
    gate = {} if threshold == MIMAEConfig().mi_gate_threshold else {"mi_gate_threshold": threshold}
    assert pretrain(tmp_path / "run", **size, **length, **gate, base_learning_rate=1e-3, checkpointing_steps=1000) == 0
    losses = series(tmp_path / "run", "reconstruction_loss")
    active = series(tmp_path / "run", "mi_active")
    assert losses[1] > 1.5
    opened = min(step for step, value in active.items() if value)
    assert losses[opened] < threshold <= min(losses[step] for step in range(1, opened))
    assert all(active[step] == 1 for step in range(opened, steps + 1))
    assert f"opened at step {opened}" in capsys.readouterr().out


def test_a_gate_that_never_opened_is_said_in_plain_words(tmp_path, capsys):
    assert pretrain(tmp_path / "run", max_train_steps=2) == 0
    assert "NEVER OPENED" in capsys.readouterr().out


@pytest.mark.extended
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_a_run_stopped_by_sigterm_mid_epoch_and_resumed_equals_one_never_stopped(
    tmp_path, shards, streaming, num_workers
):
    data = {"data_files": shards, "streaming": streaming, "cache_dir": tmp_path / "cache", "shuffle_window": 300}
    data |= {"dataloader_num_workers": num_workers, "mi_gate_threshold": 1.9, "checkpointing_steps": 4}
    data |= {"max_train_steps": 10, "per_device_train_batch_size": 200}
    assert pretrain(tmp_path / "whole", **data) == 0

    assert pretrain(tmp_path / "parts", **data, observer=SignalAfter(5)) == 128 + signal.SIGTERM  # of 8 an epoch
    assert (tmp_path / "parts" / "checkpoint-5").exists()
    assert pretrain(tmp_path / "parts", "--resume_from_checkpoint", "latest", **data) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_swin_stopped_and_resumed_beyond_its_milestone_equals_one_never_stopped(tmp_path):
    settings = {"lr_scheduler_type": "multistep", "lr_milestone_epochs": [1], "warmup_epochs": 0.4, "max_grad_norm": 5}
    settings |= {
        "max_train_steps": 8,
        "warmup_learning_rate": 1e-5,
        "crop_interpolation": "bilinear",
        "mi_gate_threshold": 2.0,
    }
    assert pretrain(tmp_path / "whole", model=TINY_SWIN_MODEL, **settings) == 0
    code = pretrain(tmp_path / "parts", model=TINY_SWIN_MODEL, **settings, observer=SignalAfter(4))
    assert code == 128 + signal.SIGTERM
    assert pretrain(tmp_path / "parts", "--resume_from_checkpoint", "latest", model=TINY_SWIN_MODEL, **settings) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    rates = series(tmp_path / "parts", "learning_rate")
    assert rates[1] == 1e-5
    assert rates[8] == rates[6] == pytest.approx(0.1 * rates[5])
    assert series(tmp_path / "parts", "mi_active")[8] == 1


def test_gradient_accumulation_sees_the_images_of_the_larger_batch_and_says_negatives_stay_within(tmp_path):
    no_terms = {"mi_max_weight": 0, "mi_min_weight": 0, "max_train_steps": 6}
    pretrain(tmp_path / "whole", per_device_train_batch_size=240, **no_terms)
    pretrain(tmp_path / "parts", per_device_train_batch_size=80, gradient_accumulation_steps=3, **no_terms)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "parts")[name], rtol=1e-4, atol=1e-5)


def test_an_output_folder_that_holds_a_run_is_refused_and_overwritten_only_on_request(tmp_path):
    assert pretrain(tmp_path / "run", max_train_steps=2) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "mimae").mkdir()
    with pytest.raises(OutputDirNotEmptyError, match=r"--resume_from_checkpoint latest.*--overwrite_output_dir"):
        pretrain(tmp_path / "run", max_train_steps=2)
    assert pretrain(tmp_path / "run", "--overwrite_output_dir", max_train_steps=3) == 0
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "run" / "mimae").exists()


def test_a_run_without_a_folder_gets_one_by_its_recipe_and_never_anothers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "photos" / "mimae.yaml"
    for expected in ("photos-mimae", "photos-mimae-2"):
        folder = claim_output_dir(None, recipe, overwrite=False, resume=False)
        assert folder == Path("outputs") / expected
        (folder / "metrics.jsonl").touch()


def test_overwriting_a_folder_that_holds_no_run_deletes_nothing(tmp_path):
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "README.md").write_text("of another project")
    (folder / "checkpoint-notes").write_text("no folder")
    clear_output_dir(folder)
    assert (folder / "README.md").read_text() == "of another project"
    assert (folder / "checkpoint-notes").exists()


def test_going_back_to_an_older_checkpoint_drops_the_later_ones_and_mixes_no_runs(tmp_path):
    settings = {"max_train_steps": 6, "checkpointing_steps": 2, "logging_steps": 4}
    assert pretrain(tmp_path / "run", **settings) == 0
    first = weights(tmp_path / "run"), series(tmp_path / "run", "loss")
    older = str(tmp_path / "run" / "checkpoint-2")
    code = pretrain(tmp_path / "run", "--resume_from_checkpoint", older, **settings, observer=SignalAfter(3))
    assert code == 128 + signal.SIGTERM
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert pretrain(tmp_path / "run", "--resume_from_checkpoint", "latest", **settings) == 0
    assert series(tmp_path / "run", "loss") == first[1]  # also where the stop cut a window of the log
    assert all(torch.equal(tensor, first[0][name]) for name, tensor in weights(tmp_path / "run").items())

    assert pretrain(tmp_path / "other", max_train_steps=2) == 0
    with pytest.raises(CheckpointError, match="another run's"):
        pretrain(tmp_path / "other", "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3"), **settings)


def test_a_resume_with_other_settings_names_the_keys(tmp_path):
    assert pretrain(tmp_path / "run", max_train_steps=4, checkpointing_steps=2) == 0
    with pytest.raises(ValueError, match=r"temperature: 0.07 then, 0.1 now"):
        pretrain(tmp_path / "run", "--resume_from_checkpoint", "latest", max_train_steps=4, temperature=0.1)
    with pytest.raises(ValueError, match=r"hidden_size: 32 then, 64 now"):
        pretrain(tmp_path / "run", "--resume_from_checkpoint", "latest", max_train_steps=4, hidden_size=64)
    with pytest.raises(CheckpointError):
        pretrain(tmp_path / "run", "--resume_from_checkpoint", str(tmp_path / "nowhere"), max_train_steps=4)


def test_a_step_without_finite_gradient_is_skipped_and_ten_in_a_row_end_the_run_with_finite_weights(tmp_path):
    # a learning rate that throws the weights out of float32's range at the second step
    settings = {"base_learning_rate": 1e38, "warmup_epochs": 0.0, "max_train_steps": 40, "weight_decay": 0.0}
    with pytest.raises(NonFiniteError, match="10"):
        pretrain(tmp_path / "run", **settings)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert verify(checkpoint) == []
    skipped = series(tmp_path / "run", "skipped_steps")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["meter"]["skipped"] == 10
    assert max(skipped.values()) <= 10


def write_folder(folder, num_images, bad=()):
    """A folder of PNGs, of which some are HTML, empty or cut."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(num_images):
        path = folder / f"{number:04d}.png"
        Image.fromarray(random.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    for number, content in bad:
        path = folder / f"{number:04d}.png"
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    return folder


def test_bad_images_are_skipped_named_and_counted(tmp_path):
    images = write_folder(tmp_path / "images", 300, bad=[(7, b"<html></html>"), (120, 40)])
    settings = {"train_dir": images, "cache_dir": tmp_path / "cache"}
    settings |= {"per_device_train_batch_size": 100, "max_train_steps": 6}
    assert pretrain(tmp_path / "run", **settings) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(os.path.basename(line["image"].rstrip(")")) for line in lines) == ["0007.png", "0120.png"]
    assert metrics(tmp_path / "run")[-1].get("bad_images", 2) == 2

    # a stop between two lines of the log forgets none
    pretrain(tmp_path / "stopped", **settings | {"logging_steps": 1000}, observer=SignalAfter(5))
    assert (tmp_path / "stopped" / "bad_images.jsonl").read_text().count("\n") == 2

    with pytest.raises(TooManyBadImagesError, match=r"2 of 300 images"):
        pretrain(tmp_path / "strict", **settings, max_bad_image_fraction=0.005)
    assert list((tmp_path / "strict").glob("checkpoint-*"))


def test_two_processes_see_and_learn_what_one_does(tmp_path):
    settings = {"max_train_steps": 8, "mi_gate_threshold": 10.0, "base_learning_rate": 1e-3, "warmup_epochs": 0.2}
    pretrain(tmp_path / "one", **settings)
    argv = flags(tmp_path / "two", **settings | {"per_device_train_batch_size": 128})
    result = run_forked(SCRIPT, argv, num_processes=2)
    assert result.returncode == 0, result.output
    assert "world size 2" in result.output
    for name in ("reconstruction_loss", "mi_max_loss", "mi_min_loss", "approximation_loss"):
        one, both = series(tmp_path / "one", name), series(tmp_path / "two", name)
        assert one.keys() == both.keys()
        torch.testing.assert_close(list(one.values()), list(both.values()), rtol=2e-4, atol=2e-5)
    for name, tensor in weights(tmp_path / "one").items():
        if not name.endswith("k_proj.bias"):  # its gradient is 0 but for rounding, which AdamW blows up to full steps
            torch.testing.assert_close(tensor, weights(tmp_path / "two")[name], rtol=1e-3, atol=2e-4)


def test_a_warm_start_takes_weights_and_refuses_other_sizes(tmp_path, short_run):
    assert pretrain(tmp_path / "warm", model_name_or_path=short_run, max_train_steps=1, warmup_epochs=1.0) == 0
    # the first step's learning rate is 0: the weights are still those of the checkpoint
    for name, tensor in weights(short_run).items():
        assert torch.equal(tensor, weights(tmp_path / "warm")[name]), name
    with pytest.raises(ValueError, match=r"hidden_size: 32 there, 64 in the recipe"):
        pretrain(tmp_path / "other", model_name_or_path=short_run, hidden_size=64)
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a 'bert' model"):
        pretrain(tmp_path / "other", model_name_or_path=tmp_path / "bert")


def test_images_of_one_class_are_not_probed_and_do_not_end_a_run(tmp_path):
    images = write_folder(tmp_path / "images", 0)
    write_folder(images / "only", 100)
    settings = {"train_dir": images, "cache_dir": tmp_path / "cache", "per_device_train_batch_size": 50}
    assert pretrain(tmp_path / "run", **settings, max_train_steps=2) == 0
    assert not [line for line in metrics(tmp_path / "run") if "knn_accuracy" in line]
