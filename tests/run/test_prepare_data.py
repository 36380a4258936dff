"""One process of each machine prepares the data; the others wait, and end with its error."""

from __future__ import annotations

from typing import Any

import pytest

from eventtrain import LightningDataModule, MisconfigurationError
from tests.kit import FakeProcesses, Line, new_trainer, rows


class Prepared(Line):
    """A module that counts how often it prepares data."""

    prepared = 0

    def prepare_data(self) -> None:
        self.prepared += 1


class Data(LightningDataModule):
    """A datamodule that counts too, on each machine or only once."""

    prepared = 0

    def __init__(self, per_node: bool) -> None:
        super().__init__()
        self.prepare_data_per_node = per_node

    def prepare_data(self) -> None:
        self.prepared += 1

    def train_dataloader(self) -> Any:
        return rows(2)


def process(rank: int, local_rank: int, gather: Any = None) -> FakeProcesses:
    processes = FakeProcesses(4, rank, gather=gather)
    processes.local_rank = local_rank
    return processes


@pytest.mark.parametrize("per_node", [True, False])
@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_one_process_of_each_machine_prepares_the_data(rank: int, local_rank: int, per_node: bool) -> None:
    module, data, trainer = Prepared(), Data(per_node), new_trainer()
    trainer.processes = process(rank, local_rank)
    trainer.fit(module, datamodule=data)
    assert module.prepared == (local_rank == 0)
    assert data.prepared == (local_rank == 0 if per_node else rank == 0)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_it_is_prepared_for_each_run(stage: str) -> None:
    class Evaluated(Prepared):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    module, trainer = Evaluated(), new_trainer()
    trainer.processes = process(0, 0)
    getattr(trainer, stage)(module, rows(1))
    assert module.prepared == 1


def test_a_datamodule_of_any_class_may_say_once_for_all() -> None:
    class Plain:
        prepared = 0
        prepare_data_per_node = False

        def prepare_data(self) -> None:
            self.prepared += 1

        def train_dataloader(self) -> Any:
            return rows(1)

    data, trainer = Plain(), new_trainer()
    trainer.processes = process(2, 0)
    trainer.fit(Line(), datamodule=data)
    assert data.prepared == 0


class Fails(Line):
    def prepare_data(self) -> None:
        raise OSError("the disk is full\nmore")

    def setup(self, stage: str) -> None:
        raise AssertionError("no process goes on")


def test_its_error_ends_the_process_that_prepares() -> None:
    told: list[Any] = []

    def gather(value: Any) -> list[Any]:
        told.append(value)
        return [value] * 4

    trainer = new_trainer()
    trainer.processes = process(0, 0, gather)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.fit(Fails(), rows(1))
    assert told == ["OSError: the disk is full"]


def test_its_error_ends_the_others_too() -> None:
    trainer = new_trainer()
    trainer.processes = process(3, 1, lambda value: [None, None, "OSError: the disk is full", value])
    with pytest.raises(MisconfigurationError, match=r"Fails\.prepare_data has failed on rank 2: OSError: the disk is full"):
        trainer.fit(Fails(), rows(1))


def test_without_it_nothing_is_exchanged() -> None:
    exchanged: list[Any] = []

    def gather(value: Any) -> list[Any]:
        exchanged.append(value)
        return [value] * 4

    trainer = new_trainer()
    trainer.processes = process(1, 1, gather)
    trainer.predict(Line(), rows(1))
    assert None not in exchanged
