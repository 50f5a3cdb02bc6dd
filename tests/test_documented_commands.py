"""The commands of README.md and docs/: their scripts know every flag."""

import argparse
import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from mimae.jobs import dense as dense_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"run_\w+\.py|mimae\.[\w.]+")


class ParsedError(Exception):
    """The flags are good: nothing is to be run."""


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Module and flags of each command in a page's blocks of Bash that is one of this project."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            position = next((i for i, word in enumerate(words) if PROGRAM.fullmatch(word)), None)
            if position is not None:
                name = words[position].removeprefix("mimae.").removesuffix(".py")
                found.append((f"mimae.{name}", words[position + 1 :]))
    return found


def stopping_after(parse: Callable[..., Any]) -> Callable[..., NoReturn]:
    def parse_and_stop(*args: Any, **options: Any) -> NoReturn:
        parse(*args, **options)
        raise ParsedError

    return parse_and_stop


def test_a_commit_is_checked_by_what_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = re.search(r"^lint: (.*)\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    prerequisites, recipe = lint.groups()
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    commands += [f"make {target}" for target in prerequisites.split() if target != "install"]
    assert sorted(hook["entry"] for hook in hooks) == sorted(commands)


@pytest.mark.parametrize(
    ("module", "argv"),
    [pytest.param(*command, id=f"{page.name}-{i}") for page in PAGES for i, command in enumerate(commands(page))],
)
def test_every_documented_command_is_understood(module, argv, monkeypatch):
    script = importlib.import_module(module)
    if hasattr(script, "__path__"):
        script = importlib.import_module(f"{module}.__main__")
    owner = script if hasattr(script, "parse_arguments") else dense_run
    if module.startswith("mimae.run_"):
        monkeypatch.setattr(owner, "parse_arguments", stopping_after(owner.parse_arguments))
    else:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping_after(argparse.ArgumentParser.parse_args))
    monkeypatch.chdir(ROOT)
    with pytest.raises(ParsedError):
        script.main(argv)


def test_the_pages_have_the_commands_of_every_script():
    named = {module for page in PAGES for module, _ in commands(page)}
    assert named >= {f"mimae.{path.stem}" for path in ROOT.glob("run_*.py")}
    assert {"mimae.hub.export", "mimae.hub.push", "mimae.data.scenes"} <= named
