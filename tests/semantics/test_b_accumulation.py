"""B. Gradient accumulation: windows, their batches, and how they end."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from eventtrain import MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping
from tests.kit import NoLength, On, Probe, Recorder, batches, gradient, train
from tests.reference import backward
from tests.resuming import assert_same
from tests.semantics.modules import Regression, Weighted, regression_data, weighted


def windows_of(module: Probe, trainer_arguments: dict[str, Any], accumulation: GradientAccumulation, xs: Any) -> list[int]:
    """Train, and return how many batches each update accumulated."""
    sizes: list[int] = []
    seen = 0

    def note(trainer: Any, event: Any) -> None:
        nonlocal seen
        sizes.append(len(module.seen) - seen)
        seen = len(module.seen)

    train(module, xs, accumulation, On(after_update=note), **trainer_arguments)
    return sizes


# ------------------------------------------------------------------ B1: batches per window


def test_b1_no_accumulation_is_the_default() -> None:
    module = Probe()
    train(module, 3)
    assert module.updates == [1.0, 2.0, 3.0]


def test_b1_a_number() -> None:
    assert windows_of(Probe(), {}, GradientAccumulation(7), 21) == [7, 7, 7]


def test_b1_the_schedule_of_the_guide() -> None:
    sizes = windows_of(Probe(), {"max_epochs": 10}, GradientAccumulation({0: 8, 4: 4, 8: 1}), 8)
    assert sizes == [8] * 4 + [4] * 8 + [1] * 16


def test_b1_a_schedule_holds_the_largest_key_not_above_the_epoch() -> None:
    assert windows_of(Probe(), {"max_epochs": 4}, GradientAccumulation({2: 1, 0: 2}), 4) == [2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]


def test_b1_a_function_of_the_trainer() -> None:
    policy = GradientAccumulation(lambda trainer: 1 if trainer.global_step < 2 else 3)
    assert windows_of(Probe(), {}, policy, 8) == [1, 1, 3, 3]


def test_b1_a_subclass_overrides_the_policy() -> None:
    class Warmup(GradientAccumulation):
        def batches_per_step(self, trainer: Any) -> int:
            return 1 if trainer.global_step < 2 else 3

    assert windows_of(Probe(), {}, Warmup(8), 8) == [1, 1, 3, 3]


def test_b1_unit_epoch_is_the_default() -> None:
    assert GradientAccumulation(1).unit == "epoch"


def test_b1_unit_step_counts_updates() -> None:
    assert windows_of(Probe(), {}, GradientAccumulation({0: 2, 3: 1}, unit="step"), 8) == [2, 2, 2, 1, 1]
    assert windows_of(Probe(), {"max_epochs": 2}, GradientAccumulation({0: 1, 3: 2}, unit="step"), 5) == [1, 1, 1, 2, 2, 2, 1]


def test_b1_unit_batch_counts_the_batches_of_the_run() -> None:
    assert windows_of(Probe(), {"max_epochs": 2}, GradientAccumulation({0: 2, 6: 1}, unit="batch"), 5) == [2, 2, 1, 2, 1, 1, 1]


def test_b1_a_size_changes_only_at_the_start_of_a_window() -> None:
    # The key 1 falls into the first window, the key 5 into the second.
    policy = GradientAccumulation({0: 3, 1: 4, 5: 1}, unit="batch")
    module = Probe()
    assert windows_of(module, {}, policy, 9) == [3, 4, 1, 1]
    assert module.updates == [2.0, 5.5, 8.0, 9.0], "each gradient is the mean over its own window"


def test_b1_a_function_is_asked_at_the_start_of_each_window_only() -> None:
    asked: list[int] = []

    def policy(trainer: Any) -> int:
        asked.append(trainer.batch_idx)
        return 3

    train(Probe(), 7, GradientAccumulation(policy))
    assert asked == [0, 3, 6]


@pytest.mark.parametrize("unit", ["epoch", "step", "batch"])
def test_b1_a_schedule_that_does_not_start_at_0_is_an_error(unit: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"starts at 2.*Add the key 0"):
        GradientAccumulation({2: 4, 5: 1}, unit=unit)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", None])
def test_b1_a_value_under_1_is_an_error(value: Any) -> None:
    with pytest.raises(MisconfigurationError, match="whole number from 1"):
        GradientAccumulation(value)
    with pytest.raises(MisconfigurationError, match="whole number from 1"):
        GradientAccumulation({0: 2, 4: value})


@pytest.mark.parametrize("value", [0, -1, 2.0, "4", None])
def test_b1_a_value_under_1_from_a_function_is_an_error(value: Any) -> None:
    with pytest.raises(MisconfigurationError, match="whole number from 1"):
        train(Probe(), 3, GradientAccumulation(lambda trainer: value))


@pytest.mark.parametrize("schedule", [{}, {-1: 2, 0: 1}, {0.5: 2, 0: 1}])
def test_b1_a_schedule_with_other_keys_is_an_error(schedule: Any) -> None:
    with pytest.raises(MisconfigurationError, match="schedule"):
        GradientAccumulation(schedule)


@pytest.mark.parametrize("option", [{"unit": "epochs"}, {"remainder": "flush"}, {"normalize": "mean"}])
def test_b1_an_unknown_option_is_an_error_that_lists_the_known(option: Any) -> None:
    known = {"unit": "'step'", "remainder": "'carry'", "normalize": "'fixed'"}
    (name,) = option
    with pytest.raises(MisconfigurationError, match=f"(?s){name}.*{known[name]}"):
        GradientAccumulation(2, **option)


# ------------------------------------------------------------------ B2: the epoch's end


@pytest.mark.parametrize("loader", [5, NoLength(batches(5))], ids=["sized", "unsized"])
def test_b2_windows_do_not_straddle_epochs(loader: Any) -> None:
    module = Probe()
    trainer = train(module, loader, GradientAccumulation(2), max_epochs=2)
    assert module.updates == [1.5, 3.5, 5.0] * 2 and trainer.global_step == 6


@pytest.mark.parametrize("loader", [5, NoLength(batches(5))], ids=["sized", "unsized"])
def test_b2_drop_discards_the_last_window(loader: Any) -> None:
    class Logging(Probe):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", batch, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    module = Logging()
    recorder = Recorder("train_batch_end")
    trainer = train(module, loader, GradientAccumulation(2, remainder="drop"), recorder, max_epochs=2)
    assert module.updates == [1.5, 3.5] * 2, "the surplus of an epoch is not in the next one's first window"
    assert trainer.global_step == 4
    assert module.seen == [1.0, 2.0, 3.0, 4.0, 5.0] * 2 and recorder.count("train_batch_end") == 10, "the surplus runs"
    assert trainer.callback_metrics["x"].item() == 3.0, "the surplus logs"


@pytest.mark.parametrize("loader", [3, NoLength(batches(3))], ids=["sized", "unsized"])
@pytest.mark.parametrize("windows", [4, {0: 1, 1: 4}, lambda trainer: 4], ids=["number", "schedule", "function"])
def test_b2_drop_with_an_epoch_shorter_than_the_window_is_an_error(windows: Any, loader: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"3 batches.*4.*drop"):
        train(Probe(), loader, GradientAccumulation(windows, remainder="drop"), max_epochs=2)


def test_b2_drop_ignores_windows_that_the_run_never_has() -> None:
    module = Probe()
    train(module, 3, GradientAccumulation({0: 2, 9: 4}, remainder="drop"), max_epochs=2)
    assert module.updates == [1.5, 1.5]


def test_b2_carry_continues_in_the_next_epoch() -> None:
    module = Probe()
    trainer = train(module, 3, GradientAccumulation(2, remainder="carry"), max_epochs=3)
    # (1, 2) (3, 1) (2, 3) (1, 2), and 3 is left open
    assert module.updates == [1.5, 2.0, 2.5, 1.5] and trainer.global_step == 4


def test_b2_carry_over_several_epochs() -> None:
    module = Probe()
    train(module, 2, GradientAccumulation(5, remainder="carry"), max_epochs=5)
    assert module.updates == [pytest.approx(7 / 5), pytest.approx(8 / 5)]  # (1 2 1 2 1) (2 1 2 1 2)


def test_b2_carry_keeps_the_size_of_the_window_that_it_began_with() -> None:
    module = Probe()
    train(module, 4, GradientAccumulation({0: 3, 1: 2}, remainder="carry"), max_epochs=2)
    assert module.updates == [2.0, pytest.approx(7 / 3), 3.5]  # (1, 2, 3) (4, 1, 2) (3, 4)


def test_b2_a_carried_window_is_untouched_by_epoch_schedulers_and_validation() -> None:
    class Validating(Probe):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert self.w.grad is not None, "the open window's gradients are there"

    def configure(sgd: Any) -> Any:
        return [sgd], [LambdaLR(sgd, lambda epoch: 0.5**epoch)]

    module = Validating(configure=configure)
    trainer = train(module, 3, GradientAccumulation(2, remainder="carry"), LRSchedulerStepping(), val=2, max_epochs=3)
    assert module.updates == [1.5, 2.0, 2.5, 1.5]
    assert module.rates == [1.0, 0.5, 0.5, 0.25]
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3


def test_b2_an_open_window_is_dropped_at_the_end_of_the_run() -> None:
    module = Probe()
    trainer = train(module, 3, GradientAccumulation(2, remainder="carry"))
    assert module.updates == [1.5] and trainer.global_step == 1 and module.w.item() == -1.5


@pytest.mark.parametrize("end_at", [0, 1, 2])
def test_b2_a_carried_window_does_not_count_a_batch_that_ended_its_epoch_before_it_was_trained(end_at: int) -> None:
    class Ending(Probe):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 and batch_idx == end_at else None

    module = Ending()
    train(module, 4, GradientAccumulation(2, remainder="carry"), max_epochs=2)
    expected = {0: [1.5, 3.5], 1: [1.0, 2.5], 2: [1.5, 1.5, 3.5]}
    assert module.updates == expected[end_at]


@pytest.mark.parametrize("remainder", ["step", "drop", "carry"])
@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_b2_stop_never_flushes_a_window(remainder: Any, stop_at: int) -> None:
    module = Probe()
    stop = On(train_batch_end=lambda trainer, event: trainer.stop("enough") if event.batch_idx + 1 == stop_at else None)
    trainer = train(module, 5, GradientAccumulation(2, remainder=remainder), stop, max_epochs=2)
    assert module.updates == {1: [], 2: [1.5], 3: [1.5]}[stop_at]
    assert len(module.seen) == stop_at and trainer.current_epoch == 0


def test_b2_stop_during_the_batch_that_closes_a_window_lets_it_close() -> None:
    module = Probe()
    stop = On(train_batch_start=lambda trainer, event: trainer.stop("enough") if event.batch_idx == 3 else None)
    train(module, 5, GradientAccumulation(2), stop)
    assert module.updates == [1.5, 3.5]


def test_b2_end_epoch_never_flushes_a_window() -> None:
    module = Probe()
    end = On(train_batch_end=lambda trainer, event: trainer.end_epoch("short") if event.batch_idx == 2 else None)
    train(module, 5, GradientAccumulation(2), end, max_epochs=2)
    assert module.updates == [1.5, 1.5]


@pytest.mark.parametrize("remainder", ["step", "carry"])
def test_b2_a_skipped_closing_batch_still_closes_its_window(remainder: Any) -> None:
    module = Probe()
    skip = On(train_batch_start=lambda trainer, event: event.skip_batch() if event.batch.item() in (2.0, 5.0) else None)
    trainer = train(module, 5, GradientAccumulation(2, remainder=remainder), skip, max_epochs=1)
    assert module.updates == [1.0, 3.5] and trainer.global_step == 2


def test_b2_a_skipped_last_batch_closes_a_longer_short_window() -> None:
    module = Probe()
    skip = On(train_batch_start=lambda trainer, event: event.skip_batch() if event.is_last_batch else None)
    train(module, 5, GradientAccumulation(3), skip)
    assert module.updates == [2.0, 4.0]


# ------------------------------------------------------------------ B3: the mean


def test_b3_the_mean_is_over_the_batches_that_are_in_the_window() -> None:
    module = Probe()
    train(module, 5, GradientAccumulation(2))
    assert module.updates == [1.5, 3.5, 5.0] and module.w.item() == -10.0


def test_b3_fixed_always_divides_by_n() -> None:
    module = Probe()
    train(module, 5, GradientAccumulation(2, normalize="fixed"))
    assert module.updates == [1.5, 3.5, 2.5] and module.w.item() == -7.5


@pytest.mark.parametrize("normalize", ["window", "fixed"])
def test_b3_no_look_ahead_is_needed(normalize: Any) -> None:
    fetched: list[float] = []

    class Loader:
        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Any:
            for x in batches(5):
                fetched.append(x.item())
                yield x

    module = Probe()
    behind: list[int] = []
    train(
        module,
        Loader(),
        GradientAccumulation(2, normalize=normalize),
        On(train_batch_end=lambda trainer, event: behind.append(len(fetched) - len(module.seen))),
    )
    assert module.updates[-1] == (5.0 if normalize == "window" else 2.5)
    assert behind == [0] * 5, "no batch is read before its turn"


def test_b3_a_short_window_is_rescaled_at_gradients_ready() -> None:
    before: list[float] = []
    after: list[float] = []
    module = Probe()
    train(
        module,
        5,
        GradientAccumulation(2),
        On(
            unscale_gradients=lambda trainer, event: before.append(gradient(module.w).item()),
            before_optimizer_step=lambda trainer, event: after.append(gradient(module.w).item()),
        ),
    )
    assert before == [1.5, 3.5, 2.5] and after == [1.5, 3.5, 5.0]


def test_b3_full_windows_are_not_touched() -> None:
    versions: list[int] = []
    module = Probe()
    note = On(
        unscale_gradients=lambda trainer, event: versions.append(-gradient(module.w)._version),
        before_optimizer_step=lambda trainer, event: versions.append(gradient(module.w)._version + versions.pop()),
    )
    train(module, 5, GradientAccumulation(2), note)
    assert versions == [0, 0, 1], "only the short window's gradients were written to"


def test_b3_backward_runs_on_a_quotient() -> None:
    """A product with the rounded 1 / 3 differs from it in the last bit."""
    module = Probe(lr=0.0)
    module.w.data.fill_(1.0)
    recorder = Recorder("before_backward")
    train(module, [5.0] * 3, GradientAccumulation(3), recorder)
    assert torch.tensor(5.0) / 3 != torch.tensor(5.0) * (1 / 3)
    assert all(torch.equal(event.loss, torch.tensor(5.0) / 3) for event in recorder.events)


def test_b3_clipping_comes_after_normalisation() -> None:
    module = Probe()
    train(module, 5, GradientClipping(2.0, "value"), GradientAccumulation(2))
    assert module.updates == [1.5, 2.0, 2.0]


@pytest.mark.parametrize("normalize", ["window", "fixed"])
@pytest.mark.parametrize("window", [2, 3, 4])
def test_b3_equals_the_hand_written_loop(window: int, normalize: Any) -> None:
    module = Regression()
    model = copy.deepcopy(module)
    trainer = train(module, regression_data(7), GradientAccumulation(window, normalize=normalize), max_epochs=3)

    optimizer = AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        data = regression_data(7)
        for start in range(0, 7, window):
            inside = data[start : start + window]
            optimizer.zero_grad()
            for batch in inside:
                backward(model.loss(batch) / window)
            if normalize == "window" and len(inside) != window:
                for parameter in model.parameters():
                    gradient(parameter).mul_(window / len(inside))
            optimizer.step()
    assert_same(dict(module.state_dict()), dict(model.state_dict()), "module")
    state, expected = trainer.optimizers[0].state_dict()["state"], optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][name], expected[i][name]) for i in expected for name in expected[i])


# ------------------------------------------------------------------ B5: distributed runs


@pytest.mark.parametrize(
    ("remainder", "closing"), [("step", [0, 1, 0, 1, 1]), ("drop", [0, 1, 0, 1, 0]), ("carry", [0, 1, 0, 1, 0])]
)
def test_b5_forward_says_which_batch_closes_its_window(remainder: Any, closing: list[int]) -> None:
    recorder = Recorder("before_forward")
    train(Probe(), 5, GradientAccumulation(2, remainder=remainder), recorder)
    assert [int(event.closes_window) for event in recorder.events] == closing


def test_b5_without_accumulation_every_batch_closes_its_window() -> None:
    recorder = Recorder("before_forward")
    train(Probe(), 3, recorder)
    assert [event.closes_window for event in recorder.events] == [True] * 3


class Caller(nn.Module):
    """The module that DDP wraps: its forward calls another module's step."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: Any, *args: Any) -> Any:
        return step(*args)


class Synchronised:
    """Puts torch's DDP around the step, and records the all-reduced gradients."""

    def __init__(self) -> None:
        self.reduced: list[float] = []

    def on_setup(self, trainer: Any, event: Any) -> None:
        self.ddp = nn.parallel.DistributedDataParallel(Caller(trainer.module))
        self.ddp.register_comm_hook(None, self.reduce)

    def reduce(self, state: Any, bucket):  # type: ignore[no-untyped-def] # torch checks annotations
        self.reduced.append(bucket.buffer().item())
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def on_before_forward(self, trainer: Any, event: Any) -> None:
        if not event.closes_window:
            event.enter(self.ddp.no_sync())
        event.call = self.ddp


def test_b5_gradients_are_synchronised_once_per_window(tmp_path: Any) -> None:
    store = FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module, ddp = Probe(), Synchronised()
        trainer = train(module, 5, GradientAccumulation(2), ddp, max_epochs=2)
        assert module.updates == [1.5, 3.5, 5.0] * 2
        assert len(ddp.reduced) == trainer.global_step == 6
        assert ddp.reduced == [1.5, 3.5, 2.5] * 2, "complete windows, before short ones are rescaled"
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------ B6: epochs shorter than a window


@pytest.mark.parametrize("loader", [2, NoLength(batches(2))], ids=["sized", "unsized"])
@pytest.mark.parametrize("windows", [4, {0: 4}, lambda trainer: 4], ids=["number", "schedule", "function"])
def test_b6_an_epoch_shorter_than_the_window_warns_once(windows: Any, loader: Any) -> None:
    module = Probe()
    with pytest.warns(UserWarning, match="2 batches and a window 4") as caught:
        train(module, loader, GradientAccumulation(windows), max_epochs=3)
    assert len(caught) == 1
    assert module.updates == [1.5] * 3


@pytest.mark.parametrize("windows", [2, {0: 1, 1: 2}, {0: 2, 9: 4}], ids=["as-long", "schedule", "never-reached"])
def test_b6_no_warning_if_no_epoch_is_too_short(windows: Any) -> None:
    module = Probe()
    train(module, 2, GradientAccumulation(windows), max_epochs=2)  # a warning would be an error
    assert module.updates[-1] == 1.5


# ------------------------------------------------------------------ B7: validation within an epoch


class Validating(Probe):
    """Validates with the loss, as modules do."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


@pytest.mark.parametrize("window", [2, 3, 4])
def test_b7_validation_never_touches_an_open_window(window: int) -> None:
    expected, module = Probe(), Validating()
    train(expected, 6, GradientAccumulation(window))
    train(module, 6, GradientAccumulation(window), val=2, val_check_interval=1)
    assert module.updates == expected.updates and torch.equal(module.w, expected.w)


class ByHand(Validating):
    """Accumulates by hand over four batches."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 4)
        if (batch_idx + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()


def test_b7_in_manual_mode_either() -> None:
    module = ByHand(automatic=False)
    train(module, 4, val=2, val_check_interval=2)
    assert module.updates == [2.5]


def test_b7_the_hook_that_zeroes_for_validation_waits_for_the_window() -> None:
    called: list[int] = []

    class Zeroing(Validating):
        def on_validation_model_zero_grad(self) -> None:
            called.append(len(self.seen))
            self.zero_grad()

    module = Zeroing()
    train(module, 5, GradientAccumulation(2), val=1, val_check_interval=1)
    assert module.updates == [1.5, 3.5, 5.0] and called == [2, 4, 5]


def test_b7_an_epoch_that_ends_before_a_batch_leaves_a_carried_window_open() -> None:
    class Ending(Validating):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 and batch_idx == 1 else None

        def on_validation_model_zero_grad(self) -> None:
            self.zero_grad()

    module = Ending()
    recorder = Recorder("safe_point")
    train(module, 4, GradientAccumulation(2, remainder="carry"), recorder, val=1, max_epochs=2)
    assert recorder.events[1].epoch_end and recorder.events[1].window_open
    assert module.updates == [1.0, 2.5]


# ------------------------------------------------------------------ properties


def hand_written(
    length: int, epochs: int, size: Any, *, unit: str, remainder: str, normalize: str, max_steps: int | None
) -> tuple[torch.Tensor, int]:
    """Run the obvious hand-written loop, and return the weight and the number of updates."""
    w = torch.zeros(1, requires_grad=True)
    optimizer = SGD([w], lr=0.1, momentum=0.5)
    updates = batches_done = in_window = window = 0
    for epoch in range(epochs):
        if remainder != "carry":
            in_window = 0
        for index in range(length):
            if in_window == 0:
                window = size({"epoch": epoch, "step": updates, "batch": batches_done}[unit])
                optimizer.zero_grad()
            backward((w * float(index + 1)).sum() / window)
            in_window += 1
            batches_done += 1
            if in_window == window or (remainder == "step" and index == length - 1):
                if normalize == "window" and in_window != window:
                    w.grad.mul_(window / in_window)  # type: ignore[union-attr]
                optimizer.step()
                updates += 1
                in_window = 0
                if updates == max_steps:
                    return w.detach(), updates
    return w.detach(), updates


schedules = st.dictionaries(st.integers(1, 6), st.integers(1, 5), max_size=3).flatmap(
    lambda later: st.integers(1, 5).map(lambda first: {0: first, **later})
)


class Momentum(Probe):
    """The probe with an optimizer that remembers, so that the order of updates matters."""

    estimated = -1

    def configure_optimizers(self) -> Any:
        self.estimated = self.trainer.estimated_stepping_batches
        return self.watch(SGD([self.w], lr=0.1, momentum=0.5))


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(
    schedule=schedules,
    as_function=st.booleans(),
    unit=st.sampled_from(["epoch", "step", "batch"]),
    remainder=st.sampled_from(["step", "drop", "carry"]),
    normalize=st.sampled_from(["window", "fixed"]),
    length=st.integers(1, 9),
    epochs=st.integers(1, 4),
    limit=st.none() | st.integers(1, 9),
    max_steps=st.none() | st.integers(1, 12),
)
def test_b_property_windows_equal_the_hand_written_loop(
    schedule: Any,
    as_function: bool,
    unit: Any,
    remainder: Any,
    normalize: Any,
    length: int,
    epochs: int,
    limit: int | None,
    max_steps: int | None,
) -> None:
    def size(count: int) -> int:
        length: int = schedule[max(key for key in schedule if key <= count)]
        return length

    used = length if limit is None else min(limit, length)
    counter = {"epoch": "current_epoch", "step": "global_step", "batch": "total_batch_idx"}[unit]
    batches_ = (lambda trainer: size(getattr(trainer, counter))) if as_function else schedule
    module = Momentum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an epoch shorter than the window
        try:
            trainer = train(
                module,
                length,
                GradientAccumulation(batches_, unit=unit, remainder=remainder, normalize=normalize),
                max_epochs=epochs,
                limit_train_batches=limit,
                max_steps=max_steps,
            )
        except MisconfigurationError:
            if remainder == "drop" and max(schedule.values()) > used:
                return  # an epoch shorter than the window
            raise
    arguments = {"unit": unit, "remainder": remainder, "normalize": normalize, "max_steps": max_steps}
    w, updates = hand_written(used, epochs, size, **arguments)
    assert trainer.global_step == len(module.updates) == updates
    assert torch.equal(module.w, w)
    assert module.estimated == trainer.estimated_stepping_batches == updates


@pytest.mark.filterwarnings("ignore:Nothing was trained in epoch")
@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(
    window=st.integers(1, 4),
    remainder=st.sampled_from(["step", "drop", "carry"]),
    nothing=st.sets(st.integers(1, 8)),
    skipped=st.sets(st.integers(1, 8)),
    length=st.integers(4, 8),
    epochs=st.integers(1, 3),
)
def test_b_property_batches_without_a_loss_only_lower_the_number_of_contributions(
    window: int, remainder: Any, nothing: set[int], skipped: set[int], length: int, epochs: int
) -> None:
    module = Probe(nothing_for=map(float, nothing))
    skip = On(train_batch_start=lambda trainer, event: event.skip_batch() if int(event.batch) in skipped else None)
    trainer = train(module, length, GradientAccumulation(window, remainder=remainder), skip, max_epochs=epochs)
    xs: list[list[int]] = []
    for epoch in range(epochs):
        if epoch == 0 or remainder != "carry":
            xs.append([])
        for x in range(1, length + 1):
            if len(xs[-1]) == window:
                xs.append([])
            xs[-1].append(x)
        if remainder == "drop" and len(xs[-1]) < window:
            xs.pop()
    if remainder == "carry" and len(xs[-1]) < window:
        xs.pop()
    contributed = [[x for x in inside if x not in nothing | skipped] for inside in xs]
    expected = [sum(inside) / len(inside) for inside in contributed if inside]
    assert module.updates == pytest.approx(expected, rel=1e-6)
    assert trainer.global_step == len(expected) <= trainer.estimated_stepping_batches


@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(
    weights=st.lists(st.integers(1, 64), min_size=3, max_size=8),
    window=st.integers(1, 3),
    remainder=st.sampled_from(["step", "drop", "carry"]),
)
def test_b_property_weights(weights: list[int], window: int, remainder: Any) -> None:
    module = Weighted()
    pairs = [(float(i + 1), weight) for i, weight in enumerate(weights)]
    train(module, weighted(*pairs), GradientAccumulation(window, remainder=remainder))
    full = [pairs[start : start + window] for start in range(0, len(pairs), window)]
    inside = [each for each in full if len(each) == window or remainder == "step"]
    expected = [sum(x * weight for x, weight in each) / sum(weight for _, weight in each) for each in inside]
    assert module.updates == pytest.approx(expected, rel=1e-6)
