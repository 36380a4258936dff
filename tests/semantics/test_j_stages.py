"""J. Stages: evaluation during a fit and without one, requests, and the module's hooks."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, LRSchedulerStepping
from eventtrain.distributed import Place
from tests.kit import FakeProcesses, On, Probe, Recorder, batches, new_trainer, train


class Evaluates(Probe):
    """Calls a function of ``(module, batch, batch_idx)`` in each evaluation step."""

    def __init__(
        self, evaluate: Callable[[Any, Any, int], Any] = lambda module, batch, batch_idx: None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.evaluate = evaluate

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.evaluate(self, batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.evaluate(self, batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.evaluate(self, batch, batch_idx)


STAGES = ("validate", "test", "predict")

# ------------------------------------------------------------------ J1: gradients


class Modes(Evaluates):
    """Records in each evaluation step whether gradients and inference mode are enabled."""

    def __init__(self) -> None:
        super().__init__(lambda module, batch, batch_idx: self.modes.append(self.mode()))
        self.modes: list[tuple[bool, bool]] = []

    def mode(self) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def test_j1_during_a_fit_evaluation_uses_no_grad() -> None:
    """The sanity check too: training cannot use tensors of inference mode."""
    module = Modes()
    train(module, 1, val=2, num_sanity_val_steps=1)
    assert module.modes == [(False, False)] * 3


@pytest.mark.parametrize("stage", STAGES)
def test_j1_without_a_fit_evaluation_runs_without_gradients(stage: str) -> None:
    module = Modes()
    getattr(new_trainer(), stage)(module, batches(1))
    assert [enabled for enabled, _ in module.modes] == [False]
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("sanity", [0, 1])
def test_j1_a_tensor_cached_in_evaluation_can_be_trained_with(sanity: int) -> None:
    class Caches(Evaluates):
        cached: Tensor | None = None

        def table(self, batch: Tensor) -> Tensor:
            if self.cached is None:
                self.cached = torch.ones(1) * batch
            return self.cached

        def loss(self, x: Tensor) -> Tensor:
            return (self.w * self.table(x)).sum()

    module = Caches(lambda module, batch, i: module.table(batch))
    train(module, 2, val=2, num_sanity_val_steps=sanity, max_epochs=2)
    assert module.updates == [1.0] * 4


def test_j1_gradients_are_on_again_in_training() -> None:
    module = Evaluates()
    train(module, 4, val=1, val_check_interval=1)
    assert module.updates == [1.0, 2.0, 3.0, 4.0]


# ------------------------------------------------------------------ J1: training flags


class Layers(LightningModule):
    """A frozen layer is in evaluation mode while the module trains."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        self.frozen[0].eval()
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 1)
        self.flags: list[Any] = []
        self.fails = False

    def now(self) -> list[bool]:
        return [part.training for part in self.modules()]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.frozen(x))).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.flags.append(("train", self.now()))
        return self(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.flags.append(("eval", self.now()))
        if self.fails:
            raise RuntimeError("mine")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def pictures(n: int) -> list[Tensor]:
    return [torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def test_j1_the_flag_of_each_submodule_is_restored() -> None:
    module = Layers()
    before = module.now()
    assert before == [True, True, False, True, True, True]
    train(module, pictures(2), val=pictures(1), max_epochs=2, num_sanity_val_steps=1)
    assert [stage for stage, _ in module.flags] == ["eval", "train", "train", "eval", "train", "train", "eval"]
    for stage, flags in module.flags:
        assert flags == (before if stage == "train" else [False] * 6)
    assert module.now() == before


@pytest.mark.parametrize("stage", STAGES)
def test_j1_flags_are_restored_after_an_evaluation_without_a_fit(stage: str) -> None:
    module = Layers()
    before = module.now()
    getattr(new_trainer(), stage)(module, pictures(1))
    assert module.flags == [("eval", [False] * 6)]
    assert module.now() == before


@pytest.mark.parametrize("stage", ["fit", *STAGES])
def test_j1_flags_are_restored_after_an_error(stage: str) -> None:
    module = Layers()
    module.fails = True
    before = module.now()
    data = (pictures(1), pictures(1)) if stage == "fit" else (pictures(1),)
    with pytest.raises(RuntimeError, match="mine"):
        getattr(new_trainer(), stage)(module, *data)
    assert module.now() == before
    assert torch.is_grad_enabled()


def test_j1_a_frozen_batch_norm_keeps_its_statistics() -> None:
    module = Layers()
    train(module, pictures(3), val=pictures(2), max_epochs=2, num_sanity_val_steps=2)
    assert torch.equal(dict(module.frozen[0].named_buffers())["running_mean"], torch.zeros(2))
    assert module.norm.num_batches_tracked is not None
    assert module.norm.num_batches_tracked.item() == 6  # the batches of training only


# ------------------------------------------------------------------ J1: random numbers


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


class Draws(Evaluates):
    def __init__(self, *, evaluates: bool, fails: bool = False) -> None:
        super().__init__(lambda module, batch, batch_idx: self.draw_or_fail())
        self.evaluates, self.fails = evaluates, fails
        self.drawn: list[Any] = []

    def draw_or_fail(self) -> None:
        draw()
        if self.fails:
            raise RuntimeError("mine")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn.append(draw())
        return self.w.sum()


def seeded() -> None:
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)


def shuffled(n: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(n))), shuffle=True)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("interval", [None, 1])
def test_j1_evaluation_does_not_change_the_generators(sanity: int, interval: int | None) -> None:
    """Of torch, NumPy and Python; by the steps and by a validation loader that shuffles."""
    drawn = []
    for evaluates in (True, False):
        seeded()
        module = Draws(evaluates=evaluates)
        train(
            module, 4, val=shuffled(3), max_epochs=2, num_sanity_val_steps=sanity, val_check_interval=interval,
            limit_val_batches=None if evaluates else 0,
        )  # fmt: skip
        drawn.append([*module.drawn, draw()])
    assert drawn[0] == drawn[1]


def test_j1_evaluation_does_not_change_the_generators_even_if_it_fails() -> None:
    module = Draws(evaluates=True, fails=True)
    seeded()
    with pytest.raises(RuntimeError, match="mine"):
        train(module, 1, val=shuffled(3))
    after = draw()
    seeded()
    draw()  # the training step's
    assert after == draw()


def test_j1_a_validation_does_not_change_a_bit_of_training() -> None:
    results = []
    for limit in (None, 0):
        torch.manual_seed(11)
        module = Layers()
        samples: Any = torch.randn(12, 2)
        loader = DataLoader(samples, batch_size=3, shuffle=True)
        train(module, loader, val=pictures(3), max_epochs=3, limit_val_batches=limit)
        results.append(module.state_dict())
    for value, other in zip(results[0].values(), results[1].values(), strict=True):
        assert torch.equal(value, other)


# ------------------------------------------------------------------ J2: the sanity check


class Sane(Evaluates):
    def __init__(self, **options: Any) -> None:
        super().__init__(lambda module, batch, i: module.check(batch), **options)
        self.checks: list[float] = []
        self.validations: list[float] = []

    def check(self, batch: Tensor) -> None:
        (self.checks if self.trainer.sanity_checking else self.validations).append(batch.item())
        self.log("value", batch, on_step=True, on_epoch=True, prog_bar=True)


def test_j2_two_batches_before_training() -> None:
    module = Sane()
    order = Recorder("fit_start", "validation_start", "validation_end", "train_start", "train_batch_start")
    trainer = train(module, 1, order, val=4, num_sanity_val_steps=2)
    assert module.checks == [1.0, 2.0]
    assert module.validations == [1.0, 2.0, 3.0, 4.0]
    validation = ["validation_start", "validation_end"]
    assert order.names == ["fit_start", *validation, "train_start", "train_batch_start", *validation]
    assert not trainer.sanity_checking


def test_j2_two_is_the_default() -> None:
    module = Sane()
    Trainer(max_epochs=1, device="cpu", default_callbacks=False).fit(module, batches(1), batches(4))
    assert module.checks == [1.0, 2.0]


@pytest.mark.parametrize(("steps", "expected"), [(0, 0), (1, 1), (9, 4), (-1, 4)])
def test_j2_the_number_is_settable(steps: int, expected: int) -> None:
    module = Sane()
    train(module, 1, val=4, num_sanity_val_steps=steps)
    assert len(module.checks) == expected
    module = Sane()
    train(module, 1, val=4, num_sanity_val_steps=steps, limit_val_batches=1)
    assert len(module.checks) == min(expected, 1)


def test_j2_it_logs_nothing() -> None:
    at_start: list[Any] = []

    def look(trainer: Any, event: Any) -> None:
        at_start.append((dict(trainer.callback_metrics), dict(trainer.logged_metrics), dict(trainer.progress_bar_metrics)))

    logged = Recorder("metrics_logged")
    train(Sane(), 1, On(train_start=look), logged, val=3, num_sanity_val_steps=2)
    assert at_start == [({}, {}, {})]
    # A value for each batch of the validation, and one for its epoch; none of the sanity check.
    assert [event.stage for event in logged.events] == ["train", *["validation"] * 4, "train"]


def test_j2_it_counts_as_no_validation() -> None:
    def configure(sgd: Any) -> Any:
        return [sgd], [{"scheduler": LambdaLR(sgd, lambda n: 0.5**n), "interval": "validation", "frequency": 2}]

    module = Sane(configure=configure)
    trainer = train(module, 1, LRSchedulerStepping(), val=1, num_sanity_val_steps=1, max_epochs=3)
    assert trainer.progress.validations == 3
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 1


def test_j2_a_resumed_run_has_none_and_steps_no_scheduler_for_it(tmp_path: Any) -> None:
    """The run had its check when it began; updates were made since the scheduler stepped last, and no validation."""

    def configure(sgd: Any) -> Any:
        return [sgd], [{"scheduler": LambdaLR(sgd, lambda n: 0.5**n), "interval": "validation"}]

    path = tmp_path / "checkpoint.pt"
    save = On(train_batch_end=lambda trainer, event: trainer.save_checkpoint(path) if event.batch_idx == 0 else None)
    train(Sane(configure=configure), 2, LRSchedulerStepping(), save, val=1)
    steps: list[int] = []
    look = On(train_start=lambda trainer, event: steps.append(scheduler_steps(trainer)))
    module = Sane(configure=configure)
    trainer = new_trainer(LRSchedulerStepping(), look, num_sanity_val_steps=1)
    trainer.fit(module, batches(2), batches(1), ckpt_path=path)
    assert module.checks == []
    assert steps == [0]
    assert scheduler_steps(trainer) == 1


def test_j2_an_error_in_it_comes_before_training() -> None:
    module = Draws(evaluates=True, fails=True)
    with pytest.raises(RuntimeError, match="mine"):
        train(module, 1, val=1, num_sanity_val_steps=1)
    assert module.drawn == []
    assert not module.trainer.sanity_checking


def test_j2_it_leaves_the_generators_unchanged() -> None:
    after = []
    for steps in (0, 2):
        seeded()
        module = Draws(evaluates=True)
        train(module, 1, val=shuffled(3), num_sanity_val_steps=steps, limit_val_batches=3)
        after.append(module.drawn)
    assert after[0] == after[1]


# ------------------------------------------------------------------ J3: verbs


def epochwise(sgd: Any) -> Any:
    return [sgd], [LambdaLR(sgd, lambda n: 1.0)]


def scheduler_steps(trainer: Any) -> int:
    count: int = trainer.lr_scheduler_configs[0].scheduler.last_epoch
    return count


def test_j3_stop_ends_the_run_after_the_current_batch() -> None:
    stop = On(before_backward=lambda trainer, event: trainer.stop("enough") if trainer.batch_idx == 2 else None)
    module = Evaluates(configure=epochwise)
    order = Recorder("train_batch_end", "train_epoch_end", "train_end", "fit_end", "validation_start", "safe_point")
    trainer = train(module, 5, stop, LRSchedulerStepping(), order, val=1, max_epochs=3)
    assert module.updates == [1.0, 2.0, 3.0]
    assert order.names == [*["train_batch_end", "safe_point"] * 3, "train_epoch_end", "train_end", "fit_end"]
    assert scheduler_steps(trainer) == 0
    assert trainer.current_epoch == 0
    assert trainer.should_stop


def test_j3_stop_waits_for_min_steps_and_min_epochs() -> None:
    stop = On(train_batch_end=lambda trainer, event: trainer.stop("enough"))
    assert train(Probe(), 5, stop, max_epochs=3, min_steps=3).global_step == 3
    assert train(Probe(), 5, stop, max_epochs=3, min_epochs=2).global_step == 10
    force = On(train_batch_end=lambda trainer, event: trainer.stop("now", force=True))
    assert train(Probe(), 5, force, max_epochs=3, min_epochs=2, min_steps=3).global_step == 1


def test_j3_stop_holds_for_one_run() -> None:
    trainer = new_trainer(On(train_batch_end=lambda trainer, event: trainer.stop("enough")), max_epochs=2)
    for _ in range(2):
        trainer.fit(Probe(), batches(3))
        assert trainer.global_step == 1


def test_j3_skip_batch() -> None:
    skip = On(train_batch_start=lambda trainer, event: event.skip_batch() if event.batch_idx == 1 else None)
    recorder = Recorder("before_forward", "before_backward", "optimizer_step_skipped", "train_batch_end")
    module = Probe()
    trainer = train(module, 3, skip, recorder)
    assert module.seen == module.updates == [1.0, 3.0]
    assert recorder.count("before_forward") == recorder.count("before_backward") == 2
    ends = [e for name, e in zip(recorder.names, recorder.events, strict=True) if name == "train_batch_end"]
    assert [(event.batch.item(), event.outputs is None) for event in ends] == [(1.0, False), (2.0, True), (3.0, False)]
    assert trainer.global_step == 2


def test_j3_skip_batch_in_manual_mode() -> None:
    class Manual(Probe):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.seen.append(batch.item())

    module = Manual(automatic=False)
    train(module, 3, On(train_batch_start=lambda trainer, event: event.skip_batch() if event.batch_idx == 1 else None))
    assert module.seen == [1.0, 3.0]


def test_j3_end_epoch_ends_it_after_the_current_batch() -> None:
    end = On(train_batch_end=lambda trainer, event: trainer.end_epoch("enough") if event.batch_idx == 1 else None)
    module = Evaluates(configure=epochwise)
    order, safe = Recorder("validation_start", "train_epoch_end", "train_data_end"), Recorder("safe_point")
    trainer = train(module, 4, end, LRSchedulerStepping(), order, safe, val=1, max_epochs=2)
    assert module.updates == [1.0, 2.0, 1.0, 2.0]
    assert order.names == ["validation_start", "train_epoch_end"] * 2
    assert [event.epoch_end for event in safe.events] == [False, True] * 2
    assert scheduler_steps(trainer) == 0
    assert trainer.current_epoch == 2


def test_j3_end_epoch_before_a_batch() -> None:
    end = On(train_batch_start=lambda trainer, event: event.end_epoch() if event.batch_idx == 2 else None)
    module = Probe()
    trainer = train(module, 4, end, max_epochs=2)
    assert module.seen == module.updates == [1.0, 2.0, 1.0, 2.0]
    assert trainer.current_epoch == 2


def test_j3_a_veto_is_a_verb_of_its_event() -> None:
    veto = On(before_optimizer_step=lambda trainer, event: event.skip("not now") if trainer.batch_idx == 0 else None)
    skipped = Recorder("optimizer_step_skipped")
    module = Probe()
    trainer = train(module, 2, veto, skipped)
    assert module.updates == [2.0]
    assert [event.reason for event in skipped.events] == ["not now"]
    assert trainer.global_step == 1


class ReturnsMinusOne(Evaluates):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


def test_j3_minus_one_from_the_modules_hook_ends_the_training_epoch() -> None:
    module = ReturnsMinusOne(configure=epochwise)
    order = Recorder("validation_start", "train_epoch_start", "train_epoch_end", "train_data_end", "after_update")
    trainer = train(module, 5, LRSchedulerStepping(), order, val=1, max_epochs=2)
    assert module.seen == module.updates == [1.0, 2.0, 1.0, 2.0]
    epoch = ["train_epoch_start", "after_update", "after_update", "validation_start", "train_epoch_end"]
    assert order.names == epoch * 2
    assert scheduler_steps(trainer) == 0
    assert trainer.current_epoch == 2
    assert trainer.global_step == 4


def test_j3_minus_one_in_the_last_batch_steps_no_epoch_scheduler() -> None:
    module = ReturnsMinusOne(configure=epochwise)
    trainer = train(module, 3, LRSchedulerStepping(), val=1, max_epochs=2)
    assert module.updates == [1.0, 2.0, 1.0, 2.0]
    assert scheduler_steps(trainer) == 0


@pytest.mark.parametrize("length", [5, 3], ids=["inside", "in the last batch"])
def test_j3_minus_one_steps_no_monitored_scheduler(length: int) -> None:
    def configure(sgd: Any) -> Any:
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": plateau, "monitor": "value"}}

    class Module(ReturnsMinusOne):
        def on_train_epoch_end(self) -> None:
            self.log("value", 1.0)

    trainer = train(Module(configure=configure), length, LRSchedulerStepping(), max_epochs=2)
    assert scheduler_steps(trainer) == 0


def test_j3_magic_returns_of_callbacks_mean_nothing() -> None:
    class Magic:
        def on_train_batch_start(self, trainer: Any, event: Any) -> int:
            return -1

        def on_before_optimizer_step(self, trainer: Any, event: Any) -> bool:
            return False

    module = Probe()
    trainer = train(module, 3, Magic(), max_epochs=2)
    assert module.updates == [1.0, 2.0, 3.0] * 2
    assert trainer.global_step == 6


@pytest.mark.parametrize("returned", [False, 0, -2, "stop"])
def test_j3_other_returns_of_the_modules_hook_mean_nothing(returned: Any) -> None:
    class Module(Probe):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return returned

    module = Module()
    train(module, 2)
    assert module.updates == [1.0, 2.0]


def test_j3_an_open_window_is_not_flushed_by_minus_one() -> None:
    class Module(Probe):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    module = Module()
    train(module, 5, GradientAccumulation(2), max_epochs=2)
    assert module.updates == [1.5, 1.5]


# ------------------------------------------------------------------ J5: the module's hooks

SIGNATURES: dict[str, tuple[str, ...]] = {
    "prepare_data": (),
    "setup": ("stage",),
    "configure_model": (),
    "configure_callbacks": (),
    "configure_optimizers": (),
    "train_dataloader": (),
    "val_dataloader": (),
    "on_fit_start": (),
    "on_validation_model_eval": (),
    "on_validation_start": (),
    "on_validation_epoch_start": (),
    "on_validation_batch_start": ("batch", "batch_idx", "dataloader_idx"),
    "on_validation_batch_end": ("outputs", "batch", "batch_idx", "dataloader_idx"),
    "on_validation_epoch_end": (),
    "on_validation_end": (),
    "on_validation_model_train": (),
    "on_train_start": (),
    "on_train_epoch_start": (),
    "on_before_batch_transfer": ("batch", "dataloader_idx"),
    "transfer_batch_to_device": ("batch", "device", "dataloader_idx"),
    "on_after_batch_transfer": ("batch", "dataloader_idx"),
    "on_train_batch_start": ("batch", "batch_idx"),
    "optimizer_step": ("epoch", "batch_idx", "optimizer", "optimizer_closure"),
    "on_before_zero_grad": ("optimizer",),
    "optimizer_zero_grad": ("epoch", "batch_idx", "optimizer"),
    "on_before_backward": ("loss",),
    "backward": ("loss",),
    "on_after_backward": (),
    "on_before_optimizer_step": ("optimizer",),
    "configure_gradient_clipping": ("optimizer", "gradient_clip_val", "gradient_clip_algorithm"),
    "lr_scheduler_step": ("scheduler", "metric"),
    "on_train_batch_end": ("outputs", "batch", "batch_idx"),
    "on_train_epoch_end": (),
    "on_train_end": (),
    "on_fit_end": (),
    "teardown": ("stage",),
}
"""Lightning's hooks of a fit and their arguments."""


def hooked() -> tuple[Any, list[str], dict[str, tuple[Any, ...]]]:
    """Return a module that overrides every hook with exactly Lightning's arguments, and returns the result of the default; its
    calls; and the arguments of each hook."""
    calls: list[str] = []
    arguments_of: dict[str, tuple[Any, ...]] = {}

    class Module(Sane):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            calls.append("training_step")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            calls.append("validation_step")

        def train_dataloader(self) -> Any:
            return batches(1)

        def val_dataloader(self) -> Any:
            return batches(1)

        def on_validation_model_eval(self) -> None:
            self.eval()

    def override(hook: str, arguments: tuple[str, ...]) -> None:
        inherited = getattr(Module, hook)

        def called(self: Any, *args: Any) -> Any:
            calls.append(hook)
            arguments_of[hook] = args
            return inherited(self, *args)

        # Exactly the arguments of Lightning's signature, by position.
        namespace: dict[str, Any] = {"called": called}
        named = ", ".join(("self", *arguments))
        exec(f"def {hook}({named}): return called({named})", namespace)
        setattr(Module, hook, namespace[hook])

    for hook, arguments in SIGNATURES.items():
        override(hook, arguments)

    def configure(sgd: Any) -> Any:
        return [sgd], [{"scheduler": LambdaLR(sgd, lambda n: 1.0), "interval": "step"}]

    return Module(configure=configure), calls, arguments_of


FETCH = ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"]
VALIDATION = [
    "on_validation_model_eval", "on_validation_start", "on_validation_epoch_start", *FETCH, "on_validation_batch_start",
    "validation_step", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end", "on_validation_model_train",
]  # fmt: skip
BATCH = [
    *FETCH, "on_train_batch_start", "optimizer_step", "training_step", "on_before_zero_grad", "optimizer_zero_grad",
    "on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping",
    "lr_scheduler_step", "on_train_batch_end",
]  # fmt: skip


def test_j5_the_modules_hooks_keep_lightnings_names_signatures_and_order() -> None:
    module, calls, _ = hooked()
    new_trainer(LRSchedulerStepping(), num_sanity_val_steps=1).fit(module)
    run = [call for call in calls if not call.endswith("dataloader")]
    assert run == [
        "configure_callbacks", "prepare_data", "setup", "configure_model", "configure_optimizers", "on_fit_start", *VALIDATION,
        "on_train_start", "on_train_epoch_start", *BATCH, *VALIDATION, "on_train_epoch_end", "on_train_end", "on_fit_end",
        "teardown",
    ]  # fmt: skip


def test_j5_the_hooks_get_lightnings_arguments() -> None:
    module, _, arguments_of = hooked()
    trainer = new_trainer(LRSchedulerStepping(), num_sanity_val_steps=0)
    trainer.fit(module)
    (optimizer,) = trainer.optimizers
    x = torch.tensor(1.0)
    assert arguments_of["setup"] == arguments_of["teardown"] == ("fit",)
    assert arguments_of["on_train_batch_start"] == (x, 0)
    assert arguments_of["on_train_batch_end"] == ({"loss": torch.tensor(0.0)}, x, 0)
    assert arguments_of["on_before_zero_grad"] == arguments_of["on_before_optimizer_step"] == (optimizer,)
    assert arguments_of["optimizer_zero_grad"] == (0, 0, optimizer)
    assert arguments_of["optimizer_step"][:3] == (0, 0, optimizer)
    assert callable(arguments_of["optimizer_step"][3])
    assert arguments_of["on_before_backward"][0].item() == 0.0
    assert arguments_of["configure_gradient_clipping"] == (optimizer, None, None)
    assert arguments_of["lr_scheduler_step"] == (trainer.lr_scheduler_configs[0].scheduler, None)
    assert arguments_of["on_validation_batch_start"] == (x, 0, 0)
    assert arguments_of["on_validation_batch_end"] == (None, x, 0, 0)
    assert arguments_of["transfer_batch_to_device"] == (x, torch.device("cpu"), 0)


def test_j5_callbacks_come_before_the_module() -> None:
    calls: list[str] = []

    class Module(Probe):
        def on_train_start(self) -> None:
            calls.append("module")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            calls.append("module")

        def configure_callbacks(self) -> Any:
            return [
                On(train_start=lambda t, e: calls.append("its own"), before_optimizer_step=lambda t, e: calls.append("its own"))
            ]

    def attached(name: str) -> On:
        return On(train_start=lambda t, e: calls.append(name), before_optimizer_step=lambda t, e: calls.append(name))

    train(Module(), 1, attached("first"), attached("second"))
    assert calls == ["first", "second", "its own", "module"] * 2


def calling(hook: str, calls: list[str]) -> Callable[..., None]:
    def method(self: Any, *args: Any) -> None:
        calls.append(hook)
        self.eval()  # as the default of the hooks that switch the mode

    return method


def test_j5_test_and_predict_have_hooks_too() -> None:
    for stage in ("test", "predict"):
        calls: list[str] = []

        class Module(Evaluates):
            pass

        hooks = ["model_eval", "start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end", "model_train"]
        for hook in [f"on_{stage}_{part}" for part in hooks]:
            setattr(Module, hook, calling(hook, calls))
        getattr(new_trainer(), stage)(Module(), batches(1))
        assert calls == [f"on_{stage}_{part}" for part in hooks]


def test_j5_events_without_a_counterpart_come_as_events() -> None:
    class Module(Probe):
        def on_after_update(self, event: Any) -> None:
            self.seen.append(event.global_step)

    module = Module()
    train(module, 2)
    assert module.seen == [1.0, 1, 2.0, 2]


# ------------------------------------------------------------------ J4: several processes decide alike


class TwoProcesses(FakeProcesses):
    """The first of two processes. Of the two flags at a batch's start, only the first, whether it is skipped, is a question."""

    def any_of(self, flags: list[bool]) -> list[bool]:
        return [self.any(flags[0]), flags[1]] if len(flags) == 2 else flags


def train_in_two_processes(
    module: Probe, count: int, *callbacks: Any, elsewhere: Collection[int] = ()
) -> tuple[Trainer, TwoProcesses]:
    """Train as one of two processes; the other says yes to the questions with these numbers."""
    processes = TwoProcesses(elsewhere=lambda question: question in elsewhere)
    trainer = new_trainer(*callbacks)
    trainer.processes = processes
    trainer.fit(module, batches(count))
    return trainer, processes


@pytest.mark.parametrize("here", [True, False], ids=["in this process", "in another"])
def test_j4_a_none_loss_in_a_closing_batch_is_an_error_in_all_processes(here: bool) -> None:
    module = Probe(nothing_for={1.0} if here else set())
    backwards = Recorder("before_backward")
    with pytest.raises(MisconfigurationError, match=r"no loss in a process in batch 0.*'weight': 0"):
        train_in_two_processes(module, 2, backwards, elsewhere=() if here else {0})
    assert backwards.events == [], "before a backward that would wait for the other processes"


def test_j4_a_none_loss_in_a_batch_that_only_accumulates_does_not_concern_the_others() -> None:
    module = Probe(nothing_for={1.0})
    train_in_two_processes(module, 2, GradientAccumulation(2))
    assert module.updates == [2.0]


def test_j4_a_veto_holds_in_all_processes() -> None:
    """The questions in turn: is there no loss anywhere, is there a veto anywhere."""
    module, skips = Probe(), Recorder("optimizer_step_skipped")
    trainer, processes = train_in_two_processes(module, 3, skips, elsewhere={3})
    assert module.updates == [1.0, 3.0] and trainer.global_step == 2
    assert [event.reason for event in skips.events] == ["another process's veto"]
    assert processes.flags == [False] * 6


def test_j4_a_skipped_batch_is_skipped_in_all_processes() -> None:
    """The questions in turn: is the batch skipped anywhere, and if not, is there no loss, is there a veto."""
    module = Probe()
    silent = On(train_batch_start=lambda trainer, event: None)
    trainer, _ = train_in_two_processes(module, 3, silent, elsewhere={3})
    assert module.updates == [1.0, 3.0] and trainer.global_step == 2


@pytest.mark.parametrize("part", ["the run", "the epoch"])
def test_j4_an_end_that_another_process_asks_for_holds_in_all_processes(part: str) -> None:
    class Asks(FakeProcesses):
        """The other process asks in its first batch, so that its request holds at the end of the second."""

        ends = 0

        def agree(self, flags: list[bool], place: Place) -> list[bool]:
            self.ends += place == "batch_end"
            holds = place == "batch_end" and self.ends == 2
            return [flag or (holds and at == (0 if part == "the run" else 3)) for at, flag in enumerate(flags)]

    module = Probe()
    trainer = new_trainer()
    trainer.processes = Asks()
    trainer.fit(module, batches(4))
    assert module.updates == [1.0, 2.0]
    assert trainer.current_epoch == (0 if part == "the run" else 1)
    assert (trainer.stop_reason == "another process asked for it") == (part == "the run")
