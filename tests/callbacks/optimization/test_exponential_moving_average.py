"""Averages have the bits of those of torch and count only real updates, and evaluation never leaves them in the module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import (
    EarlyStopping,
    ExponentialMovingAverage,
    GradientAccumulation,
    LRSchedulerStepping,
    MixedPrecision,
    ModelCheckpoint,
)
from tests import resuming
from tests.kit import new_trainer, train

BATCHES = list(torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(0)))
DECAY = 0.7


class Model(LightningModule):
    """A network with BatchNorm, which has buffers; records the weights that each evaluation batch was evaluated with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        self.evaluated: list[dict[str, Tensor]] = []

    def forward(self, batch: Tensor) -> Any:
        return self.net(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.evaluated.append(values(self))
        self.log("val_loss", self(batch).mean())

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Weights(Callback):
    """Records the weights after each batch that changed them, independently of ``after_update``."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.last: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, event: Any) -> None:
        self.last = values(trainer.module)

    def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
        now = values(trainer.module)
        if any(not torch.equal(now[name], self.last[name]) for name, _ in trainer.module.named_parameters()):
            self.seen.append(now)
        self.last = now

    def average(self, decay: Callable[[int], float] = lambda step: DECAY) -> dict[str, Tensor]:
        averages = {name: wide(value) for name, value in self.seen[0].items() if value.is_floating_point()}
        for step, now in enumerate(self.seen[1:], start=2):
            for name, average in averages.items():
                average.lerp_(wide(now[name]), 1 - decay(step))
        return averages


def wide(value: Tensor) -> Tensor:
    return value.to(torch.float32 if value.itemsize < 4 else value.dtype, copy=True)


def values(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    resuming.assert_same({key: mine[key] for key in sorted(mine)}, {key: expected[key] for key in sorted(expected)}, "tensors")


def assert_different(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(not torch.equal(mine[name], value) for name, value in expected.items() if name.endswith("weight"))


# ------------------------------------------------------------------ averages


@pytest.mark.parametrize("buffers", ["average", "copy"])
@pytest.mark.parametrize("window", [1, 3])
def test_it_averages_and_evaluates_as_torchs_averaged_model(window: int, buffers: Any) -> None:
    ema = ExponentialMovingAverage(DECAY, buffers=buffers)
    module = Model()
    trainer = train(module, BATCHES, ema, GradientAccumulation(window), max_epochs=2)

    plain = Model()
    oracle = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=buffers == "average")  # type: ignore[no-untyped-call]
    optimizer = plain.configure_optimizers()
    for _ in range(2):
        for start in range(0, len(BATCHES), window):
            members = BATCHES[start : start + window]
            optimizer.zero_grad()
            for batch in members:
                (plain(batch).square().mean() / window).backward()
            if len(members) < window:
                for parameter in plain.parameters():
                    assert parameter.grad is not None
                    parameter.grad.mul_(window / len(members))
            optimizer.step()
            oracle.update_parameters(plain)

    averaged = values(oracle.module)
    assert ema.averages.keys() == {name for name, _ in plain.named_parameters()} | (
        {"net.1.running_mean", "net.1.running_var"} if buffers == "average" else set()
    )
    assert_equal(ema.averages, {name: averaged[name] for name in ema.averages})
    assert_equal(values(module), values(plain))
    oracle.eval()
    predicted: Any = trainer.predict(module, BATCHES)
    assert len(predicted) == len(BATCHES)
    assert all(torch.equal(mine, oracle(batch)) for mine, batch in zip(predicted, BATCHES, strict=True))


def test_a_step_that_overflowed_is_not_counted() -> None:
    class Overflows(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * (torch.inf if batch_idx in (0, 3) else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    weights, ema = Weights(), ExponentialMovingAverage(DECAY)
    train(Overflows(), BATCHES, ema, MixedPrecision("fp16", scaler=scaler), weights)
    # Statistics change in a skipped batch too; the next update averages their new values.
    assert len(weights.seen) == len(BATCHES) - 2
    assert_equal(ema.averages, weights.average())


def test_a_batch_with_several_optimizers_counts_once_if_any_of_them_updates() -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(self(batch).square().mean())
            if batch_idx != 2:
                second.step()
            if batch_idx not in (1, 2):
                first.step()
                second.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[:2], self.net[2:])]

    weights, ema = Weights(), ExponentialMovingAverage(DECAY)
    train(Manual(), BATCHES, ema, weights)
    assert len(weights.seen) == len(BATCHES) - 1
    assert_equal(ema.averages, weights.average())


def test_warmup_limits_the_decay_of_early_updates() -> None:
    weights, ema = Weights(), ExponentialMovingAverage(0.45, warmup=True)
    train(Model(), BATCHES, ema, weights)
    assert_equal(ema.averages, weights.average(lambda step: min(0.45, (1 + step) / (10 + step))))
    assert (1 + len(weights.seen)) / (10 + len(weights.seen)) > 0.45 > (1 + 2) / (10 + 2), "both limits were reached"


def test_policies_may_be_overridden() -> None:
    class Later(ExponentialMovingAverage):
        def decay_at(self, trainer: Trainer) -> float:
            return 0.0 if trainer.global_step < 5 else 0.5

        def is_averaged(self, name: str, tensor: Tensor) -> bool:
            return tensor.requires_grad and name.endswith("weight")

    module = Model()
    module.net[1].weight.requires_grad_(False)
    weights, ema = Weights(), Later()
    train(module, BATCHES, ema, weights)
    expected = weights.average(lambda step: 0.0 if step < 5 else 0.5)
    assert list(ema.averages) == ["net.0.weight", "net.3.weight"]
    assert_equal(ema.averages, {name: expected[name] for name in ema.averages})


def test_low_precision_is_averaged_in_float32() -> None:
    module = Model().to(torch.bfloat16)
    module.net[3] = nn.Linear(4, 1)  # a layer in another type
    module.net[2] = nn.Identity()

    def step(batch: Tensor, batch_idx: int) -> Any:
        return module.net[3](module.net[:3](batch.bfloat16()).float()).square().mean()

    module.training_step = step  # type: ignore[method-assign]
    module.validation_step = lambda batch, batch_idx: module.evaluated.append(values(module))  # type: ignore[method-assign]
    weights, ema = Weights(), ExponentialMovingAverage(0.99)
    trainer = train(module, BATCHES, ema, weights)
    expected = weights.average(lambda step: 0.99)
    assert {average.dtype for average in ema.averages.values()} == {torch.float32}
    assert_equal(ema.averages, expected)
    trainer.validate(module, BATCHES[:1])
    assert_equal(
        {name: value for name, value in module.evaluated[0].items() if name in expected},
        {name: value.to(weights.seen[0][name].dtype) for name, value in expected.items()},
    )


class Odd(LightningModule):
    """A module with a mask, a counter, a statistic that is replaced in each step, a complex parameter, and a parameter that
    two layers share."""

    count: Tensor
    statistic: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.layer.weight
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.nan]), persistent=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("statistic", torch.zeros(3))
        self.evaluated: list[dict[str, Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.count += 1
        self.statistic = self.statistic * 0.5 + batch.mean(0)
        return (self.tied(self.layer(batch)) * self.phase).abs().square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.evaluated.append(values(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_masks_and_counters_are_not_averaged_and_shared_and_complex_parameters_are() -> None:
    module, weights, ema = Odd(), Weights(), ExponentialMovingAverage(DECAY)
    trainer = train(module, BATCHES, ema, weights)
    assert ema.averages.keys() == {"layer.weight", "layer.bias", "tied.bias", "phase", "statistic"}
    expected = weights.average()
    phase = weights.seen[0]["phase"].clone()
    for now in weights.seen[1:]:
        phase.lerp_(now["phase"], 1 - DECAY)
    expected["phase"] = phase
    assert_equal(ema.averages, {name: expected[name] for name in ema.averages})
    raw = values(module)
    trainer.validate(module, BATCHES[:1])
    assert_equal(module.evaluated[0], {**raw, **ema.averages})
    assert module.count == 7


def test_a_second_fit_starts_new_averages() -> None:
    ema = ExponentialMovingAverage(DECAY)
    trainer = train(Model(), BATCHES, ema)
    weights, module = Weights(), Model()
    trainer.signals.train_start.connect(weights.on_train_start)
    trainer.signals.train_batch_end.connect(weights.on_train_batch_end)
    trainer.fit(module, BATCHES[2:])
    assert_equal(ema.averages, weights.average())


def test_an_update_reads_nothing_from_the_device() -> None:
    reads: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_local_scalar_dense" in str(func) or "is_nonzero" in str(func):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    class Watched(ExponentialMovingAverage):
        def on_after_update(self, trainer: Trainer, event: Any) -> None:
            with Watch():  # type: ignore[no-untyped-call]
                super().on_after_update(trainer, event)
            if event.global_step == 1:  # when the averages start, each floating buffer is checked once for finite values
                assert len(reads) == 2
                reads.clear()

    train(Model(), BATCHES, Watched(warmup=True))
    assert reads == []


# ------------------------------------------------------------------ evaluation


def test_each_evaluation_uses_the_averages_and_gives_the_raw_weights_back() -> None:
    class Keeps(Callback):
        def on_validation_batch_start(self, trainer: Trainer, event: Any) -> None:
            used.append({name: value.clone() for name, value in ema.averages.items()})

        def on_train_batch_start(self, trainer: Trainer, event: Any) -> None:
            assert all(not torch.is_inference(parameter) for parameter in trainer.module.parameters())
            raw.append(values(trainer.module))

    used: list[dict[str, Tensor]] = []
    raw: list[dict[str, Tensor]] = []
    module, weights, ema = Model(), Weights(), ExponentialMovingAverage(DECAY)
    pointers = [tensor.data_ptr() for tensor in values_of(module)]
    trainer = train(module, BATCHES, ema, weights, Keeps(), val=BATCHES[:1], val_check_interval=2)
    assert len(used) == 3
    for evaluated, averages in zip(module.evaluated, used, strict=True):
        assert_equal({name: evaluated[name] for name in averages}, averages)
    for before, after in zip(raw[1:], weights.seen, strict=False):
        assert_equal(before, after)
    assert [tensor.data_ptr() for tensor in values_of(module)] == pointers

    final = values(module)
    assert_equal(final, weights.seen[-1])
    assert_different(final, ema.averages)
    for evaluate in (trainer.validate, trainer.test):
        module.evaluated.clear()
        evaluate(module, BATCHES[:1])
        assert_equal(module.evaluated[0], {**final, **ema.averages})
        assert_equal(values(module), final)
    (first,) = trainer.predict(module, BATCHES[:1])
    assert_equal(values(module), final)
    ema.copy_into(module)
    assert_equal(values(module), {**final, **ema.averages})
    assert torch.equal(first, module.eval()(BATCHES[0]))


def values_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_evaluation_uses_raw_weights_before_the_first_update_and_of_another_module() -> None:
    module, ema = Model(), ExponentialMovingAverage(DECAY)
    before = values(module)
    trainer = train(module, BATCHES, ema, val=BATCHES[:1], num_sanity_val_steps=1)
    assert_equal(module.evaluated[0], before)
    other = Model()
    trainer.validate(other, BATCHES[:1])
    assert_equal(other.evaluated[0], values(other))
    with pytest.raises(MisconfigurationError, match="has no averages yet: they start at the first update"):
        ExponentialMovingAverage().copy_into(module)


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_an_evaluation_gives_the_raw_weights_back(error: type[BaseException], stage: str) -> None:
    class Fails(Model):
        fails = False

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.fails:
                raise error

    module, weights, ema = Fails(), Weights(), ExponentialMovingAverage(DECAY)
    if stage == "fit":
        module.fails = True
        with pytest.raises(error):
            train(module, BATCHES, ema, weights, val=BATCHES[:1])
    else:
        trainer = train(module, BATCHES, ema, weights)
        module.fails = True
        with pytest.raises(error):
            trainer.validate(module, BATCHES[:1])
    assert_different(module.evaluated[-1], weights.seen[-1])
    assert_equal(values(module), weights.seen[-1])


def test_an_interrupted_evaluation_gives_the_raw_weights_back() -> None:
    class Leaves(Callback):
        def on_validation_batch_end(self, trainer: Trainer, event: Any) -> None:
            trainer.stop("the machine goes", at_once=True)

        def on_validation_end(self, trainer: Trainer, event: Any) -> None:
            raise AssertionError("the validation was interrupted")

        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            at_safe_points.append(values(trainer.module))

    at_safe_points: list[dict[str, Tensor]] = []
    module, weights = Model(), Weights()
    ema = ExponentialMovingAverage(DECAY)
    trainer = train(module, BATCHES, ema, weights, Leaves(), val=BATCHES[:2], val_check_interval=3)
    assert len(module.evaluated) == 1 and trainer.global_step == 3
    assert_different(module.evaluated[0], weights.seen[-1])
    assert_equal(at_safe_points[-1], weights.seen[-1])
    assert_equal(values(module), weights.seen[-1])


def test_teardown_puts_the_raw_weights_back_if_an_interrupt_came_while_they_were_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, weights, ema = Model(), Weights(), ExponentialMovingAverage(DECAY)
    copy, armed = Tensor.copy_, False

    def interrupted(tensor: Tensor, *args: Any) -> Tensor:
        nonlocal armed
        if armed and tensor is module.net[3].weight:
            armed = False
            raise KeyboardInterrupt
        return copy(tensor, *args)

    class Arms(Callback):
        def on_validation_end(self, trainer: Trainer, event: Any) -> None:
            nonlocal armed
            armed = True

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(module, BATCHES, ema, weights, Arms(), val=BATCHES[:1])
    assert not armed
    assert_different(module.evaluated[-1], weights.seen[-1])
    assert_equal(values(module), weights.seen[-1])


# ------------------------------------------------------------------ checkpoints


class SavesInValidation(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: Trainer, event: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_checkpoint_that_is_written_during_an_evaluation_has_raw_weights(tmp_path: Path, stage: str) -> None:
    module, weights, ema, saves = Odd(), Weights(), ExponentialMovingAverage(DECAY), SavesInValidation(tmp_path / "a.ckpt")
    trainer = train(module, BATCHES, ema, weights, saves, val=BATCHES[:1] if stage == "fit" else None)
    if stage == "validate":
        trainer.validate(module, BATCHES[:1])
    content = torch.load(saves.path, weights_only=True)
    assert_equal(content["callbacks"]["ExponentialMovingAverage"]["averages"], ema.averages)
    raw = dict(module.state_dict())
    assert raw.keys() >= {"layer.weight", "tied.weight"}
    assert_equal(content["state_dict"], raw)
    assert_equal(
        {name: raw[name] for name in weights.seen[-1] if name in raw}, {k: v for k, v in weights.seen[-1].items() if k in raw}
    )
    assert_different(module.evaluated[-1], {"layer.weight": raw["layer.weight"]})


def test_checkpoints_are_the_same_in_any_order_of_attachment(tmp_path: Path) -> None:
    contents = []
    for backwards in (False, True):
        folder = tmp_path / str(backwards)
        callbacks = [ExponentialMovingAverage(DECAY), ModelCheckpoint(folder, every_n_steps=1, save_top_k=-1), Weights()]
        train(Model(), BATCHES, *reversed(callbacks) if backwards else callbacks, val=BATCHES[:1], val_check_interval=2)
        files = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.ckpt"))}
        contents.append({name: (content["state_dict"], content["callbacks"]) for name, content in files.items()})
    assert len(contents[0]) > len(BATCHES)
    for (states, of_callbacks), (other_states, of_others) in zip(contents[0].values(), contents[1].values(), strict=True):
        resuming.assert_same(dict(states), dict(other_states), "weights")
        resuming.assert_same(of_callbacks["ExponentialMovingAverage"], of_others["ExponentialMovingAverage"], "averages")


def test_a_tensor_that_another_listener_took_out_of_the_checkpoint_stays_out(tmp_path: Path) -> None:
    class Prunes(Callback):
        def on_save_checkpoint(self, trainer: Trainer, event: Any) -> None:
            del event.checkpoint["state_dict"]["net.0.weight"]

    saves = SavesInValidation(tmp_path / "a.ckpt")
    train(Model(), BATCHES, Prunes(), ExponentialMovingAverage(DECAY), saves, val=BATCHES[:1])
    assert "net.0.weight" not in torch.load(saves.path, weights_only=True)["state_dict"]


def test_load_into_gives_a_module_the_averages_and_the_raw_values_of_other_tensors(tmp_path: Path) -> None:
    class Mine(ExponentialMovingAverage):
        pass

    for kind in (ExponentialMovingAverage, Mine):
        module, ema, fresh = Model(), kind(DECAY, buffers="copy"), Model()
        train(module, BATCHES, ema).save_checkpoint(tmp_path / "a.ckpt")
        kind.load_into(fresh, tmp_path / "a.ckpt")
        assert_equal(values(fresh), {**values(module), **ema.averages})
    with pytest.raises(MisconfigurationError, match=r"a.ckpt has no averages of ExponentialMovingAverage.*Mine"):
        ExponentialMovingAverage.load_into(fresh, tmp_path / "a.ckpt")
    other = Model()
    other.net[3] = nn.Linear(4, 2)  # a copy of one row would fit into it
    with pytest.raises(MisconfigurationError, match=r"Model has no tensors with .* \['net.3.weight', 'net.3.bias'\]"):
        ema.copy_into(other)


def test_an_evaluation_with_ckpt_path_uses_the_averages_of_the_file(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_safe_point(self, trainer: Trainer, event: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                at_step_3.update(values(trainer.module) | {name: average.clone() for name, average in ema.averages.items()})

    at_step_3: dict[str, Tensor] = {}
    module, ema = Model(), ExponentialMovingAverage(DECAY)
    of_the_fit = train(module, BATCHES, ema, Saves())
    fresh = new_trainer(ExponentialMovingAverage())
    for trainer in (of_the_fit, fresh):
        tested = Model() if trainer is fresh else module
        trainer.validate(tested, BATCHES[:1], ckpt_path=tmp_path / "a.ckpt")
        assert_equal(tested.evaluated[-1], at_step_3)
        assert_equal(values(tested), {n: v.clone() for n, v in torch.load(tmp_path / "a.ckpt")["state_dict"].items()})

    train(Model(), BATCHES).save_checkpoint(tmp_path / "b.ckpt")
    of_the_fit.validate(module, BATCHES[:1], ckpt_path=tmp_path / "b.ckpt")
    assert_equal(module.evaluated[-1], values(module))


@pytest.mark.parametrize(("window", "val_check_interval"), [(1, None), (3, 2)])
def test_a_run_resumes_from_any_safe_point(tmp_path: Path, window: int, val_check_interval: int | None) -> None:
    """Validation logs values of the averages, so that a resumed run shows whether it has the right ones."""

    def build() -> Any:
        data = torch.randn(20, 3, generator=torch.Generator().manual_seed(2))
        loader: Any = DataLoader(data, batch_size=4, shuffle=True)  # type: ignore[arg-type]
        callbacks = [
            ExponentialMovingAverage(0.9, warmup=True),
            GradientAccumulation(window),
            LRSchedulerStepping(),
            EarlyStopping("both_epoch", min_delta=100.0, patience=2),
        ]
        options = {"max_epochs": 5, "val_check_interval": val_check_interval}
        return resuming.Model(), loader, [torch.ones(4, 3)], callbacks, options

    # Three epochs of five batches: the first look is an improvement.
    assert resuming.check_all_safe_points(build, tmp_path) == 15


def test_averages_of_a_checkpoint_move_to_the_device_of_their_weights_and_the_checkpoint_stays_unchanged() -> None:
    """A checkpoint is read on the CPU; the meta device stands for an accelerator."""
    loaded = {name: value for name, value in values(Model()).items() if value.is_floating_point()}
    before = {name: value.clone() for name, value in loaded.items()}
    for device in ("cpu", "meta"):
        ema = ExponentialMovingAverage(DECAY)
        trainer = new_trainer(ema, device=device)
        trainer.signals.fit_start.connect(lambda trainer, event, ema=ema: ema.load_state_dict({"averages": loaded}))
        trainer.fit(Model(), BATCHES)
        assert {average.device.type for average in ema.averages.values()} == {device}
        assert_equal(loaded, before)


def test_a_run_without_averages_starts_them_when_it_is_resumed(tmp_path: Path) -> None:
    train(Model(), BATCHES).save_checkpoint(tmp_path / "a.ckpt")
    weights, ema, module = Weights(), ExponentialMovingAverage(DECAY), Model()
    trainer = new_trainer(ema, weights, max_epochs=3)
    trainer.fit(module, BATCHES, ckpt_path=tmp_path / "a.ckpt")
    assert len(weights.seen) >= len(BATCHES)
    assert_equal(ema.averages, weights.average())


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), True, "0.9", None])
def test_a_decay_that_is_not_from_0_to_1_is_an_error(decay: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"ExponentialMovingAverage\(decay=.*: give a number from 0 to 1"):
        ExponentialMovingAverage(decay)


def test_an_unknown_option_for_buffers_is_an_error() -> None:
    with pytest.raises(MisconfigurationError, match=r"ExponentialMovingAverage\(buffers='swap'\): give 'average' or 'copy'"):
        ExponentialMovingAverage(buffers="swap")  # type: ignore[arg-type]


def test_two_averages_in_one_trainer_are_an_error() -> None:
    with pytest.raises(MisconfigurationError, match="both have the role 'weight_averaging'"):
        new_trainer(ExponentialMovingAverage(0.9), ExponentialMovingAverage(0.99))
