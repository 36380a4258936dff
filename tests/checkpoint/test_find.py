"""``ckpt_path`` leads to one checkpoint in all processes, or to an error that says why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from eventtrain.callbacks import ModelCheckpoint
from eventtrain.errors import MisconfigurationError
from tests.kit import FakeProcesses, Line, batches, new_trainer


@pytest.mark.parametrize("which", ["best", "last"])
def test_an_evaluation_needs_a_checkpoint_that_exists(tmp_path: Path, which: str) -> None:
    trainer = new_trainer(ModelCheckpoint(monitor="val_loss"), default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationError, match=f"ckpt_path='{which}': there is no checkpoint yet"):
        trainer.validate(Line(), batches(1), ckpt_path=which)


def test_the_error_of_the_first_process_ends_the_others_too(tmp_path: Path) -> None:
    trainer = new_trainer(default_root_dir=tmp_path)
    trainer.processes = FakeProcesses(global_rank=1, broadcast=lambda value: ("gone.ckpt", "There is no file gone.ckpt."))
    with pytest.raises(MisconfigurationError, match=r"The first process found no checkpoint. There is no file gone.ckpt."):
        trainer.fit(Line(), batches(1), ckpt_path="gone.ckpt")
