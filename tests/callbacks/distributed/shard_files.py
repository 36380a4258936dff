"""Write checkpoints together, in each of two processes: copies, damage, full disks, slow disks and errors.

``PYTHONPATH=. torchrun --nproc-per-node 2 tests/callbacks/distributed/shard_files.py FOLDER [NAME ...]``, without names for the
checks that take longer.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from eventtrain import Trainer
from eventtrain.callbacks import ModelCheckpoint
from eventtrain.callbacks.distributed import sharded_checkpoint, shared_writing
from eventtrain.callbacks.distributed.shared_writing import Writers
from eventtrain.checkpoint import storage
from tests.callbacks.distributed.parts import TIMEOUT, loader
from tests.callbacks.distributed.sharded import RANK, Model, new_trainer, outcome
from tests.callbacks.distributed.shards import place_of_shard, size_of_shard
from tests.kit import On

CHECKS: dict[str, Callable[[Path], Any]] = {}
QUICK = ("copied", "damaged", "background")
BATCHES = 5  # in each process and epoch


def check(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CHECKS[function.__name__] = function
    return function


def fit(root: Path, *callbacks: Any, ckpt_path: Any = None, max_epochs: int = 2) -> tuple[Any, list[str]]:
    """Train, and return the result and the warnings."""
    trainer = new_trainer(*callbacks, default_root_dir=root, max_epochs=max_epochs)
    module = Model()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer.fit(module, loader(4 * BATCHES), ckpt_path=ckpt_path)
    texts = [str(each.message) for each in warned]
    return outcome(module, trainer), [text for text in texts if "checkpoint" in text or "ModelCheckpoint" in text]


def at(batch: int, function: Callable[[Trainer], Any]) -> On:
    """Return a callback that calls a function before a batch."""
    return On(train_batch_start=lambda trainer, event: function(trainer) if trainer.total_batch_idx + 1 == batch else None)


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def on_rank(rank: int, function: Callable[..., Any], *arguments: Any) -> None:
    dist.barrier()
    if rank == RANK:
        function(*arguments)
    dist.barrier()


@check
def copied(folder: Path) -> Any:
    """Copy the last checkpoint alone, let the run continue, and resume the copy."""
    root, keep = folder / "copied", folder / "keep"
    on_rank(0, keep.mkdir)
    opened: list[str] = []
    watched = [False]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and watched[0] else None)

    def copy(trainer: Trainer) -> None:
        on_rank(0, shutil.copy, root / "checkpoints" / "last.ckpt", keep)

    def begin(trainer: Any, event: Any) -> None:
        watched[0] = True

    def end(trainer: Any, event: Any) -> None:
        watched[0] = False

    watching = On(save_checkpoint=begin, train_batch_start=end)
    straight, _ = fit(root, ModelCheckpoint(every_n_steps=1, save_top_k=4), watching, at(5, copy))
    watched[0] = False
    resumed, _ = fit(folder / "elsewhere", ckpt_path=keep / "last.ckpt")
    step = storage.read(keep / "last.ckpt")["global_step"]
    return {"straight": straight, "resumed": resumed, "step": step, "files": names(root), "opened": opened}


@check
def damaged(folder: Path) -> Any:
    """Flip one bit, cut the file, or take another checkpoint's shard: each time in the newest of three checkpoints."""
    root = folder / "damaged"
    checkpoints = root / "checkpoints"
    fit(root, ModelCheckpoint(every_n_steps=4, save_top_k=-1), max_epochs=2)
    last, newest = checkpoints / "last.ckpt", checkpoints / "epoch=1-step=10.ckpt"
    previous = checkpoints / "epoch=1-step=8.ckpt"
    good = newest.read_bytes()
    generator = torch.Generator().manual_seed(5)
    contents = []
    for rank in (0, 1) * 4:
        content = bytearray(good)
        offset = int(torch.randint(size_of_shard(newest, rank), (), generator=generator))
        content[place_of_shard(newest, rank) + offset] ^= 1 << int(torch.randint(8, (), generator=generator))
        contents.append(bytes(content))
    contents.append(good[: place_of_shard(newest, 1) + 5])
    start, size = place_of_shard(newest, 1), size_of_shard(newest, 1)
    other = previous.read_bytes()[place_of_shard(previous, 1) :][:size]
    contents.append(good[:start] + other + good[start + size :])
    results = []
    for changed in contents:
        on_rank(0, last.write_bytes, changed)  # a second name of the newest, in most cases
        if newest.exists():
            on_rank(0, newest.unlink)
        trainer = new_trainer(ModelCheckpoint(every_n_steps=4), default_root_dir=root)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            trainer.validate(Model(), loader(4, shuffle=False), ckpt_path="last")
        results.append([str(each.message) for each in warned if "passed over" in str(each.message)])
    return results


@contextmanager
def writing(function: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Replace the writing of this process's tensors."""
    write = sharded_checkpoint.ShardedPart._write

    def replaced(self: Any, *arguments: Any) -> Any:
        return function(lambda: write(self, *arguments))

    with mock.patch.object(sharded_checkpoint.ShardedPart, "_write", replaced):
        yield


@check
def background(folder: Path) -> Any:
    """Hold up the writing of the second process until two more batches are trained."""
    root, go_on, seen = folder / "background", threading.Event(), []

    def held_up(write: Callable[[], Any]) -> Any:
        if RANK == 1:
            assert go_on.wait(60)
        return write()

    def look(trainer: Any, event: Any) -> None:
        number = trainer.total_batch_idx + 1
        dist.barrier()
        seen.append((number, (root / "checkpoints" / "last.ckpt").exists()))
        dist.barrier()
        if number == 4:
            go_on.set()
            deadline = time.monotonic() + 60
            while not (root / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
                time.sleep(0.01)

    checkpoint = ModelCheckpoint(every_n_steps=1000, every_n_epochs=1000, in_background=True)
    with (
        writing(held_up),
        mock.patch.object(ModelCheckpoint, "is_due", lambda self, trainer, event: trainer.global_step in (2, 8)),
    ):
        ours, _ = fit(root, checkpoint, On(train_batch_end=look))
    undisturbed, _ = fit(folder / "undisturbed")
    resumed, _ = fit(root, ModelCheckpoint(every_n_steps=1000), ckpt_path="last")
    return {"ours": ours, "undisturbed": undisturbed, "resumed": resumed, "seen": seen, "files": names(root)}


@check
def full_disk(folder: Path) -> Any:
    """Fail to write on one process, at one of five checkpoints: while the run waits, and in the background."""
    results = {}
    undisturbed, _ = fit(folder / "not full")
    for failing in (0, 1):
        for in_background in (False, True):
            root, count = folder / f"full-{failing}-{in_background}", [0]

            def full(write: Callable[[], Any], count: list[int] = count, failing: int = failing) -> Any:
                count[0] += 1
                if failing == RANK and count[0] == 3:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write()

            checkpoint = ModelCheckpoint(every_n_steps=2, save_top_k=2, on_error="warn", in_background=in_background)
            listing: list[Any] = []

            def look(trainer: Trainer, listing: Any = listing, root: Path = root, checkpoint: Any = checkpoint) -> None:
                step = storage.read(root / "checkpoints" / "last.ckpt")["global_step"]
                files = [name for name in names(root) if "/." not in name]  # a thread may not have removed its file yet
                listing.append((files, dict(checkpoint.kept), step))

            with writing(full):
                ours, warned = fit(root, checkpoint, at(8, look))
            results[failing, in_background] = {
                "same": ours,
                "undisturbed": undisturbed,
                "warned": warned,
                "at 8": listing,
                "files": names(root),
            }

    def full_at_once(write: Callable[[], Any]) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def as_ever(write: Callable[[], Any]) -> Any:
        return write()

    messages = []
    saving = at(3, lambda trainer: trainer.save_checkpoint(folder / "saves" / "mine.ckpt"))
    with writing(full_at_once if RANK == 1 else as_ever):
        for name, callback in {"raises": ModelCheckpoint(every_n_steps=2), "saves": saving}.items():
            try:
                fit(folder / name, callback)
            except OSError as error:
                messages.append((error.errno, str(error)))
    return results, messages, names(folder / "raises"), (folder / "saves" / "mine.ckpt").exists()


@check
def refused_content(folder: Path) -> Any:
    """Save a value that no file can hold: the first process finds it, and the others do not wait."""
    messages = []

    def add(trainer: Any, event: Any) -> None:
        event.checkpoint["mine"] = object()

    try:
        saving = at(3, lambda trainer: trainer.save_checkpoint(folder / "x.ckpt"))
        fit(folder / "content", On(save_checkpoint=add), saving)
    except Exception as error:
        messages.append(("save", type(error).__name__, str(error).partition("\n")[0]))
    trainer = new_trainer(default_root_dir=folder / "content", max_epochs=1)
    trainer.fit(Model(), loader(4))
    try:
        torch.save(trainer.collect_checkpoint(), folder / "by hand.pt")
    except Exception as error:
        messages.append(("by hand", type(error).__name__, str(error).partition("\n")[0]))
    return messages


@check
def slow(folder: Path) -> Any:
    """Write for longer than an exchange may take."""

    def sleep() -> int:
        time.sleep(4 * RANK)
        return RANK

    writers = Writers(RANK, 2, timedelta(seconds=2))
    start = time.monotonic()
    results = writers.work("a test", sleep)
    return results, time.monotonic() - start


class Failing(Model):
    """Raises in a batch, in some of the processes."""

    ranks: tuple[int, ...] = (0, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 7 and RANK in self.ranks:
            raise ArithmeticError("in the eighth batch")
        return super().training_step(batch, batch_idx)


def fail(root: Path, ranks: tuple[int, ...]) -> Any:
    checkpoint = ModelCheckpoint(every_n_steps=5, save_on_exception=True)
    trainer = new_trainer(checkpoint, default_root_dir=root)
    module = Failing()
    module.ranks = ranks
    try:
        trainer.fit(module, loader(4 * BATCHES))
    except Exception as error:
        return type(error).__name__, " ".join(getattr(error, "__notes__", ()))
    return None


@check
def error_in_all(folder: Path) -> Any:
    """Raise in all processes, and resume from the last safe point before."""
    undisturbed, _ = fit(folder / "no error")
    raised = fail(folder / "error", (0, 1))
    step = storage.read(folder / "error" / "checkpoints" / "last.ckpt")["global_step"]
    resumed, _ = fit(folder / "error", ModelCheckpoint(every_n_steps=5, save_on_exception=True), ckpt_path="last")
    return {"raised": raised, "step": step, "undisturbed": undisturbed, "resumed": resumed}


def error_in_one(folder: Path) -> Any:
    """Raise in one process. This is the last thing that the processes do together."""
    with mock.patch.object(shared_writing, "PATIENCE", timedelta(seconds=1)):
        return fail(folder / "one error", (1,)), names(folder / "one error")


def main() -> None:
    folder, chosen = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    results = {name: CHECKS[name](folder) for name in chosen or [name for name in CHECKS if name not in QUICK]}
    torch.save(results, folder / f"{RANK}.pt")
    if not chosen:
        torch.save(error_in_one(folder), folder / f"error-{RANK}.pt")
        os._exit(0)  # the connections are broken; another process may wait for them


if __name__ == "__main__":
    main()
