"""Loaders whose length changes between epochs, loaders without a length, and loaders without batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

from eventtrain import LightningDataModule, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping, ProgressBar
from eventtrain.data.batches import LoaderPass
from eventtrain.distributed import SingleProcess
from tests.kit import Line, ModuleOf, NoLength, On, Probe, batches, new_trainer, rows, train
from tests.resuming import Model, check_all_safe_points

STATEFUL = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


class Numbers(Dataset[Tensor]):
    """The numbers from 1."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index + 1))


class Rebuilt:
    """A loader that is rebuilt in each ``__iter__``, with the next of some lengths."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = iter(lengths)
        self.loader: Any = batches(lengths[-1])

    def rebuild(self) -> None:
        self.loader = batches(next(self.lengths))

    def __iter__(self) -> Iterator[Tensor]:
        self.rebuild()
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class RebuiltByGenerator(Rebuilt):
    """The same by a generator, whose code runs when its first batch is read."""

    def __iter__(self) -> Iterator[Tensor]:
        self.rebuild()
        yield from self.loader


class Changing:
    """A loader whose length is the next of some lengths after each pass."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = [*lengths, lengths[-1]]

    def __len__(self) -> int:
        return self.lengths[0]

    def __iter__(self) -> Iterator[Tensor]:
        yield from batches(len(self))
        del self.lengths[0]


def resizing(loader: Any, lengths: tuple[int, ...]) -> On:
    """Resize the data set of a loader when an epoch starts."""

    def resize(trainer: Any, event: Any) -> None:
        loader.dataset.length = lengths[event.epoch]

    return On(train_epoch_start=resize)


LENGTHS = [(2, 3, 4), (4, 2, 1), (1, 5, 2)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", [Rebuilt, RebuiltByGenerator, Changing])
def test_each_epoch_has_the_length_that_its_loader_has_then(kind: Any, lengths: tuple[int, ...]) -> None:
    module = Probe()
    last = []
    watch = On(train_batch_end=lambda trainer, event: last.append((trainer.is_last_batch, trainer.num_training_batches)))
    trainer = train(module, kind(lengths), watch, max_epochs=3)
    assert module.seen == [float(x) for length in lengths for x in range(1, length + 1)]
    assert last == [(x == length, length) for length in lengths for x in range(1, length + 1)]
    assert trainer.current_epoch == 3


@STATEFUL
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_may_grow_and_shrink(loader: Any, lengths: tuple[int, ...], workers: int) -> None:
    if workers and (loader is StatefulDataLoader or lengths != LENGTHS[0]):
        pytest.skip("one of them is enough: workers take time to start")
    module = Probe()
    data = loader(Numbers(lengths[0]), batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    train(module, data, resizing(data, lengths), max_epochs=3)
    assert module.seen == [float(x) for length in lengths for x in range(1, length + 1)]


def test_an_iterable_data_set_with_a_length_that_changes() -> None:
    class Stream(IterableDataset[Tensor]):
        length = 1

        def __len__(self) -> int:
            return self.length

        def __iter__(self) -> Iterator[Tensor]:
            yield from batches(self.length)
            self.length += 1

    module = Probe()
    train(module, DataLoader(Stream(), batch_size=None), max_epochs=3)
    assert module.seen == [1, 1, 2, 1, 2, 3]


@pytest.mark.parametrize(("limit", "seen"), [(0.5, [1, 1, 2, 1, 2, 3]), (3, [1, 2, 1, 2, 3, 1, 2, 3])])
def test_limits_hold_for_each_epoch(limit: Any, seen: list[float]) -> None:
    module = Probe()
    train(module, Rebuilt((2, 4, 6)), max_epochs=3, limit_train_batches=limit)
    assert module.seen == seen


def test_a_short_window_closes_at_the_end_of_each_epoch() -> None:
    module = Probe()
    train(module, RebuiltByGenerator((3, 2, 5)), GradientAccumulation(2), max_epochs=3)
    assert module.updates == [1.5, 3, 1.5, 1.5, 3.5, 5]


def test_a_fraction_between_validations_is_one_of_each_epoch() -> None:
    at: list[int] = []
    watch = On(validation_start=lambda trainer, event: at.append(trainer.total_batch_idx))
    module = ModuleOf(validation_step=lambda batch, batch_idx: None)
    train(module, Rebuilt((2, 4, 6)), watch, val=1, max_epochs=3, val_check_interval=0.5)
    assert at == [0, 1, 3, 5, 8, 11]


def test_an_epoch_that_is_shorter_than_the_interval_is_not_validated() -> None:
    at: list[int] = []
    watch = On(validation_start=lambda trainer, event: at.append(trainer.total_batch_idx))
    train(ModuleOf(validation_step=lambda b, i: None), Changing((3, 1, 2)), watch, val=1, max_epochs=3, val_check_interval=2)
    assert at == [1, 5]


@pytest.mark.parametrize("kind", [Rebuilt, RebuiltByGenerator, Changing])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_validation_loaders_may_change_too(kind: Any, lengths: tuple[int, ...]) -> None:
    seen: list[int] = []
    module = ModuleOf(validation_step=lambda batch, batch_idx: seen.append(batch_idx))
    train(module, 1, val=kind(lengths), max_epochs=3)
    assert seen == [x for length in lengths for x in range(length)]


def test_the_estimate_is_the_first_epochs_and_a_warning_says_so() -> None:
    module = Line()
    estimates: list[int] = []

    def configure(optimizer: Any) -> Any:
        estimates.append(module.trainer.estimated_stepping_batches)
        return optimizer

    module.configure = configure
    data: Any = DataLoader(torch.zeros(2, 1), batch_size=1)  # type: ignore[arg-type]
    sizes = iter([2, 3, 4])

    def grow(trainer: Any, event: Any) -> None:
        data.__dict__["dataset"] = torch.zeros(next(sizes), 1)
        object.__setattr__(data.sampler, "data_source", data.dataset)

    with pytest.warns(UserWarning, match="Epoch 1 has 3 training batches, and .*estimated_stepping_batches was .* from 2"):
        trainer = train(module, data, On(train_epoch_start=grow), max_epochs=3)
    assert estimates == [6]
    assert trainer.estimated_stepping_batches == 6
    assert trainer.global_step == 9


def test_there_is_no_warning_if_nothing_asked_for_the_estimate() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Probe(), Rebuilt((1, 2, 3)), max_epochs=3)
        train(Line(configure=lambda sgd: sgd), rows(3), max_epochs=2)


def test_a_loader_with_another_length_than_it_says_is_still_refused() -> None:
    class Wrong(Changing):
        def __iter__(self) -> Iterator[Tensor]:
            yield from batches(3)

    for says, message in ((2, "2 batches and has more"), (4, "4 batches and ended after 3")):
        with pytest.raises(MisconfigurationError, match=message):
            train(Probe(), Wrong((says,)))


def test_the_bar_shows_the_length_of_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    train(Probe(), Rebuilt((2, 5)), ProgressBar(interval=0.0, line_interval=0.0), max_epochs=2)
    lines = capsys.readouterr().err
    assert "2/2 batches" in lines and "5/5 batches" in lines


class Growing(LightningDataModule):
    """A data set that grows by a batch in each epoch, and is kept in checkpoints."""

    def __init__(self, loader: Callable[[Any], Any]) -> None:
        super().__init__()
        self.data = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        self.size, self.loader = 8, loader

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def train_dataloader(self) -> Any:
        return self.loader(self)

    def on_train_epoch_end(self) -> None:
        self.size += 4

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = state["size"]


class Estimating(Model):
    """Steps a schedule that was built from the estimate, and that no checkpoint holds."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * total))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@STATEFUL
@pytest.mark.filterwarnings("ignore:Epoch .* has .* training batches:UserWarning")
@pytest.mark.parametrize(
    "loader",
    [
        lambda data: DataLoader(data, batch_size=4, shuffle=True),
        lambda data: StatefulDataLoader(data, batch_size=4, shuffle=True),
    ],
)
def test_a_run_resumes_in_a_later_longer_epoch(tmp_path: Path, loader: Any) -> None:
    def build() -> Any:
        options = {"max_epochs": 3, "datamodule": Growing(loader)}
        return Estimating(), None, None, [LRSchedulerStepping(), GradientAccumulation(2)], options

    assert check_all_safe_points(build, tmp_path) == 9


class Together(SingleProcess):
    """Two processes, of which the other has its own number of batches in each epoch."""

    world_size = 2

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = iter((lengths[0], *lengths))  # the first is asked for before the run too

    def gather_for_all(self, value: Any) -> list[Any]:
        return [value, next(self.lengths)] if isinstance(value, int) else [value]


def test_processes_agree_on_the_length_of_each_epoch() -> None:
    class Join:
        def on_join_processes(self, trainer: Any, event: Any) -> None:
            event.processes = Together((3, 1, 4))

    module = Probe()
    train(module, Rebuilt((2, 3, 5)), Join(), max_epochs=3)
    assert module.seen == [1, 2, 1, 1, 2, 3, 4]


# ---------------------------------------------------------------- read_ahead


class Agent(nn.Module):
    """A network of one weight that acts by it and learns from what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def loss(self, batch: Tensor) -> Tensor:
        return (self.w * batch).pow(2).mean()


class Replay(IterableDataset[Tensor]):
    """A replay buffer: each sample acts by the current weight, adds to the buffer, and draws from it."""

    def __init__(self, agent: Agent, samples: int) -> None:
        self.agent, self.samples = agent, samples
        self.buffer: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.samples):
            self.buffer.append(self.agent.w.detach() + torch.rand(()))
            yield self.buffer[int(torch.randint(len(self.buffer), ()))]


class Learner(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.agent = Agent()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.agent.loss(batch) * torch.rand(())  # draws as the buffer does

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def learn_by_hand(epochs: int, samples: int) -> Agent:
    torch.manual_seed(3)
    agent = Agent()
    optimizer = SGD(agent.parameters(), lr=0.1)
    loader = DataLoader(Replay(agent, samples), batch_size=4)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            (agent.loss(batch) * torch.rand(())).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return agent


def learn(samples: int, **arguments: Any) -> tuple[Learner, Trainer]:
    torch.manual_seed(3)
    learner = Learner()
    return learner, train(learner, DataLoader(Replay(learner.agent, samples), batch_size=4), max_epochs=3, **arguments)


@pytest.mark.parametrize("samples", [20, 18])
def test_without_reading_ahead_a_replay_buffer_is_as_new_as_in_the_plain_loop(samples: int) -> None:
    learner, trainer = learn(samples, read_ahead=False)
    assert torch.equal(learner.agent.w, learn_by_hand(3, samples).w)
    assert (trainer.global_step, trainer.current_epoch) == (15, 3)


def test_reading_ahead_makes_a_replay_buffer_one_step_old() -> None:
    learner, _ = learn(20)
    assert not torch.equal(learner.agent.w, learn_by_hand(3, 20).w)


def test_a_limit_tells_the_last_batch_without_reading_ahead() -> None:
    last: list[bool] = []
    watch = On(train_batch_end=lambda trainer, event: last.append(trainer.is_last_batch))
    module = Probe()
    arguments: dict[str, Any] = {"limit_train_batches": 3, "read_ahead": False}
    train(module, NoLength(batches(9)), watch, GradientAccumulation(2), **arguments)
    assert module.updates == [1.5, 3] and last == [False, False, True]


@pytest.mark.parametrize(("remainder", "updates"), [("carry", [1.5, 2, 2.5]), ("drop", [1.5, 1.5])])
def test_windows_without_reading_ahead(remainder: Any, updates: list[float]) -> None:
    module = Probe()
    train(module, NoLength(batches(3)), GradientAccumulation(2, remainder=remainder), max_epochs=2, read_ahead=False)
    assert module.updates == updates


def test_a_short_window_that_was_not_known_to_be_one_is_an_error() -> None:
    with pytest.raises(MisconfigurationError, match=r"ended after 1 of 2 batches of a window.*remainder='carry'"):
        train(Probe(), NoLength(batches(3)), GradientAccumulation(2), read_ahead=False)
    module = Probe()
    train(module, NoLength(batches(4)), GradientAccumulation(2), read_ahead=False)
    assert module.updates == [1.5, 3.5]


def test_epoch_schedules_and_validation_come_once_an_epoch_without_reading_ahead() -> None:
    order: list[Any] = []
    module = Probe(configure=lambda sgd: ([sgd], [torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5)]))
    module.validation_step = print  # type: ignore[method-assign]
    names = ("train_batch_end", "train_data_end", "validation_start", "train_epoch_end")
    note: Any = {name: lambda trainer, event, name=name: order.append(name) for name in names}
    arguments: dict[str, Any] = {"max_epochs": 2, "read_ahead": False}
    train(module, NoLength(batches(2)), LRSchedulerStepping(), On(**note), val=1, **arguments)
    assert order == 2 * ["train_batch_end", "train_batch_end", "train_data_end", "validation_start", "train_epoch_end"]
    assert module.rates == [1, 1, 0.5, 0.5]


@pytest.mark.parametrize("read_ahead", [True, False])
def test_a_run_over_a_stateful_stream_resumes_with_and_without_reading_ahead(tmp_path: Path, read_ahead: bool) -> None:
    class Positions:
        """A loader without a length that keeps its position."""

        at = 0

        def __iter__(self) -> Iterator[Tensor]:
            while self.at < 3:
                self.at += 1
                yield torch.rand(4, 3)
            self.at = 0

        def state_dict(self) -> dict[str, Any]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.at = state["at"]

    def build() -> Any:
        options = {"max_epochs": 2, "read_ahead": read_ahead}
        return Model(), Positions(), [torch.ones(4, 3)], [LRSchedulerStepping()], options

    assert check_all_safe_points(build, tmp_path) == (6 if read_ahead else 8)


def test_a_checkpoint_with_the_states_before_one_batch_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions kept the states before the batch that was read ahead, and not a list of them."""
    position = LoaderPass.position

    def earlier(self: LoaderPass) -> dict[str, Any]:
        now = position(self)
        return now | {"before_ahead": now["before_ahead"][0] if now["before_ahead"] else None}

    monkeypatch.setattr(LoaderPass, "position", earlier)
    test_a_run_over_a_stateful_stream_resumes_with_and_without_reading_ahead(tmp_path, True)


def test_evaluations_are_never_read_ahead() -> None:
    read: list[float] = []

    def stream() -> Iterator[Tensor]:
        for x in batches(3):
            read.append(x.item())
            yield x

    order: list[Any] = []
    module = ModuleOf(predict_step=lambda batch, batch_idx: order.append((batch.item(), list(read))))
    new_trainer().predict(module, stream())
    assert order == [(1, [1]), (2, [1, 2]), (3, [1, 2, 3])]


# ---------------------------------------------------------------- no batches


def dropped() -> Any:
    return DataLoader(Numbers(3), batch_size=4, drop_last=True)


@pytest.mark.parametrize(
    ("loader", "advice"),
    [
        (dropped, "data set has 3 samples, fewer than batch_size=4, and drop_last=True"),
        (list, "its length is 0"),
        (tuple, "its length is 0"),
        (lambda: torch.zeros(0, 2, 1), "its length is 0"),
        (lambda: DataLoader(Numbers(0)), "its length is 0"),
        (lambda: {"a": dropped(), "b": dropped()}, "fewer than batch_size=4"),
        (lambda: iter(()), "used up"),
        (lambda: NoLength([]), "used up"),
    ],
)
@pytest.mark.parametrize("arguments", [{}, {"limit_train_batches": 2}, {"read_ahead": False}])
def test_an_epoch_without_batches_is_warned_about(loader: Any, advice: str, arguments: Any) -> None:
    with pytest.warns(UserWarning, match=f"gave no batch in epoch 0: nothing was trained.*{advice}"):
        trainer = train(ModuleOf(), loader(), **arguments)
    assert (trainer.global_step, trainer.current_epoch) == (0, 1)


def test_a_fraction_of_no_batches_is_warned_about_too() -> None:
    with pytest.warns(UserWarning, match="drop_last=True"):
        train(ModuleOf(), dropped(), limit_train_batches=0.5)


def test_no_batches_at_all_end_a_run_that_only_updates_would_end() -> None:
    with pytest.raises(MisconfigurationError, match=r"gave no batch in epoch 0.*drop_last=False"):
        train(ModuleOf(), dropped(), max_steps=3)


def test_a_limit_of_no_batches_is_no_mistake() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(ModuleOf(), 3, limit_train_batches=0).global_step == 0


def test_a_data_set_may_start_empty() -> None:
    module = Probe()
    with pytest.warns(UserWarning, match="epoch 0"):
        train(module, Changing((0, 2)), max_epochs=2)
    assert module.seen == [1, 2]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_without_batches_is_warned_about(stage: str) -> None:
    used = iter(batches(2))
    assert len(list(used)) == 2
    name = "validation" if stage == "validate" else stage
    for loader, advice in ((dropped(), "drop_last=False"), (used, "an iterator that is used up")):
        with pytest.warns(UserWarning, match=f"The {name} loader .* gave no batch.*{advice}"):
            getattr(new_trainer(), stage)(Line(), loader)


def test_a_second_validation_of_an_iterator_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="The validation loader .* gave no batch"):
        train(Line(), rows(1), val=iter(rows(2)), max_epochs=2)


def test_an_evaluation_that_is_to_have_no_batches_is_no_mistake() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(Line(), rows(1), val=[]).global_step == 1
        assert train(Line(), rows(1), val={}).global_step == 1
        assert new_trainer(limit_test_batches=0).test(Line(), dropped()) == [{}]
