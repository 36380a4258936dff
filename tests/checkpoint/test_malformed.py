"""A checkpoint with a part that is missing or of another type: an error names file and key, or the part is not needed."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from eventtrain import MisconfigurationError, Trainer, callbacks
from eventtrain.checkpoint import storage
from tests.kit import On, new_trainer
from tests.together import Model

GONE = object()
VALUES: dict[str, Any] = {
    "None": None,
    "a text": "abc",
    "a list": ["abc"],
    "a dict": {"abc": 1},
    "a number": 3,
    "less": -1.5,
    "nothing": GONE,
}
FAST = ("None", "a text", "nothing")
DATA = [torch.full((2, 2), float(x)) for x in range(6)]


def attached() -> list[Any]:
    return [
        callbacks.EarlyStopping("val_loss"),
        callbacks.ExponentialMovingAverage(0.5),
        callbacks.GradientAccumulation(2),
        callbacks.JSONLinesLogger(log_every_n_steps=1),
        callbacks.LRSchedulerStepping(),
        callbacks.MixedPrecision("fp16", scaler=torch.amp.GradScaler("cpu", init_scale=2.0)),
        callbacks.ModelCheckpoint("kept", monitor="val_loss"),
        callbacks.TensorBoardLogger(log_every_n_steps=1),
        callbacks.Timer(3600),
        callbacks.DistributedDataParallel(),
    ]


def data() -> Any:
    return DataLoader(DATA, batch_size=None, shuffle=True)  # type: ignore[arg-type]


def written(folder: Path) -> dict[str, Any]:
    """Return a checkpoint of the middle of an epoch, in an open window."""

    def save(trainer: Trainer, event: Any) -> None:
        if trainer.total_batch_idx == 8:
            trainer.save_checkpoint(folder / "a.ckpt")
            trainer.stop("enough")

    trainer = new_trainer(
        *attached(), On(take_checkpoint=save), max_epochs=3, default_root_dir=folder, val_check_interval=3, seed=1
    )
    trainer.fit(Model(), data(), DATA[:1])
    return storage.read(folder / "a.ckpt")


def places(value: Any, depth: int, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the places in nested dicts and lists, down to a depth."""
    if depth and isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], depth - 1, (*path, key))


def changed(content: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    content = copy.deepcopy(content)
    holder: Any = content
    for key in place[:-1]:
        holder = holder[key]
    if value is GONE:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return content


def outcome(content: dict[str, Any], folder: Path) -> str:
    """Resume a checkpoint, and return what becomes of it: an error that names the file, or a run that ends."""
    path = folder / "changed.ckpt"
    storage.write(content, path)
    trainer = new_trainer(*attached(), max_epochs=3, max_steps=6, default_root_dir=folder, val_check_interval=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(Model(), data(), DATA[:1], ckpt_path=path)
        except MisconfigurationError as error:
            return "named" if str(path) in str(error) else f"no file in: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "resumed"


@pytest.mark.parametrize(
    ("depth", "kinds"),
    [
        (1, ["a text"]),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, list(VALUES)), (2, list(VALUES)), (4, FAST))),
    ],
)
def test_a_part_that_does_not_fit_is_named_with_its_file(tmp_path: Path, depth: int, kinds: list[str]) -> None:
    content, outcomes, wrong = written(tmp_path), Counter[str](), []
    for place in places({key: value for key, value in content.items() if key != "state_dict"}, depth):
        for kind in kinds:
            if place[0] == "versions" or place[:2] in (("hyper_parameters", "depth"), ("window", "weight")):
                continue
            if place[0] in ("optimizer_states", "lr_schedulers") and len(place) > 2:
                continue  # their own, which torch does not check when it loads it
            result = outcome(changed(content, place, VALUES[kind]), tmp_path)
            outcomes[result] += 1
            if result not in ("named", "resumed"):
                wrong.append((place, kind, result))
    assert wrong == []
    assert outcomes["named"] > outcomes["resumed"]
