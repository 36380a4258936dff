"""Activations that are computed again in the backward: the same bits, and less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import (
    ActivationCheckpointing,
    ExponentialMovingAverage,
    GradientAccumulation,
    GradientClipping,
    MixedPrecision,
)
from tests.kit import On, new_trainer
from tests.resuming import equal


class Block(nn.Module):
    """A block with dropout, and with buffers that change in each forward and act on it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.BatchNorm1d(6), nn.Linear(6, 24), nn.Linear(24, 6)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.forwards = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.forwards += 1
        self.calls += 1
        return x + F.dropout(self.out(torch.tanh(self.into(self.norm(x)) / self.calls)), 0.3, self.training) * scale


class Model(LightningModule):
    """A module with blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Linear(3, 6)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.saved = 0

    def out(self, x: Tensor) -> Tensor:
        x = self.head(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x.mean(-1, keepdim=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = F.mse_loss(self.out(batch[0]), batch[1])
        self.saved = sum(sizes.values())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.mse_loss(self.out(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader(samples: int = 24) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    xs, ys = torch.randn(samples, 3, generator=generator), torch.randn(samples, 1, generator=generator)
    return DataLoader(TensorDataset(xs, ys), 4, shuffle=True)


def state(module: nn.Module, trainer: Trainer) -> list[Any]:
    return [dict(module.state_dict()), [each.state_dict() for each in trainer.optimizers], torch.get_rng_state()]


def fitted(*callbacks: Any, path: Any = None, **options: Any) -> tuple[Model, Trainer]:
    module = Model()
    trainer = new_trainer(GradientAccumulation(4), GradientClipping(0.5), *callbacks, max_epochs=2, seed=1, **options)
    trainer.fit(module, loader(), loader(), ckpt_path=path)
    return module, trainer


@pytest.mark.parametrize("callbacks", [(), (ExponentialMovingAverage(0.9),), (MixedPrecision("bf16"),)])
def test_the_bits_are_those_of_a_run_without_it(callbacks: Any) -> None:
    expected, trainer = fitted(*callbacks)
    module, with_it = fitted(*callbacks, ActivationCheckpointing([Block]))
    assert equal(state(module, with_it), state(expected, trainer))
    assert equal(dict(with_it.callback_metrics), dict(trainer.callback_metrics))


def test_only_the_inputs_of_the_units_are_held_and_each_forward_runs_twice() -> None:
    module, _ = fitted()
    with_it, _ = fitted(ActivationCheckpointing([Block]))
    assert with_it.saved < 0.3 * module.saved
    (first, *_), (recomputed, *_) = module.blocks, with_it.blocks
    assert isinstance(first, Block) and isinstance(recomputed, Block)
    batches, validated = 2 * 6, 2 * 6
    assert first.forwards == batches + validated
    assert recomputed.forwards == 2 * batches + validated
    assert recomputed.calls == first.calls == batches + validated


def test_names_stay_and_the_module_is_given_back() -> None:
    module, plain = Model(), Model()
    names: list[str] = []
    look = On(train_batch_end=lambda trainer, event: names.extend(name for name, _ in trainer.module.named_parameters()))
    own = module.blocks[1].forward = module.blocks[1].forward  # the user has replaced it too
    new_trainer(ActivationCheckpointing([Block]), look, limit_train_batches=1).fit(module, loader())
    assert names == [name for name, _ in plain.named_parameters()]
    assert "forward" not in vars(module.blocks[0])
    assert vars(module.blocks[1])["forward"] is own


def test_runs_resume_with_it_and_without_it(tmp_path: Path) -> None:
    def save(trainer: Any, event: Any) -> None:
        trainer.save_checkpoint(tmp_path / f"{len(list(tmp_path.iterdir()))}.ckpt")

    expected, trainer = fitted(ActivationCheckpointing([Block]), On(safe_point=save))
    for callbacks in ((), (ActivationCheckpointing([Block]),)):
        for point in (1, 5):  # in a window, and at the end of an epoch
            module, resumed = fitted(*callbacks, path=tmp_path / f"{point}.ckpt")
            assert equal(state(module, resumed), state(expected, trainer))


def test_the_choice_can_be_overridden_and_options_are_torchs() -> None:
    contexts: list[str] = []

    def context_fn() -> Any:
        contexts.append("asked")
        return torch.enable_grad(), torch.enable_grad()

    class First(ActivationCheckpointing):
        def is_checkpointed(self, name: str, module: nn.Module) -> bool:
            return name == "blocks.0"

    expected, trainer = fitted()
    module, with_it = fitted(First([Block], context_fn=context_fn))
    assert equal(state(module, with_it), state(expected, trainer))
    assert len(contexts) == 2 * 6
    counts = [each.forwards for each in module.blocks if isinstance(each, Block)]
    assert counts[0] > counts[1] == counts[2]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([Block()], {}, r"(?s)units=.*: give classes of modules"),
        (Block, {}, r"(?s)units=.*: give classes of modules"),
        ([], {}, r"units=\[\]\): give classes of modules"),
        ([int], {}, "int is no nn.Module"),
        ([Block], {"use_reentrant": True}, "use_reentrant=True.*there is no such argument"),
    ],
)
def test_units_have_to_be_classes_of_modules(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationError, match=message):
        ActivationCheckpointing(arguments, **options)


def test_a_module_without_such_submodules_is_an_error() -> None:
    with pytest.raises(
        MisconfigurationError, match=r"units=\(Conv1d\)\): Model has no such submodules.*'Linear', 'ModuleList'"
    ):
        fitted(ActivationCheckpointing([nn.Conv1d]))
