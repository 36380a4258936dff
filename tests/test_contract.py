"""The contract that every shipped callback keeps."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import Callback, LightningModule, Trainer
from eventtrain import callbacks as shipped
from eventtrain.callback import detach, has_state, state_key

ROOT = Path(__file__).resolve().parent.parent
CALLBACKS = sorted((ROOT / "callbacks").rglob("*.py"))

# How each is built where it cannot be without arguments; tmp_path is the run's directory.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "EarlyStopping": {"monitor": "loss"},
    "GradientAccumulation": {"batches": 2},
    "GradientClipping": {"gradient_clip_val": 0.5},
    "JSONLinesLogger": {"path": "metrics.jsonl"},
    "LambdaCallback": {"on_train_epoch_end": lambda trainer, event: None},
    "MixedPrecision": {"precision": "fp16"},
    "Timer": {"max_time": 3600},
}


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)


BATCHES = [torch.full((2, 1), float(x)) for x in (1, 2, 3)]


@pytest.fixture(params=shipped.__all__)
def build(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Builds one of the callbacks, a new one with each call."""
    return lambda: getattr(shipped, request.param)(**ARGUMENTS.get(request.param, {}))


@pytest.fixture
def trainer_of(tmp_path: Path) -> Callable[..., Trainer]:
    """Builds a trainer whose schedulers are stepped by hand, so that nothing but the callback is attached."""

    class Steps(Callback):
        role = "lr_scheduler_stepping"

    def make(callback: Any, **options: Any) -> Trainer:
        stepping = [] if getattr(callback, "role", None) == Steps.role else [Steps()]
        options = {"max_epochs": 1, "default_callbacks": False, "device": "cpu", "default_root_dir": tmp_path, **options}
        return Trainer(callbacks=[callback, *stepping], **options)

    return make


def connections(trainer: Trainer) -> dict[str, list[Any]]:
    return {signal.name: signal.attached() for signal in trainer.signals if signal.attached()}


# ------------------------------------------------------------------ every callback


def test_it_says_what_it_does_and_listens_to(build: Callable[[], Any]) -> None:
    docstring = type(build()).__doc__
    assert docstring
    assert docstring[0].isupper()


def test_it_trains_twice_in_a_row_with_the_same_trainer(build: Callable[[], Any], trainer_of: Callable[..., Trainer]) -> None:
    trainer = trainer_of(build())
    attached = connections(trainer)
    for _ in range(2):
        module = Module()
        before = module.layer.weight.clone()
        trainer.fit(module, BATCHES, BATCHES[:1])
        assert not torch.equal(module.layer.weight, before)
        assert connections(trainer) == attached


def test_it_evaluates_without_a_fit(build: Callable[[], Any], trainer_of: Callable[..., Trainer]) -> None:
    (metrics,) = trainer_of(build()).validate(Module(), BATCHES)
    assert metrics.keys() == {"val_loss"}


def test_it_leaves_no_connection_behind_when_it_is_detached(
    build: Callable[[], Any], trainer_of: Callable[..., Trainer]
) -> None:
    callback = build()
    trainer = trainer_of(callback)
    assert connections(trainer)  # it listens to something
    trainer.fit(Module(), BATCHES)
    detach(callback, trainer.signals, trainer.callbacks)
    assert connections(trainer) == {}
    assert callback not in trainer.callbacks


def test_its_state_survives_a_checkpoint(build: Callable[[], Any], trainer_of: Callable[..., Trainer], tmp_path: Path) -> None:
    """Through ``torch.save``, ``torch.load(weights_only=True)`` and ``load_state_dict``; clocks go on meanwhile."""
    first = build()
    trainer = trainer_of(first)
    trainer.fit(Module(), BATCHES)
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    kept = torch.load(path, weights_only=True)["callbacks"]
    if not has_state(first):
        assert kept == {}
        return

    second = build()
    restored: list[Any] = []

    class ReadsState:
        def on_fit_start(self, trainer: Trainer, event: Any) -> None:
            restored.append(copy.deepcopy(second.state_dict()))

    resumed = trainer_of(second, max_epochs=2)
    resumed.signals.fit_start.connect(ReadsState().on_fit_start)
    resumed.fit(Module(), BATCHES, ckpt_path=path)
    restored[0].pop("event_files", None)  # what lies in a folder by now
    kept[state_key(first)].pop("event_files", None)
    assert approximately(kept[state_key(first)]) == approximately(restored[0])


def approximately(state: Any) -> Any:
    """Equal to a state but for a few seconds in its floats."""
    if isinstance(state, dict):
        return {name: approximately(value) for name, value in state.items()}
    if isinstance(state, Tensor):
        return state.tolist()
    return pytest.approx(state, abs=5.0) if isinstance(state, float) else state


def test_every_callback_class_is_exported() -> None:
    for path in CALLBACKS:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and "Callback" in [ast.unparse(base) for base in node.bases]:
                assert node.name in shipped.__all__


def test_importing_is_light() -> None:
    """What is heavy is imported when it is used; what torch imports by itself is there anyway."""
    code = (
        "import sys, torch; before = set(sys.modules); import eventtrain, eventtrain.callbacks; "
        "print(*{name.partition('.')[0] for name in sys.modules.keys() - before})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(result.stdout.split())
    assert "eventtrain" in new
    assert new & {"tensorboard", "psutil", "tqdm", "sklearn", "torchmetrics", "matplotlib", "IPython"} == set()


def test_the_derived_files_are_fresh() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (0, "")
