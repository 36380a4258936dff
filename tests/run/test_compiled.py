"""``torch.compile`` changes how a step is computed and nothing else: bits, events and checkpoints stay the same, and nothing
is compiled anew from step to step.

The compiler here is a backend that runs its graphs unchanged, and counts them.
"""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eventtrain import Callback, LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation, GradientClipping, LRSchedulerStepping, MixedPrecision
from tests import reference

# torch looks at it when it traces the inputs of a resumed graph, and hides the warning itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")

GENERATOR = torch.Generator().manual_seed(0)
DATA = [(torch.randn(4, 3, generator=GENERATOR), torch.randn(4, 1, generator=GENERATOR)) for _ in range(12)]


class Backend:
    """Runs graphs unchanged.

    Attributes:
        graphs: The number of graphs.
        runs: The number of calls of a graph.
        options: The options of each graph.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.runs = 0
        self.options: list[dict[str, Any]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        self.graphs += 1
        self.options.append(options)

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.25)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.dropout(torch.tanh(self.norm(self.hidden(x)))))


class Small(nn.Module):
    """Wraps torch's layers, because torch does not compile their ``forward`` when ``compile()`` is called on them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = reference.net()

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = Net()

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self(x), y)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.mse_loss(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class Gan(LightningModule):
    """Two optimizers, each of which trains its own network while the other's is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(1)
        self.generator, self.critic = Small(), Small()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_critic = self.optimizers()
        real, _ = batch
        with self.toggled_optimizer(for_critic):
            for_critic.zero_grad()
            loss = F.softplus(self.criticise(self.generate(real)) - self.criticise(real)).mean()
            self.manual_backward(loss)
            self.clip_gradients(for_critic, 0.5, "norm")
            for_critic.step()
            self.log("critic", loss, on_step=True, on_epoch=True)
        with self.toggled_optimizer(for_generator):
            for_generator.zero_grad()
            loss = F.softplus(-self.criticise(self.generate(real))).mean()
            self.manual_backward(loss)
            for_generator.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"generator": loss, "half": loss / 2})

    def generate(self, noise: Tensor) -> Tensor:
        return noise * torch.tanh(self.generator(noise))

    def criticise(self, batch: Tensor) -> Any:
        return self.critic(batch).mean(1)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.generator, self.critic)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]


class UntoggledGan(Gan):
    """Without ``with`` around the graph breaks, so that the step itself is compiled between them."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_critic = self.optimizers()
        real, _ = batch
        for_critic.zero_grad()
        loss = F.softplus(self.criticise(self.generate(real)) - self.criticise(real)).mean()
        self.manual_backward(loss)
        for_critic.step()
        for_generator.zero_grad()
        loss = F.softplus(-self.criticise(self.generate(real))).mean()
        self.manual_backward(loss)
        for_generator.step()
        self.log("generator", loss)


def whole(module: LightningModule, **options: Any) -> Any:
    return torch.compile(module, **options)


def in_place(module: LightningModule, **options: Any) -> Any:
    module.compile(**options)
    return module


def wrapped_networks(module: LightningModule, **options: Any) -> Any:
    for name, network in list(module.named_children()):
        setattr(module, name, torch.compile(network, **options))
    return module


def networks_in_place(module: LightningModule, **options: Any) -> Any:
    for network in module.children():
        network.compile(**options)
    return module


def its_step(module: LightningModule, **options: Any) -> Any:
    module.training_step = torch.compile(module.training_step, **options)  # type: ignore[method-assign]
    return module


WAYS = [whole, in_place, wrapped_networks, networks_in_place, its_step]


class GraphsPerBatch(Callback):
    """Records how many graphs there were by the end of each training batch."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.graphs: list[int] = []
        self.runs: list[int] = []

    def on_safe_point(self, trainer: Trainer, event: Any) -> None:
        self.graphs.append(self.backend.graphs)
        self.runs.append(self.backend.runs)


def trainer_with(*callbacks: Any, **options: Any) -> Trainer:
    options = {"max_epochs": 3, "default_callbacks": False, "device": "cpu", "seed": 3, **options}
    return Trainer(callbacks=[*callbacks, LRSchedulerStepping()], **options)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, under the names that they have without compilation."""
    return {name.replace("_orig_mod.", ""): value.clone() for name, value in module.state_dict().items()}


def check_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys() and expected
    different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert different == []


def fitted(module: Any, *callbacks: Any, validates: bool = True, **options: Any) -> Trainer:
    trainer = trainer_with(*callbacks, **options)
    trainer.fit(module, DATA, DATA[:3] if validates else None)
    return trainer


# ------------------------------------------------------------------ the same bits, and nothing compiled anew

EXTRAS: dict[str, Callable[[], list[Any]]] = {
    "plain": list,
    "accumulating, clipping, bf16": lambda: [GradientAccumulation(5), GradientClipping(0.1), MixedPrecision("bf16")],
    "fp16": lambda: [MixedPrecision("fp16")],
}


@pytest.mark.parametrize(
    ("way", "extras"),
    [(way, "plain") for way in WAYS] + [(way, extras) for way in (whole, in_place) for extras in EXTRAS if extras != "plain"],
)
def test_a_compiled_run_has_the_bits_of_an_eager_one(way: Callable[..., Any], extras: str) -> None:
    eager, module, backend = Module(), Module(), Backend()
    per_batch = GraphsPerBatch(backend)
    expected = fitted(eager, *EXTRAS[extras]())
    trainer = fitted(way(module, backend=backend), *EXTRAS[extras](), per_batch)
    assert trainer.global_step == expected.global_step
    check_equal(weights(module), weights(eager))
    check_equal(trainer.callback_metrics, expected.callback_metrics)
    # In every batch a graph ran; all of them were there after the first epoch, and few.
    batches = len(DATA)
    assert len(per_batch.runs) == 3 * batches
    assert all(later > earlier for earlier, later in zip(per_batch.runs, per_batch.runs[1:], strict=False))
    assert per_batch.graphs[1] == per_batch.graphs[batches - 1], "compiled anew from batch to batch"
    assert len(set(per_batch.graphs[batches:])) == 1, "compiled anew from epoch to epoch"
    assert 1 <= per_batch.graphs[-1] <= 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", [whole, wrapped_networks])
def test_a_compiled_run_has_the_bits_of_the_loop_written_by_hand(way: Callable[..., Any], backend: str) -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = reference.net()

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return reference.loss_of(self, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    model = reference.net()
    compiled: Any = torch.compile(model, backend=backend)
    reference.plain(compiled, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), DATA, epochs=2)
    module = Plain()
    trainer_with(max_epochs=2).fit(way(module, backend=backend), DATA)
    check_equal({name.removeprefix("net."): value for name, value in weights(module).items()}, weights(model))


@pytest.mark.parametrize(
    ("way", "kind"), [(whole, Gan), (wrapped_networks, Gan), (networks_in_place, Gan), (whole, UntoggledGan)]
)
def test_manual_optimization_has_the_bits_of_an_eager_run(way: Callable[..., Any], kind: type[Gan]) -> None:
    """Each toggling of ``requires_grad`` is one more state to compile for, not one more with every step."""
    eager, module, backend = kind(), kind(), Backend()
    per_batch = GraphsPerBatch(backend)
    expected = fitted(eager, MixedPrecision("bf16"), validates=False)
    trainer = fitted(way(module, backend=backend), MixedPrecision("bf16"), per_batch, validates=False)
    assert trainer.global_step == expected.global_step == 3 * len(DATA)
    check_equal(weights(module), weights(eager))
    check_equal(trainer.callback_metrics, expected.callback_metrics)
    assert backend.runs >= 2 * 3 * len(DATA)
    assert len(set(per_batch.graphs[1:])) == 1, "compiled anew from batch to batch"


def test_an_optimizer_that_evaluates_its_closure_often() -> None:
    class Lbfgs(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=4)

    eager, module, backend = Lbfgs(), Lbfgs(), Backend()
    fitted(eager, max_epochs=1)
    fitted(torch.compile(module, backend=backend), max_epochs=1)
    check_equal(weights(module), weights(eager))
    assert backend.runs > 2 * len(DATA)


def test_the_batch_index_is_no_constant() -> None:
    class Indexed(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (batch_idx + 1)

    eager, module, backend = Indexed(), Indexed(), Backend()
    fitted(eager, validates=False)
    fitted(torch.compile(module, backend=backend), validates=False)
    check_equal(weights(module), weights(eager))
    assert backend.graphs <= 2 + 2, "the first batch's, and one for all the others, each up to self.log and after it"


def test_the_counters_can_be_numbers_that_change() -> None:
    """torch takes integers that are reached through a module for constants, unless it is told otherwise."""

    class Counting(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0]), batch[1]) * (self.global_step + 1) / (self.current_epoch + 1)

    eager, module, backend = Counting(), Counting(), Backend()
    fitted(eager, validates=False)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        fitted(torch.compile(module, backend=backend), validates=False)
    check_equal(weights(module), weights(eager))
    assert backend.graphs <= 5


# ------------------------------------------------------------------ a step's calls of its trainer


class ManyNames(Module):
    """Logs more names than torch compiles versions of one function."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.names = names
        self.logs: LightningModule | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self(batch[0]), batch[1])
        logs = self.logs or self
        for name in range(self.names):
            logs.log(f"loss {name}", loss, on_step=bool(name % 2), on_epoch=True)
        return loss


class ManyNamesOfAChild(ManyNames):
    """Logs them by the ``log`` of a module within it."""

    def __init__(self, names: int) -> None:
        super().__init__(names)
        self.logs = LightningModule()


@pytest.mark.parametrize(("way", "kind"), [(whole, ManyNames), (its_step, ManyNames), (whole, ManyNamesOfAChild)])
def test_logging_is_no_part_of_a_graph(way: Callable[..., Any], kind: type[ManyNames]) -> None:
    backends = [Backend(), Backend()]
    for names, backend in zip((1, 20), backends, strict=True):
        torch._dynamo.reset()
        eager, module = kind(names), kind(names)
        expected = fitted(eager, validates=False)
        trainer = fitted(way(module, backend=backend), validates=False)
        check_equal(trainer.callback_metrics, expected.callback_metrics)
    one, many = backends
    assert many.graphs == one.graphs
    assert many.runs == one.runs


@pytest.mark.parametrize("kind", [Module, Gan])
def test_nothing_is_left_on_the_module_and_its_optimizers(kind: type[LightningModule]) -> None:
    untouched = kind()
    eager = fitted(untouched, validates=False)
    module = kind()
    during: list[set[str]] = []
    trainer = trainer_with()
    trainer.signals.train_start.connect(lambda trainer, event: during.append(set(vars(trainer.module))))
    trainer.fit(torch.compile(module, backend="eager"), DATA)
    assert "log" in during[0]
    # A mark of torch, and one of Accelerate if another test has imported it.
    assert set(vars(module)) - set(vars(untouched)) <= {"_is_torch_compile", "_compile_kwargs"}
    assert [set(vars(optimizer)) for optimizer in trainer.optimizers] == [set(vars(each)) for each in eager.optimizers]


def test_nothing_is_left_after_an_error() -> None:
    class Failing(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                raise RuntimeError("in the step")
            super().training_step(batch, batch_idx)

    module = Failing()
    trainer = trainer_with()
    with pytest.raises(RuntimeError, match="in the step"):
        trainer.fit(torch.compile(module, backend="eager"), DATA)
    assert "log" not in vars(module)
    assert all("step" not in vars(optimizer) for optimizer in trainer.optimizers)


def test_a_patched_step_stays_patched() -> None:
    """A scheduler that is built on the wrapper patches its ``step``."""

    class OnTheWrapper(Gan):
        def on_fit_start(self) -> None:
            self.schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in self.optimizers()]

        def lr_schedulers(self) -> Any:
            return self.schedulers

    module, eager = OnTheWrapper(), OnTheWrapper()
    fitted(eager, validates=False)
    fitted(torch.compile(module, backend="eager"), validates=False)
    check_equal(weights(module), weights(eager))


def test_an_eager_run_puts_nothing_on_the_module() -> None:
    during: list[set[str]] = []
    trainer = trainer_with(max_epochs=1)
    trainer.signals.train_start.connect(lambda trainer, event: during.append(set(vars(trainer.module))))
    trainer.fit(Module(), DATA)
    assert "log" not in during[0]


# ------------------------------------------------------------------ torch.compile(module)


def test_the_trainers_module_is_the_original(tmp_path: Path) -> None:
    module = Module()
    trainer = fitted(torch.compile(module, backend="eager"), max_epochs=1)
    assert trainer.module is module and module.trainer is trainer
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if "_orig_mod" in name]
    check_equal(saved, weights(module))
    check_equal(weights(Module.load_from_checkpoint(tmp_path / "run.ckpt")), weights(module))


@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_a_run_that_begins_in_one_mode_resumes_in_the_other(first: str, tmp_path: Path) -> None:
    def model(compiled: bool) -> tuple[Module, Any]:
        module = Module()
        return module, torch.compile(module, backend="eager") if compiled else module

    whole_run, _ = model(False)
    fitted(whole_run, max_epochs=3)
    _, begins = model(first == "compiled")
    trainer = fitted(begins, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    random = torch.get_rng_state()
    resumed, goes_on = model(first == "eager")
    # Dropout draws from the state at the end of the first half, in place of the trainer's seed.
    trainer = trainer_with(max_epochs=3, seed=None, num_sanity_val_steps=0)
    trainer.signals.fit_start.connect(lambda trainer, event: torch.set_rng_state(random))
    trainer.fit(goes_on, DATA, DATA[:3], ckpt_path=tmp_path / "run.ckpt")
    check_equal(weights(resumed), weights(whole_run))


class Hooked(Module):
    """Overrides all methods of a step that a module may override, and records their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.seen.append(f"optimizer_step {batch_idx}")
        optimizer.step(closure=optimizer_closure)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, algorithm: Any = None) -> None:
        self.seen.append("configure_gradient_clipping")
        self.clip_gradients(optimizer, 0.1, "norm")

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.seen.append("backward")
        reference.backward(loss)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append("on_before_optimizer_step")

    def on_train_epoch_end(self) -> None:
        self.seen.append(f"on_train_epoch_end {float(self.trainer.callback_metrics['loss_epoch'])}")
        self.log("at the end", self.current_epoch)


def test_events_and_hooks_come_as_in_an_eager_run() -> None:
    names, seen = [], []
    for compiled in (False, True):
        module = Hooked()
        trainer = trainer_with(GradientAccumulation(2), max_epochs=2)
        with trainer.signals.trace() as trace:
            trainer.fit(torch.compile(module, backend="eager") if compiled else module, DATA, DATA[:3])
        names.append(trace.names())
        seen.append(module.seen)
    assert names[1] == names[0] and "before_forward" in names[0]
    assert seen[1] == seen[0] and seen[0]


def test_a_wrapper_of_the_step_is_given_the_compiled_one() -> None:
    called: list[tuple[str, int]] = []
    backend = Backend()

    def call(step: Callable[..., Any], *args: Any) -> Any:
        before = backend.runs
        outputs = step(*args)
        called.append((step.__name__, backend.runs - before))
        return outputs

    trainer = trainer_with(max_epochs=1, num_sanity_val_steps=0)
    trainer.signals.before_forward.connect(lambda trainer, event: setattr(event, "call", call))
    trainer.fit(torch.compile(Module(), backend=backend), DATA[:2], DATA[:1])
    assert [name for name, _ in called] == ["training_step", "training_step", "validation_step"]
    assert all(runs > 0 for _, runs in called)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_runs_compiled(stage: str) -> None:
    module, backend = Module(), Backend()
    expected = getattr(trainer_with(), stage)(module, DATA)
    actual = getattr(trainer_with(), stage)(torch.compile(module, backend=backend), DATA)
    assert backend.runs >= len(DATA)
    assert backend.graphs <= 2
    if stage == "predict":
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True))
    else:
        assert actual == expected


def test_the_last_runs_module_stays_compiled_and_is_compiled_once() -> None:
    module, backend = Module(), Backend()
    compiled = torch.compile(module, backend=backend)
    trainer = trainer_with(max_epochs=1)
    trainer.fit(compiled, DATA, DATA[:3])
    trainer.validate(dataloaders=DATA)
    graphs, runs = backend.graphs, backend.runs
    trainer.validate(dataloaders=DATA)
    assert backend.runs == runs + len(DATA)
    trainer.fit(compiled, DATA, DATA[:3])
    trainer_with(max_epochs=1).fit(compiled, DATA, DATA[:3])
    assert backend.graphs == graphs
    trainer.fit(module, DATA)  # passed without compilation, it runs without it
    runs = backend.runs
    trainer.validate(dataloaders=DATA)
    assert backend.runs == runs


def test_options_reach_the_backend() -> None:
    backend = Backend()
    fitted(torch.compile(Module(), backend=backend, options={"some": "option"}), max_epochs=1)
    assert backend.options and all(each == {"options": {"some": "option"}} for each in backend.options)
    torch._dynamo.reset()
    backend = Backend()
    fitted(torch.compile(Module(), backend=backend, mode="reduce-overhead"), max_epochs=1)
    assert backend.options and all(each == {"mode": "reduce-overhead"} for each in backend.options)


@pytest.mark.parametrize(("dynamic", "expected"), [(False, 3), (True, 1)])
def test_shapes_are_dynamic_if_asked(dynamic: bool, expected: int) -> None:
    class Quiet(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0]), batch[1])

    backend = Backend()
    sizes = [(torch.ones(size, 3), torch.ones(size, 1)) for size in (4, 3, 5, 4)]
    trainer_with(max_epochs=2).fit(torch.compile(Quiet(), backend=backend, dynamic=dynamic), sizes)
    assert backend.graphs == expected


def test_fullgraph_is_kept() -> None:
    class Quiet(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0]), batch[1])

    backend = Backend()
    fitted(torch.compile(Quiet(), backend=backend, fullgraph=True), max_epochs=1, validates=False)
    assert backend.graphs == 1
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"LightningModule\.log"):
        fitted(torch.compile(Module(), backend="eager", fullgraph=True), max_epochs=1)


def test_a_model_that_is_no_module_is_named() -> None:
    for model, named in ((nn.Linear(1, 1), "Linear"), (lambda x: x, "function")):
        with pytest.raises(MisconfigurationError, match=rf"The model is a {named}\. It has to derive from"):
            trainer_with().fit(torch.compile(model, backend="eager"), DATA)


# ------------------------------------------------------------------ copies


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_a_module_that_was_compiled_in_place_has_separate_weights(duplicate: Callable[..., Any]) -> None:
    module = Module()
    module.compile(backend="eager")
    module(DATA[0][0])
    copied = duplicate(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(copied(DATA[0][0]), torch.zeros(4, 1))
    assert not torch.equal(module(DATA[0][0]), torch.zeros(4, 1))


def test_a_copy_made_during_a_compiled_run_has_the_original_weights_and_trains() -> None:
    copies: list[Module] = []
    trainer = trainer_with(max_epochs=1)
    trainer.signals.fit_start.connect(lambda trainer, event: copies.append(copy.deepcopy(trainer.module)))
    module = Module()
    trainer.fit(torch.compile(module, backend="eager"), DATA)
    expected = fitted(Module(), max_epochs=1, validates=False)
    check_equal(weights(module), weights(expected.module))
    copied = copies[0]
    check_equal(weights(copied), weights(Module()))
    trainer = fitted(copied, max_epochs=1, validates=False)
    check_equal(weights(copied), weights(module))
    check_equal(trainer.callback_metrics, expected.callback_metrics)


# ------------------------------------------------------------------ the compiler itself


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor imports deprecated parts of torch
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("way", [whole, wrapped_networks])
def test_training_with_inductor_is_alike(way: Callable[..., Any]) -> None:
    class Deterministic(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net.dropout.p = 0.0  # inductor draws other numbers

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)  # Adam would blow up a difference in the last bit

    eager, module = Deterministic(), Deterministic()
    expected = fitted(eager, GradientAccumulation(2), GradientClipping(0.1), max_epochs=2)
    trainer = fitted(way(module), GradientAccumulation(2), GradientClipping(0.1), max_epochs=2)
    assert trainer.global_step == expected.global_step
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        trainer.callback_metrics["val_loss"], expected.callback_metrics["val_loss"], rtol=1e-3, atol=1e-4
    )
