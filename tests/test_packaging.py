"""The wheel and the sdist hold every file once; the wheel, the sdist and an editable install train without the checkout."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCES = (".git", ".venv*", ".*_cache", ".hypothesis", ".coverage*", "*.egg-info", "build", "dist", "runs", "checkpoints")

TRAIN = """
import importlib, pkgutil
import eventtrain, torch
from eventtrain import callbacks
from pathlib import Path

for module in pkgutil.walk_packages(eventtrain.__path__, "eventtrain."):
    importlib.import_module(module.name)

class Model(eventtrain.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

attached = [callbacks.GradientAccumulation(2), callbacks.EventTimeline(steps={1})]
trainer = eventtrain.Trainer(max_epochs=2, callbacks=attached, device="cpu", default_callbacks=False)
trainer.fit(Model(), [torch.ones(3, 2)] * 4)
print(Path(eventtrain.__file__).resolve().parent, Path(callbacks.__file__).resolve().parent, trainer.global_step)
"""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ------------------------------------------------------------------ the files of the project


def files(folder: str) -> set[str]:
    """Return the files below a folder of the project. Links to folders are not followed."""
    paths = {Path(top) / name for top, _, names in os.walk(ROOT / folder) for name in names}
    return {path.relative_to(ROOT).as_posix() for path in paths if path.parent.name != "__pycache__"}


def packages() -> dict[str, str]:
    """Return the folder of each package by the package's name."""
    folders = [path.removesuffix("/__init__.py") for path in files("eventtrain") | files("callbacks") if "__init__" in path]
    names = [folder if folder.startswith("eventtrain") else f"eventtrain/{folder}" for folder in folders]
    return {name.replace("/", "."): folder for name, folder in zip(names, folders, strict=True)}


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_setup_lists_every_package() -> None:
    assert sorted(setup()["options"]["packages"].split()) == sorted(packages())


def test_setup_lists_all_data_of_packages() -> None:
    patterns = {name: value.replace(",", " ").split() for name, value in setup()["options.package_data"].items()}
    data = {path for path in files("eventtrain") | files("callbacks") if not path.endswith(".py")}
    for name, folder in packages().items():
        for pattern in patterns.pop(name, []):
            matches = {path for path in data if path.rpartition("/")[0] == folder and fnmatch(Path(path).name, pattern)}
            assert matches, f"{name}: no file is named {pattern}"
            data -= matches
    assert (data, patterns) == (set(), {})


def test_importing_the_callbacks_folder_names_the_right_import() -> None:
    done = subprocess.run([sys.executable, "-c", "import callbacks"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "from eventtrain.callbacks import" in done.stderr


# ------------------------------------------------------------------ the sdist and the wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project that has been used: with compiled files."""
    copy = tmp_path_factory.mktemp("source") / "eventtrain"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    for folder in ("tests", "callbacks", "eventtrain"):
        (copy / folder / "__pycache__").mkdir(exist_ok=True)
        (copy / folder / "__pycache__/stale.cpython-311.pyc").touch()
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the sdist, and of the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


@pytest.mark.slow
def test_the_wheel_holds_every_file_once(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    modules = [name for name in names if ".dist-info/" not in name]
    assert sorted(modules) == sorted([*files("eventtrain"), *(f"eventtrain/{path}" for path in files("callbacks"))])
    assert not [name for name in names if "generate" in name]


@pytest.mark.slow
def test_the_sdist_holds_the_whole_project_once(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    assert len(names) == len(set(names))
    folders = [".ci", ".github", "benchmarks", "callbacks", "docs", "eventtrain", "examples", "tests"]
    project = {path for folder in folders for path in files(folder)}
    project |= {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith((".coverage", ".git"))}
    made = {"PKG-INFO", ".gitignore", *(name for name in names if ".egg-info/" in name)}
    assert set(names) - made == project - made
    assert {"tests/kit.py", "docs/resume.md", "examples/digits.py", "benchmarks/overhead.py", "LICENSE"} <= set(names)


# ------------------------------------------------------------------ three ways to install


def trained(tmp_path: Path, *arguments: str | Path) -> list[str]:
    """Install the package into a new environment, and train in it.

    Args:
        tmp_path: The folder of the environment.
        *arguments: Further arguments for ``pip install``.

    Returns:
        The folder of the package, that of the callbacks, and the number of updates.
    """
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = next(path for path in (environment / "bin/python", environment / "Scripts/python.exe") if path.exists())
    libraries = sysconfig.get_path("purelib")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "-q"]
    run(*pip, "--no-deps", "--no-build-isolation", "--ignore-installed", *arguments, PYTHONPATH=libraries)
    # The libraries of this environment, but not its installed eventtrain: links below a path are not followed.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", PYTHONPATH="").strip()
    (Path(site) / "libraries.pth").write_text(libraries)
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    return run(python, script, cwd=tmp_path, PYTHONPATH="").split()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["*.whl", "*.tar.gz"])
def test_the_wheel_and_the_sdist_train(built: Path, tmp_path: Path, form: str) -> None:
    package, callbacks, steps = trained(tmp_path, next(built.glob(form)))
    assert Path(package).is_relative_to((tmp_path / "environment").resolve())
    assert (Path(callbacks), steps) == (Path(package) / "callbacks", "4")


@pytest.mark.slow
def test_an_editable_install_trains(source: Path, tmp_path: Path) -> None:
    assert trained(tmp_path, "--editable", source) == [str(source / "eventtrain"), str(source / "callbacks"), "4"]
