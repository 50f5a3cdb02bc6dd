"""Recipes, told apart by the script that the Command of their header names."""

import re
from pathlib import Path

import mimae

RECIPES = Path(mimae.__file__).parent / "recipes"


def header_of(recipe: Path) -> str:
    """The comment that a recipe begins with."""
    return recipe.read_text(encoding="utf-8").split("\n\n")[0]


def recipes_of(script: str) -> list[Path]:
    """All recipes of a script, sorted."""
    return sorted(path for path in RECIPES.rglob("*.yaml") if _script_of(path) == script)


def _script_of(recipe: Path) -> str:
    _, command = header_of(recipe).split("Command:")
    return re.search(r"run_\w+\.py", command)[0]
