"""Every run equals, bit for bit, the hand-written PyTorch loop that does the same (``reference.py``)."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, MixedPrecision
from tests import reference
from tests.kit import train

EPOCHS = 3


def dataset(samples: int, seed: int = 2) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(samples, 3, generator=generator), torch.randn(samples, 1, generator=generator))


def batches(count: int) -> list[Any]:
    return list(DataLoader(dataset(4 * count), batch_size=4))


class Module(LightningModule):
    def __init__(self, model: nn.Module, configure: Callable[[], Any]) -> None:
        super().__init__()
        self.model = model
        self.configure = configure

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return reference.loss_of(self.model, batch)

    def configure_optimizers(self) -> Any:
        return self.configure()


class Rates(Callback):
    """Records the learning rate of each update."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_after_optimizer_step(self, trainer: Trainer, event: Any) -> None:
        self.rates.append(event.optimizer.param_groups[0]["lr"])


def fit(module: LightningModule, data: Any, *callbacks: Any, val: Any = None, **options: Any) -> list[float]:
    """Train a module and return the learning rate of each update."""
    rates = Rates()
    train(module, data, *callbacks, rates, val=val, max_epochs=EPOCHS, num_sanity_val_steps=2, **options)
    return rates.rates


def leaves(state: Any, path: str = "") -> dict[str, Any]:
    """Return a nested state as a flat dict of its leaves."""
    if not isinstance(state, (dict, list, tuple)):
        return {path: state}
    items: Iterable[tuple[Any, Any]] = state.items() if isinstance(state, dict) else enumerate(state)
    return {name: leaf for key, value in items for name, leaf in leaves(value, f"{path}/{key}").items()}


def first_weight(model: nn.Module) -> Tensor:
    return next(model.parameters())


def assert_equal_states(actual: Any, expected: Any) -> None:
    flat, wanted = leaves(actual), leaves(expected)
    assert flat.keys() == wanted.keys()
    different = [
        name
        for name, value in wanted.items()
        if not (torch.equal(flat[name], value) if isinstance(value, Tensor) else flat[name] == value)
    ]
    assert different == []


def assert_equal_runs(model: nn.Module, optimizer: Optimizer, expected_model: nn.Module, expected_optimizer: Optimizer) -> None:
    """Check that parameters and optimizer state are equal, learning rates among them, and that training did move them."""
    assert not torch.equal(first_weight(expected_model), first_weight(reference.net()))
    assert_equal_states(model.state_dict(), expected_model.state_dict())
    assert_equal_states(optimizer.state_dict(), expected_optimizer.state_dict())


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01)


def pair(make: Callable[[nn.Module], Optimizer] = sgd) -> tuple[nn.Module, Optimizer, nn.Module, Optimizer]:
    """Return a model with its optimizer, and the same once more, for the reference."""
    model, expected = reference.net(), reference.net()
    return model, make(model), expected, make(expected)


# ------------------------------------------------------------------ automatic optimization


@pytest.mark.parametrize("make", [sgd, adamw])
def test_plain_training(make: Callable[[nn.Module], Optimizer]) -> None:
    model, optimizer, expected, expected_optimizer = pair(make)
    rates = fit(Module(model, lambda: optimizer), batches(5))
    assert rates == reference.plain(expected, expected_optimizer, batches(5), EPOCHS)
    assert_equal_runs(model, optimizer, expected, expected_optimizer)


def test_accumulation_over_three_with_a_short_last_window() -> None:
    model, optimizer, expected, expected_optimizer = pair()
    rates = fit(Module(model, lambda: optimizer), batches(7), GradientAccumulation(3))
    assert rates == reference.accumulating(expected, expected_optimizer, batches(7), EPOCHS, lambda epoch: 3)
    assert len(rates) == 3 * EPOCHS
    assert_equal_runs(model, optimizer, expected, expected_optimizer)


def test_accumulation_by_a_schedule_of_epochs() -> None:
    schedule = {0: 3, 1: 2, 2: 1}
    model, optimizer, expected, expected_optimizer = pair(adamw)
    rates = fit(Module(model, lambda: optimizer), batches(7), GradientAccumulation(schedule))
    assert rates == reference.accumulating(expected, expected_optimizer, batches(7), EPOCHS, schedule.__getitem__)
    assert len(rates) == 3 + 4 + 7
    assert_equal_runs(model, optimizer, expected, expected_optimizer)


@pytest.mark.parametrize(("algorithm", "threshold"), [("norm", 0.3), ("value", 0.05)])
def test_clipping(algorithm: str, threshold: float) -> None:
    model, optimizer, expected, expected_optimizer = pair()
    rates = fit(Module(model, lambda: optimizer), batches(5), GradientClipping(threshold, algorithm))
    assert rates == reference.clipping(expected, expected_optimizer, batches(5), EPOCHS, algorithm, threshold)
    assert_equal_runs(model, optimizer, expected, expected_optimizer)
    unclipped = reference.net()
    reference.plain(unclipped, sgd(unclipped), batches(5), EPOCHS)
    assert not torch.equal(first_weight(unclipped), first_weight(model))  # the threshold did bite


def test_a_scheduler_by_epoch() -> None:
    model, optimizer, expected, expected_optimizer = pair()
    schedulers = [StepLR(each, step_size=1, gamma=0.3) for each in (optimizer, expected_optimizer)]
    rates = fit(Module(model, lambda: ([optimizer], [schedulers[0]])), batches(4), LRSchedulerStepping())
    assert rates == reference.scheduled(expected, expected_optimizer, batches(4), EPOCHS, schedulers[1], by_step=False)
    assert len(set(rates)) == EPOCHS
    assert_equal_runs(model, optimizer, expected, expected_optimizer)
    assert schedulers[0].state_dict() == schedulers[1].state_dict()


def test_a_scheduler_by_step() -> None:
    model, optimizer, expected, expected_optimizer = pair(adamw)
    # One step more than there are, so that the last rate is still on the curve.
    schedulers = [OneCycleLR(each, max_lr=0.1, total_steps=4 * EPOCHS + 1) for each in (optimizer, expected_optimizer)]
    config = {"scheduler": schedulers[0], "interval": "step"}
    rates = fit(Module(model, lambda: ([optimizer], [config])), batches(4), LRSchedulerStepping())
    assert rates == reference.scheduled(expected, expected_optimizer, batches(4), EPOCHS, schedulers[1], by_step=True)
    assert len(set(rates)) > EPOCHS
    assert_equal_runs(model, optimizer, expected, expected_optimizer)
    assert_equal_states(schedulers[0].state_dict(), schedulers[1].state_dict())


def test_bf16_autocast() -> None:
    model, optimizer, expected, expected_optimizer = pair(adamw)
    rates = fit(Module(model, lambda: optimizer), batches(5), MixedPrecision("bf16"))
    assert rates == reference.bf16(expected, expected_optimizer, batches(5), EPOCHS)
    assert_equal_runs(model, optimizer, expected, expected_optimizer)
    in_float32 = reference.net()
    reference.plain(in_float32, adamw(in_float32), batches(5), EPOCHS)
    assert not torch.equal(first_weight(in_float32), first_weight(model))  # autocast did matter


@pytest.mark.parametrize("window", [1, 3])
def test_fp16_with_loss_scaling(window: int) -> None:
    def linear() -> nn.Module:
        torch.manual_seed(3)
        return nn.Linear(3, 1)

    def scaler() -> torch.amp.GradScaler:
        # So large that the first steps overflow, and growing often enough that the scale moves both ways.
        return torch.amp.GradScaler("cpu", init_scale=2.0**19, growth_interval=2)

    model, expected = linear(), linear()
    optimizer, expected_optimizer = sgd(model), sgd(expected)
    scalers = scaler(), scaler()
    accumulation = [GradientAccumulation(window)] if window > 1 else []
    rates = fit(Module(model, lambda: optimizer), batches(7), *accumulation, MixedPrecision("fp16", scaler=scalers[0]))
    reference.fp16(expected, expected_optimizer, batches(7), EPOCHS, scalers[1], window)
    windows = EPOCHS * -(-7 // window)
    assert 0 < len(rates) < windows  # some steps overflowed, others did not
    assert_equal_runs(model, optimizer, expected, expected_optimizer)
    assert scalers[0].state_dict() == scalers[1].state_dict()


def test_lbfgs() -> None:
    def lbfgs(model: nn.Module) -> Optimizer:
        return LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")

    model, optimizer, expected, expected_optimizer = pair(lbfgs)
    rates = fit(Module(model, lambda: optimizer), batches(4))
    assert rates == reference.closure_driven(expected, expected_optimizer, batches(4), EPOCHS)
    assert_equal_runs(model, optimizer, expected, expected_optimizer)
    evaluations = next(iter(optimizer.state.values()))["func_evals"]
    assert evaluations > 4 * EPOCHS  # several in a step


# ------------------------------------------------------------------ manual optimization


class Gan(LightningModule):
    def __init__(self, generator: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = generator, critic

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_critic = self.optimizers()
        real, _ = batch
        fake = self.generator(torch.randn(len(real), 3))
        for_critic.zero_grad()
        self.manual_backward(F.softplus(self.critic(fake.detach()) - self.critic(real).mean()).mean())
        for_critic.step()
        for_generator.zero_grad()
        self.manual_backward(F.softplus(-self.critic(fake)).mean())
        for_generator.step()

    def configure_optimizers(self) -> list[Optimizer]:
        return [adamw(self.generator), sgd(self.critic)]


def test_a_gan_with_two_optimizers() -> None:
    def generator() -> nn.Module:
        torch.manual_seed(4)
        return nn.Linear(3, 3)

    module = Gan(generator(), reference.net())
    expected_generator, expected_critic = generator(), reference.net()
    expected_optimizers = [adamw(expected_generator), sgd(expected_critic)]
    torch.manual_seed(5)
    fit(module, batches(6))
    torch.manual_seed(5)
    reference.gan(expected_generator, expected_critic, expected_optimizers, batches(6), EPOCHS)
    for_generator, for_critic = module.optimizers(use_pl_optimizer=False)
    assert not torch.equal(first_weight(generator()), first_weight(expected_generator))
    assert_equal_states(module.generator.state_dict(), expected_generator.state_dict())
    assert_equal_states(for_generator.state_dict(), expected_optimizers[0].state_dict())
    assert_equal_runs(module.critic, for_critic, expected_critic, expected_optimizers[1])


# ------------------------------------------------------------------ the order of random draws


class DrawsInValidation(Module):
    """Draws from the global generator in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("noise", torch.rand(()))


def shuffled(own_generator: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(6) if own_generator else None
    return DataLoader(dataset(20), batch_size=4, shuffle=True, generator=generator)


@pytest.mark.parametrize("validation", ["none", "by epoch", "within the epoch"])
@pytest.mark.parametrize("own_generator", [False, True])
def test_shuffling_draws_as_a_for_loop_does_and_validation_leaves_no_trace(own_generator: bool, validation: str) -> None:
    model, optimizer, expected, expected_optimizer = pair()
    module = (Module if validation == "none" else DrawsInValidation)(model, lambda: optimizer)
    val = None if validation == "none" else DataLoader(dataset(8), batch_size=2, shuffle=True)
    options = {"val_check_interval": 2} if validation == "within the epoch" else {}
    torch.manual_seed(7)
    fit(module, shuffled(own_generator), val=val, **options)
    after = torch.rand(())
    torch.manual_seed(7)
    reference.plain(expected, expected_optimizer, shuffled(own_generator), EPOCHS)
    assert torch.equal(after, torch.rand(()))  # draws after the run are the same, too
    assert_equal_runs(model, optimizer, expected, expected_optimizer)


def test_dropout_draws_as_in_a_for_loop() -> None:
    def with_dropout() -> nn.Module:
        return nn.Sequential(*reference.net(), nn.Dropout(0.5))

    model, expected = with_dropout(), with_dropout()
    optimizer, expected_optimizer = sgd(model), sgd(expected)
    torch.manual_seed(8)
    fit(DrawsInValidation(model, lambda: optimizer), shuffled(False), val=DataLoader(dataset(8), batch_size=2))
    torch.manual_seed(8)
    reference.plain(expected, expected_optimizer, shuffled(False), EPOCHS)
    assert_equal_runs(model, optimizer, expected, expected_optimizer)


def test_a_limit_within_a_shuffled_epoch_reads_no_further_than_a_break() -> None:
    class Limited:
        """Yields the first three batches of each pass."""

        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Any:
            for index, batch in enumerate(self.loader):
                yield batch
                if index == 2:
                    break

    model, optimizer, expected, expected_optimizer = pair()
    torch.manual_seed(9)
    fit(Module(model, lambda: optimizer), shuffled(False), limit_train_batches=3)
    torch.manual_seed(9)
    reference.plain(expected, expected_optimizer, Limited(shuffled(False)), EPOCHS)
    assert_equal_runs(model, optimizer, expected, expected_optimizer)


# ------------------------------------------------------------------ the reference itself


def lines(loop: ast.FunctionDef) -> int:
    assert loop.end_lineno is not None
    return loop.end_lineno - loop.body[0].lineno + 1


def test_the_reference_is_short_and_imports_nothing_of_eventtrain() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    imported = [node.module or "." for node in tree.body if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert "torch" in imported
    assert not [name for name in imported if name.startswith(("eventtrain", "."))]
    loops = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    lengths = {loop.name: lines(loop) for loop in loops}
    assert {name: length for name, length in lengths.items() if length > 20} == {}
