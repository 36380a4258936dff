"""C. Gradient clipping: its order, its thresholds, the module's hook."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import GradientAccumulation, GradientClipping, MixedPrecision
from tests.kit import On, Probe, Recorder, gradient, train
from tests.reference import backward


def scaled_by_1024() -> MixedPrecision:
    return MixedPrecision("fp16", scaler=GradScaler("cpu", init_scale=1024.0))


def clipped_to(norm: float, *gradients: float, norm_type: float = 2.0) -> list[float]:
    """Return gradients as torch's own clipping leaves them."""
    parameter = nn.Parameter(torch.zeros(len(gradients)))
    parameter.grad = torch.tensor(gradients)
    nn.utils.clip_grad_norm_([parameter], norm, norm_type=norm_type)
    return parameter.grad.tolist()


# ------------------------------------------------------------------ C1: the order


ORDER = [
    *("after_backward", "reduce_gradients", "unscale_gradients", "gradients_ready"),
    *("before_optimizer_step", "before_gradient_clipping", "after_gradient_clipping", "after_optimizer_step"),
]


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_c1_the_order_is_fixed_wherever_clipping_is_attached(place: int) -> None:
    recorder = Recorder(*reversed(ORDER))
    callbacks: list[Any] = [recorder, GradientAccumulation(1), scaled_by_1024()]
    callbacks.insert(place, GradientClipping(1.0))
    train(Probe(), 2, *callbacks)
    assert recorder.names == ORDER * 2


def test_c1_gradients_are_complete_unscaled_and_unclipped_at_before_optimizer_step() -> None:
    class Watching(Probe):
        hook: list[float] = []

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert optimizer is self.optimizers()
            self.hook.append(gradient(self.w).item())

    module = Watching()
    at: dict[str, list[float]] = {name: [] for name in ORDER[1:]}
    note = On(**{name: lambda trainer, event, name=name: at[name].append(gradient(module.w).item()) for name in at})
    train(module, [1.0, 2.0, 5.0], GradientClipping(1.0, "value"), note, scaled_by_1024(), GradientAccumulation(2))
    # `note` is attached before the two listeners that act on these events, so it sees the event as they get it.
    assert at["unscale_gradients"] == [1.5 * 1024, 2.5 * 1024]
    assert at["gradients_ready"] == [1.5, 2.5]
    assert at["before_optimizer_step"] == module.hook == [1.5, 5.0]
    assert at["after_gradient_clipping"] == at["after_optimizer_step"] == module.updates == [1.0, 1.0]


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "loss-scale-1024"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((1.0, "norm"), clipped_to(1.0, *[3.0] * 4)), ((1.0, "value"), [1.0] * 4)],
    ids=["norm", "value"],
)
def test_c1_four_gradients_of_3(arguments: Any, expected: list[float], scaled: bool) -> None:
    for order in itertools.permutations([GradientClipping(*arguments), *([scaled_by_1024()] if scaled else [])]):
        module = Probe(width=4)
        train(module, [3.0], *order)
        assert module.updates == [expected]
        assert expected == pytest.approx([0.5 if arguments[1] == "norm" else 1.0] * 4, abs=1e-6)


def test_c1_smaller_gradients_are_not_changed() -> None:
    module = Probe()
    train(module, 3, GradientClipping(2.5))
    assert module.updates == [1.0, 2.0, clipped_to(2.5, 3.0)[0]]


class Extra(Probe):
    """Has a parameter with a large gradient that no optimizer has."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.free = nn.Parameter(torch.zeros(1))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return super().loss(x) + (self.free * 100.0).sum()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_c1_the_norm_is_over_the_parameters_of_the_optimizer(algorithm: str) -> None:
    module = Extra()
    train(module, [1.0], GradientClipping(2.0, algorithm))
    assert module.updates == [1.0]
    assert module.free.grad is not None and module.free.grad.item() == 100.0


class TwoOptimizers(LightningModule):
    """Two optimizers with a parameter each, stepped in every batch; gradients x and 10 x."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward((self.a * batch + 10 * self.b * batch).sum())
        first.step()
        second.step()

    def configure_optimizers(self) -> Any:
        return SGD([self.a], lr=1.0), SGD([self.b], lr=1.0)


def test_c1_each_of_several_optimizers_has_a_separate_norm() -> None:
    module = TwoOptimizers()
    train(module, [1.0], GradientClipping(4.0))
    assert module.a.item() == -1.0 and module.b.item() == -clipped_to(4.0, 10.0)[0]


# ------------------------------------------------------------------ C2: thresholds


def clipped_updates(policy: Any, epochs: int = 1, xs: Any = (8.0,)) -> list[float]:
    module = Probe()
    train(module, list(xs), policy, max_epochs=epochs)
    return module.updates


def test_c2_a_number() -> None:
    assert clipped_updates(GradientClipping(0.5, "value"), xs=(1.0, 0.25, -3.0)) == [0.5, 0.25, -0.5]
    assert clipped_updates(GradientClipping(2, "value")) == [2.0]


def test_c2_norm_is_the_default_algorithm() -> None:
    module = Probe(width=4)
    train(module, [3.0], GradientClipping(1.0))
    assert module.updates == [clipped_to(1.0, *[3.0] * 4)]


def test_c2_a_schedule_by_epoch() -> None:
    policy = GradientClipping({0: 1.0, 5: 2.0}, "value")
    assert clipped_updates(policy, epochs=7, xs=[8.0] * 3) == [1.0] * 15 + [2.0] * 6


def test_c2_a_function_of_the_trainer() -> None:
    policy = GradientClipping(lambda trainer: 1.0 + trainer.global_step, "value")
    assert clipped_updates(policy, xs=[8.0] * 3) == [1.0, 2.0, 3.0]


def test_c2_an_override_of_threshold() -> None:
    class Own(GradientClipping):
        def threshold(self, trainer: Any) -> float | None:
            return 3.0 if trainer.batch_idx == 1 else super().threshold(trainer)

    assert clipped_updates(Own(1.0, "value"), xs=[8.0] * 3) == [1.0, 3.0, 1.0]


@pytest.mark.parametrize(
    "value",
    [{0: None, 2: 1.0}, lambda trainer: 1.0 if trainer.current_epoch >= 2 else None],
    ids=["schedule", "function"],
)
def test_c2_none_is_no_clipping_now(value: Any) -> None:
    assert clipped_updates(GradientClipping(value, "value"), epochs=3) == [8.0, 8.0, 1.0]
    recorder = Recorder("after_gradient_clipping")
    train(Probe(), [8.0], GradientClipping(value), recorder, max_epochs=3)
    assert len(recorder.events) == 1


def test_c2_none_never_clips() -> None:
    assert clipped_updates(GradientClipping(None)) == [8.0]


BAD = [0, 0.0, -1.0, math.nan, "1.0", True, [1.0]]


@pytest.mark.parametrize("value", BAD, ids=map(repr, BAD))
def test_c2_zero_negative_or_not_a_number_is_an_error(value: Any) -> None:
    with pytest.raises(MisconfigurationError, match="positive number"):
        GradientClipping(value)
    with pytest.raises(MisconfigurationError, match="positive number"):
        GradientClipping({0: 1.0, 3: value})


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("value", BAD, ids=map(repr, BAD))
def test_c2_a_wrong_value_from_a_function_is_an_error_too(value: Any, algorithm: str) -> None:
    module = Probe()
    with pytest.raises(MisconfigurationError, match="positive number"):
        train(module, 2, GradientClipping(lambda trainer: value, algorithm))
    assert module.updates == []


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_c2_a_wrong_value_for_clip_gradients_is_an_error_too(value: float) -> None:
    class Clipping(Probe):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=value)

    with pytest.raises(MisconfigurationError, match="positive number"):
        train(Clipping(), 1)


@pytest.mark.parametrize("schedule", [{}, {1: 1.0}, {-1: 1.0, 0: 2.0}])
def test_c2_a_bad_schedule_is_an_error(schedule: Any) -> None:
    with pytest.raises(MisconfigurationError, match="schedule"):
        GradientClipping(schedule)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_c2_norm_type(norm_type: float) -> None:
    module = Probe(width=3)
    recorder = Recorder("before_gradient_clipping", "after_gradient_clipping")
    train(module, [3.0], recorder, GradientClipping(1.0, "norm", norm_type=norm_type))
    assert module.updates == [clipped_to(1.0, *[3.0] * 3, norm_type=norm_type)]
    assert [event.norm_type for event in recorder.events] == [norm_type] * 2


@pytest.mark.parametrize("norm_type", [0.0, -1.0, "2", math.nan, True])
def test_c2_a_bad_norm_type_is_an_error(norm_type: Any) -> None:
    with pytest.raises(MisconfigurationError, match="norm_type"):
        GradientClipping(1.0, norm_type=norm_type)


@pytest.mark.parametrize("algorithm", ["agc", "Norm", None, 2])
def test_c2_another_algorithm_is_an_error_that_lists_them(algorithm: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"'norm' or 'value'"):
        GradientClipping(1.0, algorithm)


@pytest.mark.parametrize("algorithm", ["agc", "Norm", 2])
def test_c2_another_algorithm_in_clip_gradients_or_an_event_is_an_error_too(algorithm: Any) -> None:
    class Clipping(Probe):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm=algorithm)

    with pytest.raises(MisconfigurationError, match=r"'norm' or 'value'"):
        train(Clipping(), 1)

    def write(trainer: Any, event: Any) -> None:
        event.gradient_clip_val, event.gradient_clip_algorithm = 1.0, algorithm

    with pytest.raises(MisconfigurationError, match=r"'norm' or 'value'"):
        train(Probe(), 1, On(before_gradient_clipping=write))


def test_c2_a_policy_may_be_any_listener() -> None:
    def harder_later(trainer: Any, event: Any) -> None:
        if trainer.current_epoch > 0:
            event.gradient_clip_val = 0.5

    module = Probe()
    train(module, [8.0], GradientClipping(1.0, "value"), On(before_gradient_clipping=harder_later), max_epochs=2)
    assert module.updates == [1.0, 0.5]


# ------------------------------------------------------------------ C3: the module's hook


class Hooked(Probe):
    """Records the arguments of its hook, and does the default."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.calls: list[Any] = []

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        assert optimizer is self.optimizers()
        self.calls.append((gradient_clip_val, gradient_clip_algorithm))
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


def test_c3_the_hook_gets_the_policies_values_and_its_default_clips() -> None:
    module = Hooked()
    train(module, [8.0], GradientClipping({0: 1.0, 1: 2.0}, "value"), max_epochs=2)
    assert module.calls == [(1.0, "value"), (2.0, "value")] and module.updates == [1.0, 2.0]


def test_c3_the_hook_is_called_without_a_policy_too() -> None:
    module = Hooked()
    train(module, 3)
    assert module.calls == [(None, None)] * 3 and module.updates == [1.0, 2.0, 3.0]


def test_c3_the_hook_is_called_once_per_update() -> None:
    module = Hooked()
    train(module, 5, GradientAccumulation(2), GradientClipping(1.0))
    assert module.calls == [(1.0, "norm")] * 3


def test_c3_the_policys_norm_type_holds_in_the_hook() -> None:
    module = Hooked(width=3)
    train(module, [3.0], GradientClipping(1.0, norm_type=math.inf))
    assert module.updates == [clipped_to(1.0, 3.0, 3.0, 3.0, norm_type=math.inf)]


def test_c3_the_example_of_the_guide() -> None:
    class Guide(Probe):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            if self.current_epoch > 5:
                gradient_clip_val = gradient_clip_val * 2

            # Lightning will handle the gradient clipping
            self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    module = Guide()
    train(module, [8.0], GradientClipping(1.0, "value"), max_epochs=8)
    assert module.updates == [1.0] * 6 + [2.0] * 2


def test_c3_the_hook_decides_about_clipping() -> None:
    class Nothing(Probe):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            return None

    module = Nothing()
    train(module, [8.0], GradientClipping(1.0))
    assert module.updates == [8.0]


def test_c3_the_hook_may_clip_without_a_policy() -> None:
    class Own(Probe):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=2.0, gradient_clip_algorithm="value")

    module = Own()
    train(module, 3)
    assert module.updates == [1.0, 2.0, 2.0]


def test_c3_the_default_is_clip_gradients() -> None:
    calls: list[Any] = []

    class Default(Probe):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(*args, **kwargs)

        def clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            assert not args
            calls.append(kwargs)
            return super().clip_gradients(optimizer, *args, **kwargs)

    module = Default()
    train(module, [8.0], GradientClipping(1.0, "value"))
    assert calls == [{"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}] and module.updates == [1.0]


# ------------------------------------------------------------------ C4: manual optimization


class Manual(Probe):
    """Optimizes by hand; ``before_step`` is called between backward and step."""

    def __init__(self, before_step: Any = lambda module, optimizer: None, **arguments: Any) -> None:
        super().__init__(automatic=False, **arguments)
        self.before_step = before_step

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.before_step(self, optimizer)
        optimizer.step()


@pytest.mark.parametrize("attached", [False, True], ids=["none-attached", "attached"])
def test_c4_the_hook_is_not_called(attached: bool) -> None:
    class NoHook(Manual):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

    module = NoHook()
    train(module, [8.0], *([GradientClipping(1.0, "value")] if attached else []))
    assert module.updates == [1.0 if attached else 8.0]


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "loss-scale-1024"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["wrapper", "wrapped"])
def test_c4_clip_gradients_clips_unscaled_gradients(algorithm: str, scaled: bool, wrapped: bool) -> None:
    norms: list[Any] = []

    def clip(module: Any, optimizer: Any) -> None:
        norms.append(
            module.clip_gradients(
                optimizer.optimizer if wrapped else optimizer, gradient_clip_val=1.0, gradient_clip_algorithm=algorithm
            )
        )

    module = Manual(clip, width=4)
    train(module, [3.0], *([scaled_by_1024()] if scaled else []))
    assert module.updates == [clipped_to(1.0, *[3.0] * 4) if algorithm == "norm" else [1.0] * 4]
    assert norms == [None] if algorithm == "value" else norms[0].item() == 6.0


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "loss-scale-1024"])
@pytest.mark.parametrize("clipping_first", [False, True])
def test_c4_an_attached_policy_acts_at_step(scaled: bool, clipping_first: bool) -> None:
    module = Manual(width=4)
    callbacks: list[Any] = [GradientClipping(1.0), *([scaled_by_1024()] if scaled else [])]
    train(module, [3.0], *(callbacks if clipping_first else reversed(callbacks)))
    assert module.updates == [clipped_to(1.0, *[3.0] * 4)]


def test_c4_an_attached_policy_acts_at_a_step_with_a_closure() -> None:
    class WithClosure(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Any:
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    module = WithClosure()
    train(module, [8.0], GradientClipping(1.0, "value"))
    assert module.updates == [1.0]


# ------------------------------------------------------------------ C5: the total norm


def test_c5_the_total_norm_before_clipping_is_returned_and_carried() -> None:
    returned: list[Any] = []

    class Returning(Probe):
        def configure_gradient_clipping(self, optimizer: Any, *arguments: Any) -> None:
            returned.append(self.clip_gradients(optimizer, *arguments))

    recorder = Recorder("after_gradient_clipping")
    module = Returning(width=4)
    train(module, [3.0, 0.25], GradientClipping(1.0), recorder, scaled_by_1024())
    carried = [event.total_norm for event in recorder.events]
    for norms in (returned, carried):
        assert all(isinstance(norm, torch.Tensor) and norm.ndim == 0 and norm.device == module.w.device for norm in norms)
        assert [norm.item() for norm in norms] == [6.0, 0.5]
    assert [(e.gradient_clip_val, e.gradient_clip_algorithm) for e in recorder.events] == [(1.0, "norm")] * 2
    assert all(event.optimizer is module.optimizers() for event in recorder.events)


def test_c5_without_the_hook_it_is_carried_too() -> None:
    recorder = Recorder("after_gradient_clipping")
    train(Probe(), 3, GradientClipping(2.0), recorder)
    assert [event.total_norm.item() for event in recorder.events] == [1.0, 2.0, 3.0]


def test_c5_the_norm_is_of_the_policys_type() -> None:
    recorder = Recorder("after_gradient_clipping")
    train(Probe(width=3), [3.0], GradientClipping(1.0, norm_type=1.0), recorder)
    assert recorder.events[0].total_norm.item() == 9.0


def test_c5_clipping_by_value_has_no_total_norm() -> None:
    recorder = Recorder("after_gradient_clipping")
    train(Probe(), 2, GradientClipping(2.0, "value"), recorder)
    assert [event.total_norm for event in recorder.events] == [None, None]


# ------------------------------------------------------------------ properties


@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(
    thresholds=st.dictionaries(st.integers(1, 3), st.none() | st.sampled_from([0.5, 1.0, 3.0, 100.0]), max_size=2),
    first=st.none() | st.sampled_from([0.5, 2.0]),
    algorithm=st.sampled_from(["norm", "value"]),
    norm_type=st.sampled_from([1.0, 2.0, math.inf]),
    window=st.integers(1, 3),
    length=st.integers(1, 5),
    epochs=st.integers(1, 4),
    scaled=st.booleans(),
    hook=st.booleans(),
)
def test_c_property_clipping_equals_the_hand_written_loop(
    thresholds: Any,
    first: Any,
    algorithm: str,
    norm_type: float,
    window: int,
    length: int,
    epochs: int,
    scaled: bool,
    hook: bool,
) -> None:
    schedule = {0: first, **thresholds}
    window = min(window, length)
    module = (Hooked if hook else Probe)(width=3)
    callbacks = [GradientClipping(schedule, algorithm, norm_type=norm_type), GradientAccumulation(window)]
    train(module, length, *callbacks, *([scaled_by_1024()] if scaled else []), max_epochs=epochs)

    w = nn.Parameter(torch.zeros(3))
    optimizer = SGD([w], lr=1.0)
    for epoch in range(epochs):
        threshold = schedule[max(key for key in schedule if key <= epoch)]
        for start in range(1, length + 1, window):
            inside = range(start, min(start + window, length + 1))
            optimizer.zero_grad()
            for x in inside:
                backward((w * float(x)).sum() / window)
            if len(inside) != window:
                w.grad.mul_(window / len(inside))  # type: ignore[union-attr]
            if threshold is not None and algorithm == "norm":
                nn.utils.clip_grad_norm_([w], threshold, norm_type=norm_type)
            elif threshold is not None:
                nn.utils.clip_grad_value_([w], threshold)
            optimizer.step()
    assert torch.equal(module.w, w)
