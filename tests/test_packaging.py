"""Packaging: the wheel and the sdist build, hold every file, and the wheel trains without a checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TRAIN = """
import eventtrain, torch
from eventtrain.callbacks import GradientAccumulation
from pathlib import Path

class Model(eventtrain.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = eventtrain.Trainer(max_epochs=2, callbacks=[GradientAccumulation(2)], device="cpu", default_callbacks=False)
trainer.fit(Model(), [torch.ones(3, 2)] * 4)
print(Path(eventtrain.__file__).parent, trainer.global_step)
"""


def run(*command: str, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    return out


def shipped() -> set[str]:
    core = {f"eventtrain/{path.name}" for path in (ROOT / "eventtrain").glob("*.py*") if path.suffix in (".py", ".pyi")}
    return (
        core
        | {"eventtrain/py.typed", "eventtrain/timeline.html"}
        | {f"eventtrain/callbacks/{path.name}" for path in (ROOT / "callbacks").glob("*.py")}
    )


@pytest.mark.slow
def test_the_wheel_holds_every_file_once(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    modules = [name for name in names if ".dist-info/" not in name]
    assert sorted(modules) == sorted(shipped())


@pytest.mark.slow
def test_the_sdist_holds_the_sources(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "callbacks/__init__.py", "eventtrain/core/loop.py"} <= names


@pytest.mark.slow
def test_the_wheel_trains_elsewhere(built: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    wheel = str(next(built.glob("*.whl")))
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--target", str(site), wheel)
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    folder, steps = run(
        sys.executable, str(script), cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}
    ).split()
    assert Path(folder) == site / "eventtrain"
    assert steps == "4"


def test_importing_the_callbacks_folder_names_the_right_import() -> None:
    done = subprocess.run([sys.executable, "-c", "import callbacks"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "from eventtrain.callbacks import" in done.stderr
