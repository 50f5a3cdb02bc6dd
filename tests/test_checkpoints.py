"""What a checkpoint survives: kills, full disks, damage, a second run, and a stranger's files."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimae.jobs.run_folder import OutputDirInUseError, lock_output_dir
from mimae.training.checkpoints import store as checkpoints
from mimae.training.checkpoints.files import CheckpointError, load_tensors, write_json
from mimae.training.checkpoints.state import (
    load_optimizer,
    load_process_states,
    random_state,
    refuse_other_settings,
    save_optimizer,
    save_process_states,
    set_random_state,
)
from mimae.training.checkpoints.store import CheckpointStore, verify

# Children are forked from this process, which has torch already: a kill then costs milliseconds, not a start.
forked = multiprocessing.get_context("fork")


def write_small_checkpoint(folder: Path) -> None:
    """Files of the kinds and in the places that a real checkpoint has, in 40 kB."""
    (folder / "code").mkdir()
    (folder / "code" / "modeling.py").write_text("# remote code\n" * 20)
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(30_000))
    (folder / "random_state_0.safetensors").write_bytes(random.Random(1).randbytes(5_000))
    write_json(folder / "trainer_state.json", {"step": 1, "epoch": 0, "position": 64})


def saved_steps(output_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*"))


def valid_steps(output_dir: Path) -> list[int]:
    return [step for step in saved_steps(output_dir) if not verify(output_dir / f"checkpoint-{step}")]


# --- damage ---------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(len(content))] ^= 1 << 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero_the_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-16] + bytes(16))


@pytest.mark.parametrize("damage", [truncate, flip_one_bit, empty, zero_the_tail, Path.unlink])
def test_damage_to_any_file_is_detected_and_the_newest_valid_checkpoint_used(tmp_path, caplog, damage):
    store = CheckpointStore(tmp_path)
    older, newest = (store.save(step, write_small_checkpoint) for step in (10, 20))
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) == 5  # the manifest itself among them
    for name in files:
        intact = (newest / name).read_bytes()
        assert store.latest() == newest
        damage(newest / name)
        caplog.clear()
        assert store.latest() == older, f"{damage.__name__} of {name} went unseen"
        assert str(newest) in caplog.text
        assert name.name in caplog.text
        with pytest.raises(CheckpointError, match=name.name):
            store.resolve(str(newest))
        (newest / name).write_bytes(intact)


def test_every_single_bit_of_the_manifest_matters(tmp_path):
    manifest = CheckpointStore(tmp_path).save(1, lambda folder: write_json(folder / "a.json", 1)) / "manifest.json"
    intact = manifest.read_bytes()
    for position in range(8 * len(intact)):
        flipped = bytearray(intact)
        flipped[position // 8] ^= 1 << position % 8
        manifest.write_bytes(flipped)
        assert verify(manifest.parent), f"bit {position} of the manifest went unseen"


def test_files_that_others_put_into_a_checkpoint_do_not_make_it_damaged(tmp_path):
    folder = CheckpointStore(tmp_path).save(1, write_small_checkpoint)
    (folder / ".DS_Store").write_bytes(b"a file manager's")
    assert verify(folder) == []


@pytest.mark.parametrize("content", ["[]", '{"files": 3}', '{"files": ["a"]}', '{"files": {"a.json": 5}}', "{}"])
def test_a_manifest_of_another_shape_is_a_problem_and_no_crash(tmp_path, content):
    folder = CheckpointStore(tmp_path).save(1, lambda folder: write_json(folder / "a.json", 1))
    (folder / "manifest.json").write_text(content)
    assert verify(folder)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
    folder = CheckpointStore(tmp_path).save(1, write_small_checkpoint)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"size": 0, "sha256": ""}
    write_json(folder / "manifest.json", manifest)
    (tmp_path / "secret").touch()
    assert verify(folder) == ["../secret is missing"]


def test_what_cannot_be_resumed_is_refused_with_the_reason(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        store.resolve("latest")
    with pytest.raises(CheckpointError, match="no such folder"):
        store.resolve(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        store.resolve(str(tmp_path))
    saved = store.save(1, write_small_checkpoint)
    assert store.resolve("latest") == store.resolve(str(saved)) == saved


# --- saving and rotation --------------------------------------------------------------------------------------------


def test_steps_are_ordered_as_numbers(tmp_path):
    store = CheckpointStore(tmp_path, total_limit=None)
    for step in (900, 1000, 20):
        store.save(step, write_small_checkpoint)
    assert store.latest().name == "checkpoint-1000"
    assert saved_steps(tmp_path) == [20, 900, 1000]


def test_rotation_keeps_the_limit_and_refuses_one_below_two(tmp_path):
    store = CheckpointStore(tmp_path, total_limit=2)
    for step in range(1, 6):
        store.save(step, write_small_checkpoint)
        assert saved_steps(tmp_path) == list(range(max(1, step - 1), step + 1))
    for limit in (1, 0, -1):
        with pytest.raises(ValueError, match="at least 2"):
            CheckpointStore(tmp_path, total_limit=limit)


def test_rotation_does_not_leave_the_newest_as_the_only_valid_one(tmp_path):
    store = CheckpointStore(tmp_path, total_limit=3)
    for step in (1, 2, 3):
        store.save(step, write_small_checkpoint)
    for step in (2, 3):
        truncate(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    store.save(4, write_small_checkpoint)
    assert valid_steps(tmp_path) == [1, 4]


def test_a_save_after_going_back_is_not_rotated_away(tmp_path):
    store = CheckpointStore(tmp_path, total_limit=2)
    for step in (30, 40, 20):
        assert verify(store.save(step, write_small_checkpoint)) == []


def test_a_valid_checkpoint_of_the_same_step_stays_and_a_damaged_one_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path)
    folder = store.save(1, write_small_checkpoint)
    assert store.save(1, lambda folder: pytest.fail("a valid checkpoint was written again")) == folder
    truncate(folder / "model.safetensors")
    assert store.save(1, write_small_checkpoint) == folder
    assert verify(folder) == []


def test_a_write_that_the_disk_refuses_leaves_the_older_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path)
    older = store.save(1, write_small_checkpoint)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the kernel itself stops the 30 kB file
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-2 \(.*File too large.*Older checkpoints are untouched"):
            store.save(2, write_small_checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert store.latest() == older


def save_forever(output_dir: Path) -> None:
    store = CheckpointStore(output_dir, total_limit=2)
    store.remove_partials()
    for step in range(saved_steps(output_dir)[-1] + 1, 1_000_000):
        store.save(step, write_small_checkpoint)


def test_kills_inside_saves_never_lose_the_run(tmp_path):
    """The loop does nothing but save, so that every kill hits a write, a rename or a rotation."""
    CheckpointStore(tmp_path).save(1, write_small_checkpoint)
    delays, newest, interrupted = random.Random(0), 1, 0
    for _ in range(20):
        process = forked.Process(target=save_forever, args=(tmp_path,))
        process.start()
        time.sleep(delays.uniform(0.01, 0.15))
        process.kill()
        process.join()
        interrupted += any(path.name.startswith(".") for path in tmp_path.iterdir())
        assert CheckpointStore(tmp_path).latest() is not None
        # Renames are whole: whatever bears a checkpoint's name is valid, not only the one chosen.
        assert valid_steps(tmp_path) == saved_steps(tmp_path)
        assert saved_steps(tmp_path)[-1] >= newest
        newest = saved_steps(tmp_path)[-1]
    assert newest > 1
    assert interrupted > 0, "no kill fell inside a save, so the drill shows nothing"
    CheckpointStore(tmp_path).remove_partials()
    assert all(path.name.startswith("checkpoint-") for path in tmp_path.iterdir())


@pytest.mark.parametrize("turn", ["seal", "_discard", "rename"])
def test_a_death_at_each_turn_of_a_save_leaves_two_valid_checkpoints(tmp_path, monkeypatch, turn):
    store = CheckpointStore(tmp_path, total_limit=2)
    for step in (1, 2):
        store.save(step, write_small_checkpoint)

    def save_and_die_there() -> None:
        monkeypatch.setattr(Path if turn == "rename" else checkpoints, turn, lambda *_: os._exit(9))
        store.save(3, write_small_checkpoint)

    process = forked.Process(target=save_and_die_there)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert valid_steps(tmp_path) == ([1, 2, 3] if turn == "_discard" else [1, 2])


def test_everything_is_on_the_disk_before_it_gets_a_checkpoints_name(tmp_path, monkeypatch):
    # a power cut cannot be had here: what is asked of the kernel, and in which order
    asked, fsync, rename = [], os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        asked.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())
        fsync(descriptor)

    def recorded_rename(path: Path, target: Path) -> Path:
        asked.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    folder = CheckpointStore(tmp_path).save(1, write_small_checkpoint)
    partial = ".checkpoint-1.partial"
    files = {f"{partial}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()}
    manifest = f"{partial}/manifest.json"
    assert files <= set(asked)
    assert all(asked.index(file) < asked.index(manifest) for file in files - {manifest})
    assert asked[-3:] == [partial, "rename to checkpoint-1", "."]


# --- one run per folder ---------------------------------------------------------------------------------------------


def hold_the_lock_and_fork_a_worker(output_dir: Path, worker_pid: multiprocessing.SimpleQueue) -> None:
    lock_output_dir(output_dir)
    worker = forked.Process(target=time.sleep, args=(60,))
    worker.start()
    worker_pid.put(worker.pid)
    time.sleep(60)


def test_a_live_runs_folder_is_refused_and_a_dead_runs_taken_over(tmp_path):
    worker_pid = forked.SimpleQueue()
    holder = forked.Process(target=hold_the_lock_and_fork_a_worker, args=(tmp_path, worker_pid))
    holder.start()
    worker = worker_pid.get()
    try:
        with pytest.raises(OutputDirInUseError) as refused:
            lock_output_dir(tmp_path)
        for part in (str(tmp_path), f"pid {holder.pid} ", socket.gethostname()):
            assert part in str(refused.value)
        holder.kill()
        holder.join()
        os.kill(worker, 0)  # its worker lives on, and does not hold the folder
        lock_output_dir(tmp_path)
        assert f"pid {os.getpid()} " in (tmp_path / ".lock").read_text()
    finally:
        holder.kill()
        os.kill(worker, 9)


# --- the optimiser --------------------------------------------------------------------------------------------------


def make_training(fused: bool = False, width: int = 5):
    """A model, AdamW over two groups, one parameter that never gets a gradient, and the parameters' names in order."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.GELU(), torch.nn.Linear(width, 3))
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
    named = dict(model.named_parameters())
    decayed = [name for name, parameter in named.items() if parameter.ndim > 1]
    others = [name for name in named if name not in decayed]
    groups = [
        {"params": [named[name] for name in decayed], "weight_decay": 0.05, "lr_scale": 0.65},
        {"params": [named[name] for name in others], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.5e-4, betas=(0.9, 0.95), fused=fused)
    return model, optimizer, decayed + others


def train(model, optimizer, steps):
    for step in range(steps):
        images = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_state(actual, expected):
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert actual["state"][index].keys() == state.keys()
        for key, tensor in state.items():
            assert actual["state"][index][key].dtype == tensor.dtype
            assert torch.equal(actual["state"][index][key], tensor)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_comes_back_bit_for_bit_and_training_goes_on_the_same(tmp_path, fused):
    model, optimizer, names = make_training(fused)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)  # adds `initial_lr` and an uneven rate
    train(model, optimizer, 3)
    save_optimizer(tmp_path, optimizer, names)

    resumed_model, resumed, _ = make_training(fused)
    resumed_model.load_state_dict(model.state_dict())
    load_optimizer(tmp_path, resumed, names)
    shutil.rmtree(tmp_path)  # rotation may take the files while the run goes on
    assert_same_state(resumed.state_dict(), optimizer.state_dict())

    for pair in ((model, optimizer), (resumed_model, resumed)):
        train(*pair, 3)
    assert_same_state(resumed.state_dict(), optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True))


def test_an_optimizer_of_another_model_is_refused_by_name(tmp_path):
    model, optimizer, names = make_training()
    train(model, optimizer, 1)
    save_optimizer(tmp_path, optimizer, names)

    _, wider, _ = make_training(width=6)
    with pytest.raises(
        CheckpointError, match=r"another model: .*0\.weight\.exp_avg is \(5, 4\), its parameter \(6, 4\)"
    ):
        load_optimizer(tmp_path, wider, names)
    with pytest.raises(CheckpointError, match=r"unused is only in the checkpoint; spare is only in the model"):
        load_optimizer(tmp_path, optimizer, [name.replace("unused", "spare") for name in names])
    one_group = torch.optim.AdamW([parameter for group in optimizer.param_groups for parameter in group["params"]])
    with pytest.raises(CheckpointError, match="groups are cut differently"):
        load_optimizer(tmp_path, one_group, names)
    assert one_group.state_dict()["state"] == {}


def test_random_numbers_go_on_where_they_stopped(tmp_path):
    torch.rand(7)
    save_file(random_state(), tmp_path / "random_state_0.safetensors")
    expected = torch.rand(5)
    torch.manual_seed(1)
    set_random_state(load_tensors(tmp_path / "random_state_0.safetensors"))
    assert torch.equal(torch.rand(5), expected)


# --- nothing executes -----------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it creates the file `trace`."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("disguise", ["optimizer.safetensors", "optimizer.json", "manifest.json"])
def test_a_pickle_is_never_loaded(tmp_path, disguise):
    model, optimizer, names = make_training()
    train(model, optimizer, 1)
    folder = CheckpointStore(tmp_path).save(1, lambda folder: save_optimizer(folder, optimizer, names))
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    (folder / disguise).write_bytes(payload)
    assert verify(folder)
    if disguise != "manifest.json":
        with pytest.raises(CheckpointError, match=rf"{disguise} is no readable"):
            load_optimizer(folder, optimizer, names)
    assert not (tmp_path / "executed").exists()
    pickle.loads(payload)
    assert (tmp_path / "executed").exists(), "the payload is harmless, so the test shows nothing"


def test_runs_that_are_older_than_a_setting_go_on_where_it_is_as_it_was_then():
    older = {"temperature": 0.07}
    refuse_other_settings(older, {**older, "crop_interpolation": "bicubic", "schedule.start": 0.0})
    with pytest.raises(ValueError, match="crop_interpolation: bicubic then, bilinear now"):
        refuse_other_settings(older, {**older, "crop_interpolation": "bilinear"})


def test_of_a_run_of_another_model_no_more_is_said_than_that():
    with pytest.raises(ValueError, match=r"trains a 'mimae', these flags a 'misimmim'.*--config") as error:
        refuse_other_settings({"hidden_size": 32}, {"model_type": "misimmim", "embed_dim": 16})
    assert "embed_dim" not in str(error.value)


def test_each_process_gets_its_own_state_back_where_there_are_more_than_ten(tmp_path):
    states = [{"cpu": torch.full((1,), rank)} for rank in range(12)]
    save_process_states(tmp_path, states)
    assert [state["cpu"].item() for state in load_process_states(tmp_path)] == list(range(12))
