"""The contract that every shipped callback keeps."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eventtrain import Callback, Trainer
from eventtrain import callbacks as shipped
from eventtrain.callback import has_state, state_key
from tests.kit import Line, connections, rows
from tests.together import PARALLEL, Witness, fit, new_trainer_of_all

ROOT = Path(__file__).resolve().parent.parent
CALLBACKS = sorted((ROOT / "callbacks").rglob("*.py"))

# The arguments of each callback that cannot be built without any.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ActivationCheckpointing": {"units": (torch.nn.Linear,)},
    "EarlyStopping": {"monitor": "loss"},
    "GradientAccumulation": {"batches": 2},
    "GradientClipping": {"gradient_clip_val": 0.5},
    "JSONLinesLogger": {"path": "metrics.jsonl"},
    "LambdaCallback": {"on_train_epoch_end": lambda trainer, event: None},
    "MixedPrecision": {"precision": "fp16"},
    "Timer": {"max_time": 3600},
}


class Scheduled(Line):
    def __init__(self) -> None:
        super().__init__(lr=0.01, on_step=True, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)


BATCHES = rows(3)


@pytest.fixture(params=shipped.__all__)
def build(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Return a function that builds one of the callbacks, a new one with each call."""
    return lambda: getattr(shipped, request.param)(**ARGUMENTS.get(request.param, {}))


@pytest.fixture
def trainer_of(tmp_path: Path) -> Callable[..., Trainer]:
    """Return a function that builds a trainer with one callback, and a role in place of the default that steps schedulers."""

    class Steps(Callback):
        role = "lr_scheduler_stepping"

    def make(callback: Any, **options: Any) -> Trainer:
        stepping = [] if getattr(callback, "role", None) == Steps.role else [Steps()]
        options = {"max_epochs": 1, "default_callbacks": False, "device": "cpu", "default_root_dir": tmp_path, **options}
        return Trainer(callbacks=[callback, *stepping], **options)

    return make


# ------------------------------------------------------------------ every callback


def test_it_has_a_docstring(build: Callable[[], Any]) -> None:
    docstring = type(build()).__doc__
    assert docstring
    assert docstring[0].isupper()


def test_it_trains_twice_in_a_row_with_the_same_trainer(build: Callable[[], Any], trainer_of: Callable[..., Trainer]) -> None:
    trainer = trainer_of(build(), max_epochs=2)  # more batches than may overflow in float16
    attached = connections(trainer)
    for _ in range(2):
        module = Scheduled()
        before = module.layer.weight.clone()
        trainer.fit(module, BATCHES, BATCHES[:1])
        assert not torch.equal(module.layer.weight, before)
        assert connections(trainer) == attached


def test_it_evaluates_without_a_fit(build: Callable[[], Any], trainer_of: Callable[..., Trainer]) -> None:
    (metrics,) = trainer_of(build()).validate(Scheduled(), BATCHES)
    assert metrics.keys() == {"val_loss"}


def test_it_leaves_no_connection_behind_when_it_is_detached(
    build: Callable[[], Any], trainer_of: Callable[..., Trainer]
) -> None:
    callback = build()
    trainer = trainer_of(callback)
    assert connections(trainer)  # it listens to something
    trainer.fit(Scheduled(), BATCHES)
    trainer.callbacks.remove(callback)
    assert connections(trainer) == {}
    assert callback not in trainer.callbacks


def test_its_state_survives_a_checkpoint(build: Callable[[], Any], trainer_of: Callable[..., Trainer], tmp_path: Path) -> None:
    """Save and load by ``torch.load(weights_only=True)``. Clocks may advance meanwhile."""
    first = build()
    trainer = trainer_of(first)
    trainer.fit(Scheduled(), BATCHES)
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"]
    if not has_state(first):
        assert saved == {}
        return

    second = build()
    restored: list[Any] = []

    class ReadsState:
        def on_fit_start(self, trainer: Trainer, event: Any) -> None:
            restored.append(copy.deepcopy(second.state_dict()))

    resumed = trainer_of(second, max_epochs=2)
    resumed.signals.fit_start.connect(ReadsState().on_fit_start)
    resumed.fit(Scheduled(), BATCHES, ckpt_path=path)
    for state in (restored[0], saved[state_key(first)]):
        state.pop("event_files", None)  # the files in a folder by now
        state.pop("run", None)  # each run has its own
    assert approximately(saved[state_key(first)]) == approximately(restored[0])


def test_it_is_described_before_a_run_as_during_it(build: Callable[[], Any], trainer_of: Callable[..., Trainer]) -> None:
    check_connections(trainer_of(build()), lambda trainer: trainer.fit(Scheduled(), BATCHES, BATCHES[:1]))


def approximately(state: Any) -> Any:
    """Return an object that equals a state, but for a few seconds in its floats."""
    if isinstance(state, dict):
        return {name: approximately(value) for name, value in state.items()}
    if isinstance(state, Tensor):
        return state.tolist()
    return pytest.approx(state, abs=5.0) if isinstance(state, float) else state


# ------------------------------------------------------------------ the connections of a run

MOMENTS = ("setup", "fit_start", "train_start", "train_batch_end", "validation_end", "train_end", "teardown")


class Looks(Callback):
    """Looks at the connections at each of :data:`MOMENTS`, the first time.

    Attributes:
        seen: The tree of ``trainer.describe()`` and the receivers of each signal, by moment.
    """

    def __init__(self) -> None:
        self.seen: dict[str, tuple[str, dict[str, list[Any]]]] = {}
        for moment in MOMENTS:
            setattr(self, f"on_{moment}", partial(self._look, moment))

    def _look(self, moment: str, trainer: Trainer, event: Any) -> None:
        self.seen.setdefault(moment, look(trainer))


def look(trainer: Trainer) -> tuple[str, dict[str, list[Any]]]:
    """Return the tree of ``trainer.describe()`` without its head, and the receivers of each signal in order."""
    head, tree = trainer.describe().split("\n\n", 1)
    assert head.startswith("Trainer: ") and tree.startswith("fit\n")
    return tree, {signal.name: signal.attached() for signal in trainer.signals}


def check_connections(trainer: Trainer, fit: Callable[[Trainer], None]) -> None:
    """Check that the connections before a run are those during it and after it: the same objects, in the same order.

    Args:
        trainer: The trainer.
        fit: Trains with it.
    """
    looks = Looks()
    trainer.callbacks.append(looks)
    tree, receivers = look(trainer)
    fit(trainer)
    assert looks.seen.keys() == set(MOMENTS)
    for moment, (its_tree, its_receivers) in {**looks.seen, "afterwards": look(trainer)}.items():
        assert its_tree == tree, moment
        for name, objects in its_receivers.items():
            assert list(map(id, objects)) == list(map(id, receivers[name])), f"{name} at {moment}"


@pytest.mark.parametrize("parallel", PARALLEL)
def test_all_together_are_described_before_a_run_as_during_it(tmp_path: Path, parallel: str) -> None:
    trainer = new_trainer_of_all(tmp_path, parallel, Witness(interrupts=False))
    check_connections(trainer, fit)


def test_a_run_that_a_signal_ends_leaves_the_connections_of_all_as_they_were(tmp_path: Path) -> None:
    trainer = new_trainer_of_all(tmp_path, PARALLEL[0], Witness(interrupts=True))
    before = look(trainer)
    with pytest.raises(SystemExit):
        fit(trainer)
    assert look(trainer) == before


# ------------------------------------------------------------------ the package


def test_every_callback_class_is_exported() -> None:
    for path in CALLBACKS:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and "Callback" in [ast.unparse(base) for base in node.bases]:
                assert node.name in shipped.__all__


def test_importing_is_light() -> None:
    """Heavy packages are imported when they are used; those of torch are there anyway."""
    code = (
        "import sys, torch; before = set(sys.modules); import eventtrain, eventtrain.callbacks; "
        "print(*{name.partition('.')[0] for name in sys.modules.keys() - before})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(result.stdout.split())
    assert "eventtrain" in new
    assert new & {"tensorboard", "psutil", "tqdm", "sklearn", "torchmetrics", "matplotlib", "IPython"} == set()


def test_the_generated_files_are_fresh() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (0, "")
