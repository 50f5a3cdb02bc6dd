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

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("run_*.py"))
SUB_PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
HUB_FILES = sorted(
    path.name
    for pattern in ("configuration_*.py", "modeling_*.py", "masking.py", "mutual_information.py")
    for path in ROOT.glob(pattern)
)

# layer → what it may import of this package, itself aside; a script may import all of them
MAY_IMPORT = {
    "configuration": {"masking"},
    "masking": set(),
    "mutual_information": set(),
    "modeling": {"configuration", "masking", "mutual_information"},
}
LIBRARY = {*MAY_IMPORT, *SUB_PACKAGES, "version"}


def imports_of(path: Path) -> list[tuple[int, str, list[str]]]:
    """Every import statement, those inside functions too: (level, module, names)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return found


def layer_of(module: str) -> str:
    """Of a dotted name relative to the package: modeling_mimae → modeling, data.sources → data."""
    first = module.split(".")[0]
    return next((layer for layer in ("configuration", "modeling", "run") if first.startswith(f"{layer}_")), first)


def imported_layers(path: Path) -> set[str]:
    """Layers of this package that a file imports, however it spells it."""
    package = path.relative_to(ROOT).parts[:-1]
    layers = set()
    for level, module, names in imports_of(path):
        if level:
            base = package[: len(package) - (level - 1)]
            parts = [*base, *(module.split(".") if module else [])]
        elif module.split(".")[0] == "mimae":
            parts = module.split(".")[1:]
        else:
            continue
        # `from mimae import X` and `from .. import X` give classes of the modeling layer, or name a module
        targets = [".".join(parts)] if parts else names
        layers |= {layer_of(target) for target in targets}
    return layers & (LIBRARY | {"run"})


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_import_rules_see_what_they_should(tmp_path):
    # negative control of the reader of imports
    path = tmp_path / "x.py"
    path.write_text('"""from .a import b"""\ndef f():\n    import timm.optim\n    from . import masking\n')
    assert imports_of(path) == [(0, "timm.optim", []), (1, "", ["masking"])]
    assert layer_of("modeling_mimae") == "modeling"
    assert layer_of("run_mim_pretrain") == "run"
    assert layer_of("data.sources") == "data"
    assert imported_layers(ROOT / "modeling_mim.py") == {"configuration", "masking", "mutual_information"}


def test_there_are_files_to_check():
    assert {"configuration_mimae.py", "masking.py", "modeling_mimae.py", "mutual_information.py"} <= set(HUB_FILES)
    assert {"data", "dense", "evaluation", "hub", "training"} <= set(SUB_PACKAGES)


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


@pytest.mark.parametrize("name", HUB_FILES)
def test_model_files_import_only_the_layers_below_them(name):
    layer = layer_of(Path(name).stem)
    assert imported_layers(ROOT / name) <= MAY_IMPORT[layer] | {layer}


def test_the_library_never_imports_a_script():
    for path in [*python_files(*SUB_PACKAGES), *(ROOT / name for name in HUB_FILES)]:
        assert "run" not in imported_layers(path), path.name


def test_evaluation_names_no_model_class():
    for path in python_files("evaluation"):
        words = {node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)}
        named = {name for _, _, names in imports_of(path) for name in names} | words
        models = {name for name in named if name.startswith(("MIMAE", "MISimMIM"))}
        assert not models, f"{path.name} names {models}"
        assert "modeling" not in imported_layers(path), path.name


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
        if not {"tests", "build"} & set(path.relative_to(ROOT).parts) and ".venv" not in path.parts
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
    pytest.importorskip("setuptools", minversion="77")  # the build system's own floor
    pytest.importorskip("build")
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


def test_the_wheel_holds_every_module_and_recipe_and_no_test(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = [*ROOT.glob("*.py"), *python_files(*SUB_PACKAGES)]
    recipes = (ROOT / "recipes").rglob("*.yaml")
    expected = {f"mimae/{path.relative_to(ROOT).as_posix()}" for path in [*modules, *recipes]}
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run_from_the_root_import_no_bare_sub_package(name, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"  # as `python run_x.py` has it
        f"runpy.run_path({str(ROOT / name)!r}, run_name='imported')\n"
        f"bare = set({SUB_PACKAGES!r}) & set(sys.modules)\n"
        "assert not bare, bare\n"
        "print('imported')"
    )
    # the parent of a folder named mimae, or the editable install, is where `import mimae` finds the checkout
    paths = [ROOT.parent] if ROOT.name == "mimae" else []
    assert run_elsewhere(code, tmp_path, *paths).strip().endswith("imported")
