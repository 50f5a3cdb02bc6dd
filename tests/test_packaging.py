"""Who imports whom, and a wheel that holds everything."""

import ast
import configparser
import os
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from forking import run_forked

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("run_*.py"))
SUB_PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
HUB_FILES = sorted(
    path.name
    for pattern in ("configuration_*.py", "modeling_*.py", "masking.py", "mutual_information.py")
    for path in ROOT.glob(pattern)
)

# from the ground up: each room imports from those before it, and from itself; docs/architecture.md draws the same
ROOMS = (
    *("masking", "mutual_information", "configuration", "modeling", "version"),
    *("data", "data.images", "data.sources", "data.batches", "data.scenes"),
    *("evaluation", "flags", "families", "dense", "hub"),
    *("training.checkpoints", "training", "training.hf_trainer", "pictures", "jobs", "run"),
    *("drills", "benchmarks", "replication"),
)
MADE_HERE = {"build", "dist", "exports", "outputs", "scenes"}  # by commands of the README: models bring code with them
LARGEST_ROOM = 14  # files


def imports_of(path: Path) -> list[tuple[int, str, list[str]]]:
    """Every import statement, those inside functions too: (level, module, names)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return found


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports, however it spells it: "data.sources.base", without "mimae."."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for level, module, names in imports_of(path):
        if level:
            parts = [*package[: len(package) - (level - 1)], *(module.split(".") if module else [])]
        elif module.split(".")[0] == "mimae":
            parts = module.split(".")[1:]
        else:
            continue
        for name in names or [""]:
            whole = [*parts, name] if name else parts
            is_module = (ROOT / Path(*whole)).with_suffix(".py").is_file() or (ROOT / Path(*whole)).is_dir()
            # `from mimae import MIMAEConfig` gives a class of the modeling room
            found.add(".".join(whole if is_module else parts) or "modeling_mimae")
    return found


def room_of(module: str) -> str:
    """modeling_mimae → modeling, data.sources.base → data.sources, data.words → data."""
    first, *rest = module.split(".")
    prefixed = next((room for room in ("configuration", "modeling", "run") if first.startswith(f"{room}_")), None)
    return prefixed or next((room for room in (".".join([first, *rest[:1]]), first) if room in ROOMS), first)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_rooms(path: Path) -> set[str]:
    return {room_of(module) for module in imported_modules(path)}


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


PACKAGE_FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {"tests", *MADE_HERE} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    and path != ROOT / "__init__.py"
]


def test_the_import_rules_see_what_they_should(tmp_path):
    # negative control of the reader of imports
    path = tmp_path / "x.py"
    path.write_text('"""from .a import b"""\ndef f():\n    import timm.optim\n    from . import masking\n')
    assert imports_of(path) == [(0, "timm.optim", []), (1, "", ["masking"])]
    assert room_of("modeling_mimae") == "modeling"
    assert room_of("run_mim_pretrain") == "run"
    assert room_of("data.sources.base") == "data.sources"
    assert room_of("data.words") == "data"
    assert imported_rooms(ROOT / "modeling_mim.py") == {"configuration", "masking", "mutual_information"}
    assert "data.order" in imported_modules(ROOT / "data" / "batches" / "loaders.py")


def test_there_are_files_to_check():
    assert {"configuration_mimae.py", "masking.py", "modeling_mimae.py", "mutual_information.py"} <= set(HUB_FILES)
    assert {"data", "dense", "evaluation", "families", "flags", "hub", "jobs", "training"} <= set(SUB_PACKAGES)
    assert {room_of(module_of(path)) for path in PACKAGE_FILES} == set(ROOMS)


def test_rooms_import_only_from_those_below_them():
    upward = {
        f"{module_of(path)} imports {module}"
        for path in PACKAGE_FILES
        for module in imported_modules(path)
        if room_of(module) in ROOMS and ROOMS.index(room_of(module)) > ROOMS.index(room_of(module_of(path)))
    }
    assert not upward


def test_no_module_imports_itself_in_a_circle():
    imports = {module_of(path): imported_modules(path) for path in PACKAGE_FILES}
    open_ends = set(imports)
    while ends := {module for module in open_ends if not imports[module] & open_ends - {module}}:
        open_ends -= ends  # what imports nothing that is left cannot be in a circle
    assert not open_ends


@pytest.mark.parametrize("name", SCRIPTS)
def test_nobody_but_who_runs_them_imports_a_script(name):
    importers = {room_of(module_of(path)) for path in PACKAGE_FILES if Path(name).stem in imported_modules(path)}
    assert importers <= {"drills", "benchmarks", "replication"}


def test_no_two_things_of_the_library_have_one_name():
    """But `main`, which each script and each command has, and what each encoder's page has."""
    places: dict[str, set[str]] = {}
    for path in PACKAGE_FILES:
        if module_of(path).startswith(("drills", "benchmarks", "replication", "families.encoders")):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, set()).add(module_of(path))
    assert [name for name, modules in places.items() if len(modules) > 1] == ["main"]


def test_no_room_is_crowded():
    folders = {path.parent for path in PACKAGE_FILES}
    crowded = {
        str(folder.relative_to(ROOT)): len(files)
        for folder in folders
        if len(files := [path for path in folder.glob("*.py") if path.name != "__init__.py"]) > LARGEST_ROOM
    }
    assert not crowded


@pytest.mark.parametrize("name", HUB_FILES)
def test_files_of_a_checkpoint_import_only_what_the_hub_finds(name):
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    siblings = {Path(other).stem for other in HUB_FILES}
    for level, module, names in imports_of(ROOT / name):
        if level == 0:
            assert module.split(".")[0] in allowed, f"{name} imports {module}"
        else:
            assert level == 1, f"{name}: the Hub's loader finds no parent package"
            assert module in siblings, f"{name}: write `from .file import {names}`, of a file that travels with it"


@pytest.mark.parametrize("name", HUB_FILES)
def test_no_docstring_line_of_a_checkpoint_file_reads_like_a_relative_import(name):
    # the Hub's loader searches lines, not syntax
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    real = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    looks_like = {i for i, line in enumerate(lines, 1) if line.strip().startswith(("from .", "import ."))}
    assert looks_like <= real


def test_evaluation_names_no_model_class():
    for path in python_files("evaluation"):
        words = {node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)}
        named = {name for _, _, names in imports_of(path) for name in names} | words
        models = {name for name in named if name.startswith(("MIMAE", "MISimMIM"))}
        assert not models, f"{path.name} names {models}"
        assert "modeling" not in imported_rooms(path), path.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_this_package_by_its_name(name):
    for level, module, _ in imports_of(ROOT / name):
        assert level == 0, f"{name} imports relatively"
        assert module.split(".")[0] not in {*SUB_PACKAGES, *(Path(other).stem for other in HUB_FILES)}, module


def test_no_folder_shadows_a_library():
    assert not {"datasets", "evaluate", "transformers", "torch", "timm", "accelerate"} & {
        p.name for p in ROOT.iterdir()
    }


def test_setup_lists_every_sub_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    on_disk = {
        ".".join(["mimae", *path.parent.relative_to(ROOT).parts])
        for path in ROOT.rglob("__init__.py")
        if not {"tests", *MADE_HERE} & set(path.relative_to(ROOT).parts)
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    }
    assert listed == on_disk


def run_elsewhere(code: str, folder: Path, *paths: Path) -> str:
    """Python in another folder, with these on the path, and neither the checkout nor an editable install of it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of what git knows or would add, built outside the checkout, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), "source"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, installed into a folder of its own without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return target


def test_the_wheel_holds_every_module_and_recipe_and_the_mark_of_types_and_no_test(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = [*ROOT.glob("*.py"), *python_files(*SUB_PACKAGES)]
    recipes = (ROOT / "recipes").rglob("*.yaml")
    typed = ROOT / "py.typed"  # type checkers of users read the annotations
    expected = {f"mimae/{path.relative_to(ROOT).as_posix()}" for path in [*modules, *recipes, typed]}
    assert expected <= names, expected - names
    assert not {name for name in names if "/tests/" in name or name.startswith("tests/")}


def test_everything_imports_from_the_wheel(installed, tmp_path):
    modules = ["mimae"]
    modules += [f"mimae.{info.name}" for info in pkgutil.walk_packages([str(installed / "mimae")])]
    assert {"mimae.modeling_mimae", "mimae.data", "mimae.training"} <= set(modules)
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(installed)!r}), module.__file__\n"
        "assert sys.modules['mimae'].__version__\n"
        "print('imported')"
    )
    assert run_elsewhere(code, tmp_path, installed).strip().endswith("imported")


def test_scripts_run_from_the_root_import_no_bare_sub_package(tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"  # as `python run_x.py` has it
        f"for script in {[str(ROOT / name) for name in SCRIPTS]!r}:\n"
        "    runpy.run_path(script, run_name='imported')\n"
        f"    bare = set({SUB_PACKAGES!r}) & set(sys.modules)\n"
        "    assert not bare, (script, bare)\n"
        "print('imported')"
    )
    (tmp_path / "program.py").write_text(code)
    result = run_forked(tmp_path / "program.py", [], cwd=tmp_path)
    assert result.returncode == 0, result.output
    assert result.output.strip().endswith("imported")
