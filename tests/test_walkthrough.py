"""docs/walkthrough.md, command by command, on a Hub of this machine; shortened."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from forking import run_forked
from loopback_hub import Account, LoopbackHub

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
TOKEN = "hf_" + "Walker" * 6
# a push must be launched: which Hub is meant, is read when it is imported
LAUNCHED = ("mimae.hub.push",)
TRAINING = ["--max_train_steps", "6", "--report_to", "none", "--logging_steps", "2", "--cpu_threads", "1"]
# what makes a command short; the page's own flags stay
SHORTER = {
    "run_mim_pretrain.py": [*TRAINING, "--probe_samples", "200"],
    "knn.yaml": ["--cpu_threads", "1"],
    "linear_probe.yaml": TRAINING,
    "finetune.yaml": TRAINING,
    "evaluate.yaml": ["--corruptions", "gaussian_noise", "--cpu_threads", "1"],
}
WITHOUT_THE_PACKAGE = """
import sys

sys.modules["mimae"] = None  # an editable install must not help
{snippet}
import torch

image = torch.randn(2, 3, 16, 16)
tokens = encoder.eval()(image).last_hidden_state
torch.testing.assert_close(backbone.eval()(image).last_hidden_state, tokens, rtol=1e-5, atol=1e-5)
assert type(encoder).__module__.startswith("transformers_modules.")
assert sorted(answer["label"] for answer in classify("digit.png", top_k=10)) == list("0123456789")
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


class Command(NamedTuple):
    """One of the page's: how its program is launched, which that is, a script or a module, and its flags."""

    launcher: list[str]
    program: str
    argv: list[str]


def commands() -> list[Command]:
    """Small enough for a test, with this Python."""
    found = []
    for line in "".join(blocks("bash")).splitlines():
        words = shlex.split(line.replace("YOU/", "someone/"))
        shorter = next((flags for mark, flags in SHORTER.items() if mark in line), [])
        launcher = [sys.executable]
        if words[0] == "accelerate":
            launcher += ["-m", "accelerate.commands.launch", "--num_processes", "1"]
        words = words[2 if words[0] == "accelerate" else 1 :]
        if words[0] == "-m":
            launcher.append(words.pop(0))
        found.append(Command(launcher, words[0], [*words[1:], *shorter]))
    return found


@pytest.fixture
def environment(tmp_path):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with LoopbackHub({TOKEN: Account("someone")}) as hub:
        yield inherited | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }


def fork(command: Command, folder: Path, environment: dict[str, str]) -> str:
    """Runs it without its launch: a minute of imports less over all commands."""
    is_script = command.program.endswith(".py")
    program = folder / command.program if is_script else command.program
    result = run_forked(program, command.argv, cwd=folder, environment=environment)
    assert result.returncode == 0, f"{command}\n{result.output[-4000:]}"
    return result.output


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout + result.stderr


@pytest.mark.parametrize("launched", ["what must be", pytest.param("all", marks=pytest.mark.extended)])
def test_the_walkthrough_leads_from_nothing_to_the_hub_and_back(tmp_path, environment, launched):
    for name in ("recipes", "run_mim_pretrain.py", "run_image_classification.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    said = []
    for command in commands():
        launcher, program, argv = command
        if launched == "all" or program in LAUNCHED:
            said.append(run([*launcher, program, *argv], tmp_path, environment))
        else:
            said.append(fork(command, tmp_path, environment))

    for task in ("knn", "knn-untrained", "linear_probe", "finetune", "evaluate"):
        assert (tmp_path / "outputs" / f"digits-{task}" / "results.json").exists()
    assert "gaussian noise" in said[5]
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"vit", "timm.safetensors", "mae.pth", "mimae"}
    assert "pushed" in said[-1]
    assert TOKEN not in "".join(said)

    digit = "from PIL import Image; Image.effect_noise((8, 8), 64).save('digit.png')"
    (tmp_path / "elsewhere").mkdir()
    clean = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    clean["HF_HOME"] = str(tmp_path / "elsewhere" / "home")
    (snippet,) = (block.replace("YOU/", "someone/") for block in blocks("python"))
    script = f"{digit}\n{WITHOUT_THE_PACKAGE.format(snippet=snippet)}"
    run([sys.executable, "-c", script], tmp_path / "elsewhere", clean)
