"""Run many small groups of two processes, each of which fails in its way, and save the errors of their processes.

The parent imports torch once and forks all processes, so that a group costs little. ``python failing.py FOLDER CASE ...``
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch imports it when it makes an optimizer
import torch.onnx
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from eventtrain import Callback, LightningDataModule, LightningModule, Trainer
from eventtrain.callbacks import DistributedDataParallel, FullyShardedDataParallel, ModelCheckpoint

AT_ONCE = 6
"""Groups that run at the same time: most of them only wait."""
TIMEOUT = 20.0
SHORT = 2.0


class Samples(Dataset[Any]):
    """Samples of which one raises.

    Args:
        fails_at: The index of that sample; None for none.
    """

    def __init__(self, fails_at: int | None = None, size: int = 16) -> None:
        self.fails_at, self.size = fails_at, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if index == self.fails_at:
            raise ValueError(f"sample {index} is damaged")
        return torch.full((3,), float(index))


class Net(LightningModule):
    """A module in which ``act`` is called at a place of the run.

    Args:
        place: The place.
        act: Called as ``act(trainer)`` in the third batch.
    """

    def __init__(self, place: str = "", act: Callable[[Trainer], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)
        self.place, self.act = place, act

    def reach(self, place: str, batch_idx: int = 2) -> None:
        if self.act is not None and place == self.place and batch_idx == 2:
            self.act(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.reach("training_step", batch_idx)
        loss = F.softplus(self.last(F.relu(self.first(batch)))).mean()
        if self.place == "backward" and batch_idx == 2:
            loss.register_hook(lambda gradient: self.reach("backward"))  # type: ignore[no-untyped-call]
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.reach("on_train_batch_start", batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.reach("on_train_batch_end", batch_idx)

    def on_train_end(self) -> None:
        self.reach("on_train_end")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.reach("validation_step", batch_idx)
        self.log("value", self.last(self.first(batch)).mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Data(LightningDataModule):
    """Data that take long to prepare."""

    def prepare_data(self) -> None:
        if os.environ["RANK"] == "0":
            time.sleep(2.5 * SHORT)

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(), 2)


class AtEachStep(ModelCheckpoint):
    """A callback that writes a checkpoint at the end of the third batch."""

    def is_due(self, trainer: Any, event: Any) -> bool:
        return bool(trainer.total_batch_idx == 2)


def fit(
    module: Net, *callbacks: Any, loader: Any = None, kind: Any = DistributedDataParallel, timeout: float = TIMEOUT
) -> Trainer:
    """Fit a module for an epoch of eight batches, with a validation at its end."""
    trainer = new_trainer(*callbacks, kind=kind, timeout=timeout)
    trainer.fit(module, loader or DataLoader(Samples(), 1), DataLoader(Samples(), 1))
    return trainer


def new_trainer(*callbacks: Any, kind: Any = DistributedDataParallel, timeout: float = TIMEOUT, epochs: int = 1) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        device="cpu",
        num_sanity_val_steps=0,
        default_callbacks=False,
        default_root_dir=ROOT,
        callbacks=[kind(timeout=timeout), *callbacks],
    )


def on(rank: int, action: Callable[[Trainer], Any]) -> Callable[[Trainer], Any]:
    """Return an action that only one rank does."""
    return lambda trainer: action(trainer) if trainer.global_rank == rank else None


def fail(trainer: Any = None) -> None:
    raise ValueError("the numbers are wrong\nand here is more about it")


def leave(trainer: Any) -> None:
    sys.exit(3)


def be_interrupted(trainer: Any) -> None:
    raise KeyboardInterrupt


def kill(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Raising(Callback):
    """A callback that raises in one rank."""

    def on_after_update(self, trainer: Any, event: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 1:
            fail()


def full_disk(*args: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


ROOT = ""


def rank() -> int:
    return int(os.environ["RANK"])


def slow_writes() -> None:
    """Have the first write of a checkpoint take longer than the timeout."""
    real = os.fsync

    def slow(handle: Any) -> None:
        os.fsync = real
        time.sleep(2.5 * SHORT)

    os.fsync = slow  # type: ignore[assignment]


def checkpoint_fails() -> None:
    if rank() == 0:
        os.replace = full_disk
    fit(Net(), AtEachStep())


def after_the_fit(error: bool) -> None:
    trainer = fit(Net())
    if rank() == 1:
        if error:
            fail()
        return
    trainer.test(dataloaders=DataLoader(Samples(), 2))


def caught() -> None:
    """Rank 1 catches its error and does something else, and never comes."""
    try:
        fit(Net("training_step", on(1, fail)))
    except ValueError:
        time.sleep(4)


def only_rank_zero(action: Callable[[Trainer], Any], place: str = "on_train_batch_end") -> Callable[[], Any]:
    return lambda: fit(Net(place, on(0, action)))


def save(trainer: Trainer) -> None:
    trainer.save_checkpoint(Path(ROOT) / "zero.ckpt")


def log(trainer: Trainer) -> None:
    trainer.module.log("value", torch.tensor(1.0), sync_dist=True)


def second_call(call: Callable[[Trainer], Any]) -> None:
    trainer = fit(Net())
    if rank() == 0:
        call(trainer)


def slow_saves() -> None:
    slow_writes()
    fit(Net("on_train_batch_end", save), timeout=SHORT)


def be_late(trainer: Trainer) -> None:
    if trainer.global_rank == 1:
        time.sleep(3 * SHORT)


def be_late_and_save(trainer: Trainer) -> None:
    be_late(trainer)
    save(trainer)


def slow_checkpoint() -> None:
    slow_writes()
    fit(Net(), AtEachStep(), timeout=SHORT)


def prepare_slowly() -> None:
    new_trainer(timeout=SHORT).fit(Net(), datamodule=Data())


CASES: dict[str, Callable[[], Any]] = {
    # a rank that raises
    "training_step": lambda: fit(Net("training_step", on(1, fail))),
    "callback": lambda: fit(Net(), Raising()),
    "loader": lambda: fit(Net(), loader=DataLoader(Samples(5), 1)),
    "worker": lambda: fit(Net(), loader=DataLoader(Samples(5), 1, num_workers=1)),
    "validation": lambda: fit(Net("validation_step", on(1, fail))),
    "backward": lambda: fit(Net("backward", on(1, fail))),
    "checkpoint": checkpoint_fails,
    "exit": lambda: fit(Net("on_train_batch_end", on(1, leave))),
    "interrupt": lambda: fit(Net("training_step", on(1, be_interrupted))),
    "kill": lambda: fit(Net("training_step", on(1, kill))),
    "kill_zero": lambda: fit(Net("validation_step", on(0, kill))),
    "fsdp": lambda: fit(Net("training_step", on(1, fail)), kind=FullyShardedDataParallel),
    "fsdp_kill": lambda: fit(Net("training_step", on(1, kill)), kind=FullyShardedDataParallel),
    "caught": caught,
    "after_the_fit": lambda: after_the_fit(True),
    # an exchange that not all take part in
    "save": only_rank_zero(save),
    "save_at_the_end": only_rank_zero(save, "on_train_end"),
    "save_after_the_fit": lambda: second_call(save),
    "barrier": only_rank_zero(lambda trainer: trainer.processes.barrier()),
    "barrier_at_the_end": only_rank_zero(lambda trainer: trainer.processes.barrier(), "on_train_end"),
    "log": only_rank_zero(log),
    "test": lambda: second_call(lambda trainer: trainer.test(dataloaders=DataLoader(Samples(), 2))),
    "validate": lambda: second_call(lambda trainer: trainer.validate(dataloaders=DataLoader(Samples(), 2))),
    "fit": lambda: second_call(lambda trainer: trainer.fit(Net(), DataLoader(Samples(), 2))),
    "ended": lambda: after_the_fit(False),
    # late, or slow
    "late": lambda: fit(Net("on_train_batch_start", be_late), timeout=SHORT),
    "late_in_an_exchange": lambda: fit(Net("on_train_end", be_late_and_save), timeout=SHORT),
    "slow_checkpoint": slow_checkpoint,
    "slow_save": slow_saves,
    "slow_prepare": prepare_slowly,
}


def child(folder: Path, case: str, rank: int) -> None:
    """Run a case as one of its processes, in a process that was forked for it."""
    global ROOT
    ROOT = str(folder / case)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), TORCHELASTIC_RESTART_COUNT=str(list(CASES).index(case)))
    with open(folder / f"{case}-{rank}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    start, text, code = time.monotonic(), "no error", 0
    try:
        CASES[case]()
    except BaseException as error:
        text = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        sys.last_value, code = error, 1
        traceback.print_exc()
        if case in EXIT_AS_PROGRAMS:
            raise
    finally:
        (folder / f"{case}-{rank}.txt").write_text(f"{time.monotonic() - start:.1f}\n{text}")
    if case not in EXIT_AS_PROGRAMS:  # others end without the work of taking the interpreter apart
        atexit._run_exitfuncs()
        os._exit(code)


EXIT_AS_PROGRAMS = ("training_step", "exit", "save", "ended")


def hold_store(writing: int) -> None:
    """Hold the store of all groups, as torchrun does for its processes, until the parent ends this process."""
    store = TCPStore("localhost", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    os.write(writing, str(store.port).encode())
    signal.pause()


def main() -> None:
    """Run the cases, some at a time."""
    folder, waiting = Path(sys.argv[1]), list(sys.argv[2:] or CASES)
    reading, writing = os.pipe()
    if (holder := os.fork()) == 0:
        return hold_store(writing)
    port = os.read(reading, 16).decode()
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    gc.freeze()  # what was imported is not copied for each process
    running: dict[int, str] = {}
    while waiting or running:
        while waiting and len(running) < 2 * AT_ONCE:
            case = waiting.pop(0)
            for rank in range(2):
                if (process := os.fork()) == 0:
                    return child(folder, case, rank)
                running[process] = f"{case}-{rank}"
        process, status = os.wait()
        (folder / f"{running.pop(process)}.status").write_text(str(os.waitstatus_to_exitcode(status)))
    os.kill(holder, signal.SIGKILL)
    return None


if __name__ == "__main__":
    main()
