"""GradientNormMonitor logs the norms of the true gradients before any clipping, and waits for no value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eventtrain import LightningModule, LightningOptimizer, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, MixedPrecision, TensorBoardLogger
from eventtrain.callbacks.monitoring import gradient_norm_monitor as implementation
from eventtrain.callbacks.monitoring.gradient_norm_monitor import ClippedFraction, GradientNormMonitor
from tests.kit import On, new_trainer, train

Logged = list[dict[str, float]]


class Model(LightningModule):
    """The gradients of a batch x are (3x, 4x) in one submodule and 12x in another: norms of 5x and 12x, together 13x."""

    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        self.pair = nn.Linear(2, 1, bias=False)
        self.inner = nn.ModuleDict({"single": nn.Linear(1, 1, bias=False)})
        self.automatic_optimization = not manual

    def loss(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.pair(batch * torch.tensor([3.0, 4.0])).sum() + self.inner["single"](batch * 12.0).sum()
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class PairOnly(Model):
    """Only the first submodule has gradients."""

    def loss(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.pair(batch * torch.tensor([3.0, 4.0])).sum()
        return loss


def batches(*values: float) -> list[Tensor]:
    return [torch.full((1,), float(value)) for value in values]


def scaled() -> list[Any]:
    return [MixedPrecision("fp16", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))]


def fit(module: LightningModule, callbacks: list[Any], data: list[Tensor], **options: Any) -> Logged:
    """Train, and return the values that loggers get at each update."""
    logged: Logged = []

    def read(trainer: Trainer, event: Any) -> None:
        if event.scope == "step":
            logged.append({name: float(value) for name, value in event.metrics.items()})

    train(module, data, *callbacks, On(metrics_logged=read), **options)
    return logged


def norms(logged: Logged, name: str = "grad_norm") -> list[float | None]:
    return [values.get(name) for values in logged]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of gradients in each norm, if the norm had to be computed."""
    calls: list[int] = []
    compute = torch.nn.utils.get_total_norm

    def count(gradients: list[Tensor], norm_type: float) -> Tensor:
        calls.append(len(gradients))
        return compute(gradients, norm_type)

    monkeypatch.setattr(implementation, "total_norm", count)
    return calls


# ------------------------------------------------------------------ the norm


def test_without_clipping_the_norm_is_computed_and_there_is_no_fraction(computed: list[int]) -> None:
    assert fit(Model(), [GradientNormMonitor()], batches(1, 2)) == [{"grad_norm": 13.0}, {"grad_norm": 26.0}]
    assert computed == [2, 2]


@pytest.mark.parametrize("first", ["monitor", "clipping"])
def test_clipping_by_norm_gives_the_norm_for_free(computed: list[int], first: str) -> None:
    callbacks = [GradientNormMonitor(), GradientClipping(20.0)]
    logged = fit(Model(), callbacks if first == "monitor" else callbacks[::-1], batches(1, 2))
    assert norms(logged) == pytest.approx([13.0, 26.0])
    assert computed == []


@pytest.mark.parametrize("first", ["monitor", "clipping"])
def test_the_norm_is_measured_before_clipping_by_value(first: str) -> None:
    callbacks = [GradientNormMonitor(), GradientClipping(1.0, "value")]
    logged = fit(Model(), callbacks if first == "monitor" else callbacks[::-1], batches(1, 2))
    assert logged == [{"grad_norm": 13.0}, {"grad_norm": 26.0}], "no fraction, because no norm was compared with a threshold"


def test_a_norm_of_another_order_than_the_clipping_is_computed(computed: list[int]) -> None:
    logged = fit(Model(), [GradientNormMonitor(norm_type=math.inf), GradientClipping(1.0)], batches(1, 2))
    assert norms(logged) == [12.0, 24.0] and computed == [2, 2]
    assert norms(logged, "grad_norm_clipped_fraction") == [1.0, 1.0]


def test_a_norm_of_infinite_order_can_be_free_too(computed: list[int]) -> None:
    callbacks = [GradientNormMonitor(norm_type=math.inf), GradientClipping(13.0, norm_type=math.inf)]
    logged = fit(Model(), callbacks, batches(1, 2))
    assert norms(logged) == [12.0, 24.0] and computed == []
    assert norms(logged, "grad_norm_clipped_fraction") == [0.0, 0.5]


def test_the_norm_is_measured_on_the_gradient_of_the_window() -> None:
    logged = fit(Model(), [GradientNormMonitor(), GradientAccumulation(2)], batches(1, 3, 5, 7, 11))
    assert norms(logged) == pytest.approx([13.0 * 2, 13.0 * 6, 13.0 * 11])


def test_the_norm_is_measured_on_unscaled_gradients() -> None:
    logged = fit(Model(), [GradientNormMonitor(per_layer=True), *scaled()], batches(1, 2))
    assert logged == [
        {"grad_norm": 13.0, "grad_norm/pair": 5.0, "grad_norm/inner.single": 12.0},
        {"grad_norm": 26.0, "grad_norm/pair": 10.0, "grad_norm/inner.single": 24.0},
    ]


def test_a_skipped_step_logs_nothing() -> None:
    callbacks = [GradientNormMonitor(), GradientClipping(20.0), *scaled()]
    logged = fit(Model(), callbacks, batches(1, math.inf, 2))
    assert logged == [
        {"grad_norm": pytest.approx(13.0), "grad_norm_clipped_fraction": 0.0},
        {"grad_norm": pytest.approx(26.0), "grad_norm_clipped_fraction": 0.5},
    ]


def test_parameters_without_gradients_add_nothing() -> None:
    (values,) = fit(PairOnly(), [GradientNormMonitor(per_layer=True)], batches(1))
    assert values == {"grad_norm": 5.0, "grad_norm/pair": 5.0, "grad_norm/inner.single": 0.0}


def test_an_optimizer_without_a_single_gradient_has_a_norm_of_zero() -> None:
    class Nothing(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.optimizers().step()

    logged = fit(Nothing(manual=True), [GradientNormMonitor(), GradientClipping(1.0)], batches(1))
    assert logged == [{"grad_norm": 0.0, "grad_norm_clipped_fraction": 0.0}]


def test_sparse_gradients_are_added_up_first() -> None:
    class Sparse(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 1, sparse=True)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.embedding(torch.tensor([0, 1, 1])).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    assert norms(fit(Sparse(), [GradientNormMonitor()], batches(1))) == pytest.approx([math.sqrt(1 + 4)])


def test_an_optimizer_that_evaluates_often_logs_the_norm_of_its_last_evaluation() -> None:
    class Quadratic(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.weight.square().sum() / 2  # the gradient is the weight

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=3)

    seen: list[float] = []

    def look(trainer: Trainer, event: Any) -> None:
        (gradient,) = (parameter.grad for parameter in trainer.module.parameters())
        assert gradient is not None
        seen.append(float(gradient.norm()))

    logged = fit(Quadratic(), [GradientNormMonitor(), On(before_optimizer_step=look)], batches(1))
    assert len(seen) == 3 and norms(logged) == pytest.approx(seen[-1:])


# ------------------------------------------------------------------ modules that clip


class HalvesTheThreshold(Model):
    def configure_gradient_clipping(
        self,
        optimizer: LightningOptimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        assert gradient_clip_val is not None
        self.clip_gradients(optimizer, gradient_clip_val / 2, "norm")


class ClipsByValueFirst(Model):
    def configure_gradient_clipping(
        self,
        optimizer: LightningOptimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.clip_gradients(optimizer, 1.0, "value")
        self.clip_gradients(optimizer, gradient_clip_val, "norm")


@pytest.mark.parametrize("module", [HalvesTheThreshold, ClipsByValueFirst])
def test_the_norm_is_measured_before_the_clipping_hook_of_the_module(module: type[Model]) -> None:
    logged = fit(module(), [GradientNormMonitor(per_layer=True), GradientClipping(20.0)], batches(1, 2))
    assert norms(logged) == [13.0, 26.0]
    assert norms(logged, "grad_norm/pair") == [5.0, 10.0]
    expected = [1.0, 1.0] if module is HalvesTheThreshold else [0.0, 0.0]
    assert norms(logged, "grad_norm_clipped_fraction") == expected, "by the norm and the threshold of the hook's clipping"


class ByHand(Model):
    algorithm = "norm"

    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 20.0, self.algorithm)
        optimizer.step()


class ByHandByValue(ByHand):
    algorithm = "value"


@pytest.mark.parametrize("callbacks", [list, lambda: [GradientClipping(1.0)], scaled])
@pytest.mark.parametrize("module", [ByHand, ByHandByValue])
def test_the_norm_is_measured_before_the_module_clips_by_hand(module: type[Model], callbacks: Callable[[], list[Any]]) -> None:
    logged = fit(module(), [GradientNormMonitor(per_layer=True), *callbacks()], batches(1, 2))
    assert norms(logged) == [13.0, 26.0]
    assert norms(logged, "grad_norm/inner.single") == [12.0, 24.0]
    if module is ByHand:
        assert norms(logged, "grad_norm_clipped_fraction") == [0.0, 0.5], "the first clipping counts"


def test_a_closure_that_runs_before_the_step_changes_nothing(computed: list[int]) -> None:
    class RunsFirst(Model):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: LightningOptimizer, optimizer_closure: Any = None
        ) -> None:
            optimizer_closure()
            optimizer.step()

    logged = fit(RunsFirst(), [GradientNormMonitor(), GradientAccumulation(2)], batches(1, 3))
    assert norms(logged) == pytest.approx([26.0]) and computed == [2]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_that_an_earlier_hook_clipped_are_not_measured(algorithm: str) -> None:
    class ClipsEarly(Model):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.clip_gradients(optimizer, 1.0, algorithm)

    logged = fit(ClipsEarly(), [GradientNormMonitor(per_layer=True), GradientClipping(5.0)], batches(1))
    assert norms(logged) == (pytest.approx([13.0]) if algorithm == "norm" else [None])
    assert norms(logged, "grad_norm/pair") == [None]
    logged = fit(ClipsEarly(), [GradientNormMonitor(norm_type=math.inf)], batches(1))
    assert norms(logged) == [None], "the hook's norm is of another order"


def test_a_step_on_the_wrapped_optimizer_logs_nothing(computed: list[int]) -> None:
    class Raw(Model):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: LightningOptimizer, optimizer_closure: Any = None
        ) -> None:
            optimizer.optimizer.step(optimizer_closure)

    assert fit(Raw(), [GradientNormMonitor()], batches(1, 2)) == [{}, {}]
    assert computed == []


# ------------------------------------------------------------------ layers, optimizers


def test_each_submodule_with_parameters_has_a_norm() -> None:
    class WithOwn(Model):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.ones(()))
            self.again = self.pair  # a second name of the same module

        def loss(self, batch: Tensor) -> Tensor:
            return super().loss(batch) + self.own * 84

    logged = fit(WithOwn(), [GradientNormMonitor(per_layer=True)], batches(1))
    layers = {"grad_norm/WithOwn": 84.0, "grad_norm/pair": 5.0, "grad_norm/inner.single": 12.0}
    assert logged == [{"grad_norm": pytest.approx(math.hypot(84, 13)), **layers}]


def test_layers_are_measured_before_the_clipping_that_gives_the_norm(computed: list[int]) -> None:
    logged = fit(Model(), [GradientNormMonitor(per_layer=True), GradientClipping(1.0)], batches(1))
    assert norms(logged, "grad_norm/pair") == [5.0] and norms(logged) == pytest.approx([13.0])
    assert computed == [1, 1], "the two layers"


def test_per_layer_can_change_during_the_run() -> None:
    monitor = GradientNormMonitor()

    def ask(trainer: Trainer, event: Any) -> None:
        monitor.per_layer = event.batch_idx == 1

    logged = fit(Model(), [monitor, On(train_batch_start=ask)], batches(1, 2, 3))
    assert norms(logged, "grad_norm/pair") == [None, 10.0, None]


def test_a_group_that_is_added_during_the_run_is_measured() -> None:
    class Unfreezes(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.pair.parameters(), lr=0.01)

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx == 1:
                self.zero_grad()
                self.optimizers().add_param_group({"params": self.inner.parameters()})

    logged = fit(Unfreezes(), [GradientNormMonitor(per_layer=True)], batches(1, 1))
    assert logged == [
        {"grad_norm": 5.0, "grad_norm/pair": 5.0},
        {"grad_norm": 13.0, "grad_norm/pair": 5.0, "grad_norm/inner.single": 12.0},
    ]


class Two(Model):
    """One optimizer for each submodule. The second one steps in every other batch."""

    kinds: tuple[Any, Any] = (torch.optim.SGD, torch.optim.SGD)

    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        if batch_idx % 2:
            second.step()

    def configure_optimizers(self) -> Any:
        parts = (self.pair, self.inner)
        return [kind(part.parameters(), lr=0.01) for kind, part in zip(self.kinds, parts, strict=True)]


class TwoKinds(Two):
    kinds = (torch.optim.SGD, torch.optim.Adam)


def test_each_of_several_optimizers_has_a_norm() -> None:
    logged = fit(Two(), [GradientNormMonitor(per_layer=True), GradientClipping(6.0)], batches(1, 2))
    first = [{"grad_norm-SGD-0": 5.0, "grad_norm-SGD-0/pair": 5.0, "grad_norm_clipped_fraction-SGD-0": 0.0}]
    first += [{"grad_norm-SGD-0": 10.0, "grad_norm-SGD-0/pair": 10.0, "grad_norm_clipped_fraction-SGD-0": 0.5}]
    second = {"grad_norm-SGD-1": 24.0, "grad_norm-SGD-1/inner.single": 24.0, "grad_norm_clipped_fraction-SGD-1": 1.0}
    assert logged == [first[0], {**first[1], **second}]


def test_optimizers_of_different_classes_are_not_numbered() -> None:
    logged = fit(TwoKinds(), [GradientNormMonitor()], batches(1, 2))
    assert logged == [{"grad_norm-SGD": 5.0}, {"grad_norm-SGD": 10.0, "grad_norm-Adam": 24.0}]


# ------------------------------------------------------------------ cadence


def test_norms_are_computed_only_at_the_cadence_and_every_update_counts(computed: list[int]) -> None:
    clipping = GradientClipping(13.5, norm_type=math.inf)  # another order than the monitor's, whose norms are 12x
    logged = fit(Model(), [GradientNormMonitor(every_n_steps=3), clipping], batches(1, 2, 3, 1, 1, 1))
    assert norms(logged) == [None, None, 39.0, None, None, 13.0] and computed == [2, 2]
    fractions = norms(logged, "grad_norm_clipped_fraction")
    assert fractions == [None, None, pytest.approx(2 / 3), None, None, pytest.approx(2 / 6)]


def test_the_cadence_can_be_overridden() -> None:
    class Early(GradientNormMonitor):
        def is_due(self, global_step: int) -> bool:
            return global_step <= 2

    assert norms(fit(Model(), [Early()], batches(1, 2, 3))) == [13.0, 26.0, None]


def test_with_the_window_at_its_cadence_a_logger_writes_the_fraction_since_its_last_value(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, log_every_n_steps=4)
    callbacks = [GradientNormMonitor(window=4), GradientClipping(20.0), logger]
    fit(Model(), callbacks, batches(1, 2, 1, 1, 2, 2, 2, 1))
    events = EventAccumulator(str(logger.run_dir)).Reload().Scalars("grad_norm_clipped_fraction")
    assert [(event.step, event.value) for event in events] == [(4, 0.25), (8, 0.75)]


def test_without_a_threshold_there_is_no_fraction(computed: list[int]) -> None:
    callbacks = [GradientNormMonitor(), GradientClipping({0: 1.0, 1: None})]
    logged = fit(Model(), callbacks, batches(1, 2), max_epochs=2)
    assert norms(logged) == pytest.approx([13.0, 26.0, 13.0, 26.0]) and computed == [2, 2]
    assert norms(logged, "grad_norm_clipped_fraction") == [1.0, 1.0, None, None]


def test_the_fraction_covers_the_last_updates() -> None:
    fraction = ClippedFraction(3, torch.device("cpu"))
    values = []
    for norm in (2.0, 0.5, 1.0, 3.0, 3.0, 3.0):
        fraction.add(torch.tensor(norm), 1.0)
        values.append(float(fraction.value()))
    assert values == pytest.approx([1, 1 / 2, 1 / 3, 1 / 3, 2 / 3, 1])


# ------------------------------------------------------------------ no reads, no connections left


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the values that are read out of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clipping", [list, lambda: [GradientClipping(20.0)], lambda: [GradientClipping(1.0, "value")]])
@pytest.mark.parametrize("module", [Model, ByHand, Two])
def test_no_value_is_read_out_of_a_tensor(module: type[Model], clipping: Callable[[], list[Any]]) -> None:
    metrics: list[dict[str, Any]] = []
    note = On(metrics_logged=lambda trainer, event: metrics.append(dict(event.metrics)))
    trainer = new_trainer(GradientNormMonitor(per_layer=True, window=2), *clipping(), note)
    with Reads() as reads:  # type: ignore[no-untyped-call]
        trainer.fit(module(), batches(1, 2, 3, 4))
        assert reads.count == 0
        assert float(torch.ones(())) == 1.0 and reads.count == 1, "it sees a read"
    values = [value for each in metrics for value in each.values() if not isinstance(value, ClippedFraction)]
    assert len(values) >= 8 and all(isinstance(value, Tensor) and value.ndim == 0 for value in values)


@pytest.mark.parametrize("clipping", [list, lambda: [GradientClipping(20.0)]])
def test_it_works_on_a_device_without_values(clipping: Callable[[], list[Any]]) -> None:
    class OnMeta(Model):
        def loss(self, batch: Tensor) -> Tensor:
            loss: Tensor = self.pair(batch.expand(2)).sum() + self.inner["single"](batch).sum()
            return loss

    trainer = train(OnMeta(), batches(1, 2), GradientNormMonitor(per_layer=True), *clipping(), device="meta")
    assert trainer.logged_metrics["grad_norm/pair"].device.type == "meta"


def fail(trainer: Trainer, event: Any) -> None:
    raise RuntimeError("at the worst moment")


@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_leaves_the_connections_as_they_were(fails: bool) -> None:
    during: list[Any] = []
    look = On(train_start=lambda trainer, event: during.append(trainer.signals.gradients_final.listeners))
    trainer = new_trainer(GradientNormMonitor(), look, *([On(after_update=fail)] if fails else []))
    before = {signal.name: (signal.attached(), signal.listeners) for signal in trainer.signals}
    try:
        trainer.fit(Model(), batches(1))
        assert not fails
    except RuntimeError:
        assert fails
    assert len(during[0]) == 1
    assert {signal.name: (signal.attached(), signal.listeners) for signal in trainer.signals} == before


WRONG: list[dict[str, Any]] = [
    *({"norm_type": order} for order in (0, -1.0, True, math.nan, "2")),
    {"every_n_steps": 0},
    {"window": 0},
]


@pytest.mark.parametrize("options", WRONG)
def test_bad_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationError, match=rf"GradientNormMonitor.*{next(iter(options))}"):
        GradientNormMonitor(**options)
