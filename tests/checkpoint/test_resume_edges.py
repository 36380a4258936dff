"""Unusual resumes: several checkpoint folders, copies, rollbacks, hooks with state, other kinds of loaders."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from eventtrain import Callback, LightningDataModule, LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, ModelCheckpoint
from eventtrain.checkpoint import storage
from tests.kit import new_trainer
from tests.resuming import KeepAll, Model, Record, assert_same_run, check_all_safe_points, run

DATA = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
VALIDATION = [DATA[:4]]


def trainer_of(root: Path, *callbacks: Any, **options: Any) -> Trainer:
    return new_trainer(*callbacks, default_root_dir=root, **{"max_epochs": 3, **options})


def batches() -> DataLoader[Any]:
    return DataLoader(DATA, 4, shuffle=True)  # type: ignore[arg-type]


class Plain(LightningModule):
    """Logs one of these scores in each epoch's validation."""

    def __init__(self, scores: tuple[float, ...] = (0.3, 0.1, 0.2)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.scores = scores

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.scores[self.trainer.current_epoch % len(self.scores)])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class StopsAt(Callback):
    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, f"on_{event}", self.stop)

    def stop(self, trainer: Trainer, event: Any) -> None:
        if trainer.global_step == self.step:
            trainer.stop("enough")


class FailsAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_backward(self, trainer: Trainer, event: Any) -> None:
        if trainer.total_batch_idx == self.batch:
            raise RuntimeError("a bug")


# ------------------------------------------------------------------ which file


def test_of_two_folders_the_newest_file_is_the_last(tmp_path: Path) -> None:
    def two() -> list[Any]:
        return [ModelCheckpoint("slow", every_n_epochs=1), ModelCheckpoint("often", every_n_steps=2)]

    with pytest.raises(RuntimeError, match="a bug"):
        trainer_of(tmp_path, *two(), FailsAt(8)).fit(Plain(), batches())
    trainer = trainer_of(tmp_path, *two())
    begun: list[int] = []
    trainer.signals.train_start.connect(lambda t, event: begun.append(t.global_step))
    trainer.fit(Plain(), batches(), ckpt_path="last")
    assert begun == [8]


def test_best_is_of_the_callback_that_has_a_metric(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ModelCheckpoint("newest"), ModelCheckpoint("best", monitor="val"))
    trainer.fit(module := Plain(), batches(), VALIDATION)
    best = storage.read(tmp_path / "best" / "epoch=1-step=10.ckpt")["state_dict"]["layer.weight"]
    trainer.validate(module, VALIDATION, ckpt_path="best")
    assert torch.equal(module.layer.weight, best)


def test_a_copied_folder_is_in_the_same_order(tmp_path: Path) -> None:
    """The dates of the copies do not matter."""
    trainer_of(tmp_path / "a", ModelCheckpoint(save_top_k=-1)).fit(Plain(), batches())
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    for age, path in enumerate(sorted((tmp_path / "a" / "checkpoints").iterdir(), reverse=True)):
        copy = shutil.copy(path, tmp_path / "b" / "checkpoints")
        os.utime(copy, (1e9 + age, 1e9 + age))
    trainer = trainer_of(tmp_path / "b", ModelCheckpoint(), max_epochs=4)
    begun: list[int] = []
    trainer.signals.train_start.connect(lambda t, event: begun.append(t.global_step))
    trainer.fit(Plain(), batches(), ckpt_path="last")
    assert begun == [15]


def test_the_best_of_another_folder_is_not_the_best_here(tmp_path: Path) -> None:
    scores = (0.1, 0.5, 0.4)
    trainer_of(tmp_path, ModelCheckpoint("first", monitor="val"), max_epochs=1).fit(Plain(scores), batches(), VALIDATION)
    callback = ModelCheckpoint("second", monitor="val")
    trainer_of(tmp_path, callback).fit(Plain(scores), batches(), VALIDATION, ckpt_path=tmp_path / "first" / "last.ckpt")
    assert Path(callback.best_model_path) == tmp_path / "second" / "epoch=2-step=15.ckpt"


@pytest.mark.parametrize("where", ["safe_point", "train_epoch_start", "train_batch_end"])
def test_a_run_ends_with_a_checkpoint_wherever_it_was_asked_to_stop(tmp_path: Path, where: str) -> None:
    step = 5 if where == "train_epoch_start" else 7
    trainer_of(tmp_path, ModelCheckpoint(every_n_steps=100), StopsAt(where, step)).fit(Plain(), batches())
    assert storage.read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == step


def test_state_that_changes_at_the_safe_point_is_in_its_checkpoint(tmp_path: Path) -> None:
    class Counts(Callback):
        count = 0

        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

    counts = Counts()
    trainer_of(tmp_path, ModelCheckpoint(every_n_steps=100), counts).fit(Plain(), batches())
    state = storage.read(tmp_path / "checkpoints" / "last.ckpt")["callbacks"]
    assert state[counts.state_key] == {"count": 15}


def test_a_checkpoint_is_ranked_by_a_value_of_the_weights_in_it(tmp_path: Path) -> None:
    """Validations come after steps 5, 10, 15; those of step 8 and 12 have none."""
    callback = ModelCheckpoint(monitor="val", every_n_steps=4, save_top_k=-1)
    trainer_of(tmp_path, callback).fit(Plain(), batches(), VALIDATION)
    assert list(callback.kept) == ["epoch=2-step=15.ckpt"]


def test_two_with_other_schedules_do_not_clash_and_folders_may_be_relative_to_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    two = ModelCheckpoint("~/steps", every_n_steps=2), ModelCheckpoint("epochs", every_n_epochs=1)
    (tmp_path / "epochs").mkdir()
    (tmp_path / "epochs" / "gone.ckpt").symlink_to(tmp_path / "nowhere")
    trainer_of(tmp_path, *two).fit(Plain(), batches(), ckpt_path="last")
    assert (tmp_path / "home" / "steps" / "last.ckpt").exists()


# ------------------------------------------------------------------ saving and loading


def test_saving_after_an_evaluation(tmp_path: Path) -> None:
    """The position in the data is the fit's."""

    class Quiet(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.net(batch).pow(2).mean())

    def build(**options: Any) -> Any:
        return lambda: (Quiet(), batches(), VALIDATION, [LRSchedulerStepping()], {"max_epochs": 2, **options})

    straight = run(build())
    trainer = run(build(max_epochs=1))
    trainer.validate(trainer.module, VALIDATION)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = run(build(), ckpt_path=tmp_path / "a.ckpt")
    assert_same_run(resumed, straight, "saved after a validation")


def test_a_module_takes_its_shape_from_a_checkpoint_and_a_datamodule_its_split(tmp_path: Path) -> None:
    class Sized(Plain):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(3, width)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.layer = nn.Linear(3, len(checkpoint["state_dict"]["layer.bias"]))

    class Split(LightningDataModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.seed = seed

        def train_dataloader(self) -> Any:
            order = torch.randperm(20, generator=torch.Generator().manual_seed(self.seed))
            return DataLoader(DATA[order[:12]], 4)  # type: ignore[arg-type]

        def state_dict(self) -> dict[str, Any]:
            return {"seed": self.seed}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seed = state["seed"]

    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(Sized(2), datamodule=Split(1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    straight, resumed = Sized(2), Sized(5)
    trainer_of(tmp_path, max_epochs=2).fit(straight, datamodule=Split(1))
    torch.manual_seed(0)
    trainer_of(tmp_path, max_epochs=2).fit(resumed, datamodule=(split := Split(9)), ckpt_path=tmp_path / "a.ckpt")
    assert split.seed == 1
    assert resumed.layer.bias.shape == (2,)
    before = trainer.module.state_dict()["layer.weight"]
    assert not torch.equal(resumed.layer.weight, before), "the new layer is trained"


@pytest.mark.parametrize("manual", [False, True])
def test_gradients_that_an_error_left_do_not_join_the_resumed_run(tmp_path: Path, manual: bool) -> None:
    class Steps(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if not manual:
                return loss
            self.manual_backward(loss)
            if self.fails and self.trainer.progress.total_batch_idx == 6:
                raise RuntimeError("a bug")
            self.optimizers().step()
            self.optimizers().zero_grad()
            return None

        fails = False

    callbacks: list[Any] = [] if manual else [GradientAccumulation(4, remainder="carry")]
    straight = Steps()
    trainer_of(tmp_path / "straight", *callbacks).fit(straight, [DATA[:4]] * 5)
    module = Steps()
    module.fails = manual
    more = [] if manual else [FailsAt(6)]
    with pytest.raises(RuntimeError, match="a bug"):
        trainer_of(tmp_path, *callbacks, *more, ModelCheckpoint(every_n_epochs=1)).fit(module, [DATA[:4]] * 5)
    module.fails = False
    trainer_of(tmp_path, *callbacks, ModelCheckpoint(every_n_epochs=1)).fit(module, [DATA[:4]] * 5, ckpt_path="last")
    assert torch.equal(module.layer.weight, straight.layer.weight)


def test_a_learning_rate_that_numpy_computed_is_saved_as_a_number(tmp_path: Path) -> None:
    class Numpy(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 if n < 2 else numpy.cos(n / 9))]

    trainer_of(tmp_path, LRSchedulerStepping(), ModelCheckpoint()).fit(Numpy(), batches())
    content = storage.read(tmp_path / "checkpoints" / "last.ckpt")
    assert type(content["lr_schedulers"][0]["_last_lr"][0]) is float


def test_a_lazy_module(tmp_path: Path) -> None:
    class Lazy(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(1)

    trainer_of(tmp_path, ModelCheckpoint()).fit(Lazy(), batches())
    assert storage.read(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]["layer.weight"].shape == (1, 3)


def test_a_stop_that_min_epochs_hold_off_is_not_forgotten(tmp_path: Path) -> None:
    def build() -> Any:
        options = {"max_epochs": 6, "min_epochs": 3}
        return Model(), batches(), None, [LRSchedulerStepping(), StopsAt("train_batch_end", 7)], options

    assert check_all_safe_points(build, tmp_path, every=3) == 15


def test_state_that_no_callback_takes_up_is_named(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, GradientAccumulation(2), max_epochs=1)
    trainer.fit(Plain(), batches())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"state of \['GradientAccumulation'\], which no attached callback takes up"):
        trainer_of(tmp_path).fit(Plain(), batches(), ckpt_path=tmp_path / "a.ckpt")


# ------------------------------------------------------------------ hooks and loaders


class Anneals(Model):
    def __init__(self) -> None:
        super().__init__()
        self.temperature: torch.Tensor
        self.register_buffer("temperature", torch.ones(()))

    def on_train_epoch_start(self) -> None:
        self.temperature *= 0.9
        self.log("starts", 1.0, reduce_fx="sum")


def test_an_epochs_hook_is_not_called_again_if_the_epoch_is_resumed(tmp_path: Path) -> None:
    check_all_safe_points(lambda: (Anneals(), batches(), None, [LRSchedulerStepping()], {"max_epochs": 2}), tmp_path)


class Augmented(Dataset[Any]):
    """Draws from the generator that it holds."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return DATA[index] + 0.1 * self.draw()


class OwnState(Augmented):
    def __init__(self, generator: Any, name: str) -> None:
        self.generator = generator
        super().__init__(lambda: float(getattr(generator, name)()))


class Transformed(Augmented):
    class Jitter:
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(4)

        def __call__(self) -> float:
            return float(torch.rand((), generator=self.generator))

    def __init__(self) -> None:
        self.transform = self.Jitter()
        super().__init__(self.transform)


class OwnIterator:
    """A loader that is its own iterator."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Any:
        self.order = torch.randperm(5).tolist()
        return self

    def __next__(self) -> torch.Tensor:
        if not self.order:
            raise StopIteration
        return DATA[4 * self.order[0] : 4 * self.order.pop(0) + 4]


LOADERS: dict[str, Callable[[], Any]] = {
    "RandomState": lambda: DataLoader(OwnState(numpy.random.RandomState(3), "rand"), 4),
    "Generator": lambda: DataLoader(OwnState(numpy.random.default_rng(3), "random"), 4),
    "Random": lambda: DataLoader(OwnState(random.Random(3), "random"), 4),
    "subset": lambda: DataLoader(Subset(OwnState(numpy.random.RandomState(3), "rand"), range(18)), 4),
    "transform": lambda: DataLoader(Transformed(), 4),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_generators_of_a_data_set(tmp_path: Path, loader: Callable[[], Any]) -> None:
    check_all_safe_points(lambda: (Model(), loader(), None, [LRSchedulerStepping()], {"max_epochs": 2}), tmp_path, every=2)


@pytest.mark.filterwarnings("ignore:.*keeps no position")
def test_a_loader_that_is_an_iterator_is_begun_once(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = [batch for _ in range(2) for batch in OwnIterator()]

    class Reads(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(batch)

        def configure_optimizers(self) -> None:
            return None

    module = Reads()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="configure_optimizers"):
        trainer_of(tmp_path, max_epochs=2).fit(module, OwnIterator())
    assert len(module.seen) == 10
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(module.seen, expected, strict=True))
    keep = KeepAll(tmp_path, Record())
    straight = run(lambda: (Model(), OwnIterator(), None, [LRSchedulerStepping()], {"max_epochs": 2}), keep)
    again = run(lambda: (Model(), OwnIterator(), None, [LRSchedulerStepping()], {"max_epochs": 2}), ckpt_path=keep.kept[1][0])
    assert_same_run(again, straight, "its own iterator")
