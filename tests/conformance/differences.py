"""Cases in which eventtrain is right and Lightning is measurably not, each run by both.

``python -m tests.conformance.differences`` writes the table in docs/coming-from-lightning.md from these cases; a test
runs them all and checks that the table is fresh.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import eventtrain
from docs.generate import replaced
from eventtrain import callbacks as ours

from .frameworks import lightning

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from-lightning.md"


@dataclass
class Difference:
    """One case.

    Attributes:
        rule: The rule's letter and number, as the tests of the semantics name it.
        situation: The case, in a few words.
        run: Trains the case: ``run(Side)`` returns the value that is compared.
        theirs: The value of Lightning.
        ours: The value of eventtrain.
    """

    rule: str
    situation: str
    run: Callable[[Side], Any]
    theirs: Any
    ours: Any


class Side:
    """One of the two frameworks, with the words that differ."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.here = name == "eventtrain"
        self.base: type = eventtrain.LightningModule if self.here else lightning.LightningModule

    def trainer(self, *, accumulate: int = 1, fp16: bool = False, clip: Any = None, extra: Any = (), **options: Any) -> Any:
        options.setdefault("max_epochs", 1)
        options.setdefault("num_sanity_val_steps", 0)
        if self.here:
            attached: list[Any] = [ours.LRSchedulerStepping(), *extra]
            attached += [ours.GradientAccumulation(accumulate)] if accumulate != 1 else []
            attached += [ours.MixedPrecision("fp16", scaler=scaler())] if fp16 else []
            attached += [ours.GradientClipping(clip)] if clip is not None else []
            return eventtrain.Trainer(callbacks=attached, default_callbacks=False, device="cpu", **options)
        if fp16:
            options["plugins"] = [lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler())]
        return lightning.Trainer(
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            callbacks=list(extra),
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            barebones=False,
            **{"logger": False, "enable_checkpointing": False, **options},
        )

    def fit(self, module: Any, trainer: Any, count: int = 5, **loaders: Any) -> Any:
        trainer.fit(module, loader(count), **loaders)
        return module


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=256.0)


def loader(count: int) -> Any:
    """Return a loader of the batches x = 1, 2, 3, ..."""
    values: Any = torch.arange(1.0, count + 1)
    return torch.utils.data.DataLoader(values, batch_size=1)


def probe(base: type, **changes: Any) -> Any:
    """Return a module with w = 0, loss = w * x and plain SGD with rate 1, whose updates are the gradients."""

    class Probe(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))
            self.seen: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.w * batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    for name, change in changes.items():
        setattr(Probe, name, change)
    return Probe()


def outcome(action: Callable[[], Any]) -> Any:
    """Return the result of an action, or the name of its error."""
    try:
        return action()
    except Exception as error:
        return f"raises {type(error).__name__}"


def updates(side: Side, count: int, **options: Any) -> list[float]:
    """Return the updates of the probe."""
    values = [0.0]

    def on_train_batch_end(self: Any, *args: Any) -> None:
        if float(self.w) != values[-1]:
            values.append(float(self.w))

    side.fit(probe(side.base, on_train_batch_end=on_train_batch_end), side.trainer(**options), count)
    return [round(before - after, 4) for before, after in pairwise(values)]


# ------------------------------------------------------------------ the cases


def lbfgs_with_accumulation(side: Side) -> Any:
    module = probe(side.base, configure_optimizers=lambda self: torch.optim.LBFGS(self.parameters(), max_iter=2))
    return outcome(lambda: bool(side.fit(module, side.trainer(accumulate=2), 4)) and "trains")


def none_losses(side: Side) -> Any:
    trainer = side.trainer()
    side.fit(probe(side.base, training_step=lambda self, batch, batch_idx: None), trainer, 3)
    return trainer.global_step


def loss_in_hooks(side: Side) -> Any:
    def on_before_backward(self: Any, loss: Any) -> None:
        self.seen.append(float(loss))

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        return (self.w * batch).sum() + 8.0

    return side.fit(
        probe(side.base, training_step=step, on_before_backward=on_before_backward), side.trainer(accumulate=2), 2
    ).seen


def stop_iteration(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        raise StopIteration

    return outcome(lambda: bool(side.fit(probe(side.base, training_step=step), side.trainer(), 3)) and "ends the epoch")


def short_window(side: Side) -> Any:
    return updates(side, 5, accumulate=2)


def validation_in_a_window(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> None:
        self.manual_backward((self.w * batch).sum() / 4)
        if (batch_idx + 1) % 4 == 0:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()

    def validate(self: Any, batch: Any, batch_idx: int) -> None:
        return None

    module = probe(side.base, training_step=step, validation_step=validate)
    module.automatic_optimization = False
    side.fit(module, side.trainer(val_check_interval=2), 4, val_dataloaders=loader(1))
    return round(-float(module.w), 4)


def clip_at_zero(side: Side) -> Any:
    return outcome(lambda: updates(side, 2, clip=0.0))


def clip_harder_later(side: Side) -> Any:
    def configure_gradient_clipping(
        self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.current_epoch > 0:
            gradient_clip_val = gradient_clip_val * 2
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    module = probe(side.base, configure_gradient_clipping=configure_gradient_clipping)
    trainer = side.trainer(clip=0.5, max_epochs=2)
    return outcome(lambda: round(-float(side.fit(module, trainer, 2).w), 4))


def clip_in_manual_fp16(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.w * batch).sum())
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()

    module = probe(side.base, training_step=step)
    module.automatic_optimization = False
    return round(-float(side.fit(module, side.trainer(fp16=True), 1).w), 4)


def optimizer_and_scheduler(side: Side) -> Any:
    def build(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)

    return outcome(lambda: bool(side.fit(probe(side.base, configure_optimizers=build), side.trainer(), 1)) and "trains")


def unknown_key(side: Side) -> Any:
    def build(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return [optimizer], [{"scheduler": scheduler, "freqency": 2}]

    return outcome(lambda: bool(side.fit(probe(side.base, configure_optimizers=build), side.trainer(), 1)) and "drops the key")


def scheduler_steps(side: Side, count: int, *, frequency: int, step: Any = None, **options: Any) -> int:
    calls: list[None] = []

    def build(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": frequency}]

    def lr_scheduler_step(self: Any, scheduler: Any, metric: Any) -> None:
        calls.append(None)
        scheduler.step()

    changes = {"configure_optimizers": build, "lr_scheduler_step": lr_scheduler_step}
    if step is not None:
        changes["training_step"] = step
    side.fit(probe(side.base, **changes), side.trainer(**options), count)
    return len(calls)


def scheduler_with_accumulation(side: Side) -> Any:
    return scheduler_steps(side, 6, frequency=2, accumulate=2)


def scheduler_across_epochs(side: Side) -> Any:
    return scheduler_steps(side, 5, frequency=3, max_epochs=3)


def scheduler_without_updates(side: Side) -> Any:
    return scheduler_steps(side, 3, frequency=1, step=lambda self, batch, batch_idx: None)


def nested_toggle(side: Side) -> Any:
    def build(self: Any) -> Any:
        return [torch.optim.SGD([self.w], lr=1.0), torch.optim.SGD([self.v], lr=1.0)]

    def step(self: Any, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        with self.toggled_optimizer(first), self.toggled_optimizer(second):
            pass
        self.seen.append((self.w.requires_grad, self.v.requires_grad))

    module = probe(side.base, configure_optimizers=build, training_step=step)
    module.v = nn.Parameter(torch.zeros(()))
    module.automatic_optimization = False
    return side.fit(module, side.trainer(), 1).seen[0]


def two_optimizers_count_once(side: Side) -> Any:
    def build(self: Any) -> Any:
        return [torch.optim.SGD([self.w], lr=1.0), torch.optim.SGD([self.v], lr=1.0)]

    def step(self: Any, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(((self.w + self.v) * batch).sum())
            optimizer.step()
        self.seen.append(batch_idx)

    module = probe(side.base, configure_optimizers=build, training_step=step)
    module.v = nn.Parameter(torch.zeros(()))
    module.automatic_optimization = False
    side.fit(module, side.trainer(max_epochs=-1, max_steps=5), 20)
    return len(module.seen)


def estimate_with_a_schedule(side: Side) -> Any:
    schedule = {0: 4, 1: 2, 2: 1}
    if side.here:
        extra: Any = ours.GradientAccumulation(schedule)
    else:
        extra = lightning.callbacks.GradientAccumulationScheduler(schedule)
    trainer = side.trainer(extra=[extra], max_epochs=3)

    def build(self: Any) -> Any:
        self.seen.append(int(self.trainer.estimated_stepping_batches))
        return torch.optim.SGD(self.parameters(), lr=1.0)

    module = side.fit(probe(side.base, configure_optimizers=build), trainer, 6)
    return f"estimates {module.seen[0]}, takes {trainer.global_step}"


def two_backwards_first(side: Side) -> Any:
    def build(self: Any) -> Any:
        return [torch.optim.SGD([self.w], lr=1.0), torch.optim.SGD([self.v], lr=1.0)]

    def step(self: Any, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward((self.w * batch).sum())
        self.manual_backward((self.v * batch).sum())
        first.step()
        second.step()

    module = probe(side.base, configure_optimizers=build, training_step=step)
    module.v = nn.Parameter(torch.zeros(()))
    module.automatic_optimization = False
    trainer = side.trainer(fp16=True)
    # The scale grows after each step, so that a scale that changes too early shows.
    precision = trainer.callback(ours.MixedPrecision) if side.here else trainer.precision_plugin
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
    side.fit(module, trainer, 1)
    return [round(-float(module.w), 4), round(-float(module.v), 4)]


def closure_then_step_in_fp16(side: Side) -> Any:
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer_closure()
        optimizer.step()

    module = probe(side.base, optimizer_step=optimizer_step)
    return round(0.0 - float(side.fit(module, side.trainer(fp16=True), 2).w), 4)


def steps_with_overflow(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        return (self.w * batch).sum() * (float("inf") if batch_idx == 1 else 1.0)

    return scheduler_steps(side, 3, frequency=1, step=step, fp16=True)


def random_numbers_in_validation(side: Side) -> Any:
    def validate(self: Any, batch: Any, batch_idx: int) -> None:
        torch.rand(3)

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.seen.append(round(float(torch.rand(())), 6))
        return (self.w * batch).sum()

    def draws(validated: bool) -> Any:
        torch.manual_seed(0)
        module = probe(side.base, training_step=step, validation_step=validate)
        return side.fit(module, side.trainer(max_epochs=2), 2, val_dataloaders=loader(1) if validated else None).seen

    return "same draws" if draws(True) == draws(False) else "other draws"


def weighted_window(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        return {"loss": (self.w * batch).sum(), "weight": float(3 - 2 * batch_idx)}  # 3, then 1

    return round(-float(side.fit(probe(side.base, training_step=step), side.trainer(accumulate=2), 2).w), 4)


def clipping_in_manual_mode(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.w * batch).sum())
        optimizer.step()

    def train() -> Any:
        module = probe(side.base, training_step=step)
        module.automatic_optimization = False
        return round(-float(side.fit(module, side.trainer(clip=0.5), 2).w), 4)

    return outcome(train)


def total_norm(side: Side) -> Any:
    def configure_gradient_clipping(self: Any, optimizer: Any, *_: Any, **__: Any) -> None:
        norm = self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        self.seen.append(None if norm is None else float(norm))

    return side.fit(probe(side.base, configure_gradient_clipping=configure_gradient_clipping), side.trainer(), 2).seen


def raw_step_in_fp16(side: Side) -> Any:
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.optimizer.step(closure=optimizer_closure)

    module = probe(side.base, optimizer_step=optimizer_step)
    return round(-float(side.fit(module, side.trainer(fp16=True), 4).w), 4)


def last_validation(side: Side) -> Any:
    def validate(self: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch_idx)

    module = probe(side.base, validation_step=validate)
    side.fit(module, side.trainer(max_steps=3), 5, val_dataloaders=loader(1))
    return len(module.seen)


def overflow_counts(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        return (self.w * batch).sum() * (float("inf") if batch_idx == 1 else 1.0)

    trainer = side.trainer(fp16=True)
    side.fit(probe(side.base, training_step=step), trainer, 3)
    return trainer.global_step


def none_closes_a_window(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else (self.w * batch).sum()

    def train() -> Any:
        return (
            round(-float(side.fit(probe(side.base, training_step=step), side.trainer(accumulate=2, fp16=True), 2).w), 4) + 0.0
        )

    return outcome(train)


def hooks_in_manual_mode(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.w * batch).sum())
        optimizer.step()

    def on_before_zero_grad(self: Any, optimizer: Any) -> None:
        self.seen.append(None)

    module = probe(side.base, training_step=step, on_before_zero_grad=on_before_zero_grad)
    module.automatic_optimization = False
    return len(side.fit(module, side.trainer(), 3).seen)


def float_in_64_bits(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("n", 67128463.0, on_step=False, on_epoch=True)
        return (self.w * batch).sum()

    trainer = side.trainer()
    side.fit(probe(side.base, training_step=step), trainer, 1)
    return float(trainer.callback_metrics["n"])


def steps_by_other_methods(side: Side) -> Any:
    class SAM(torch.optim.SGD):
        @torch.no_grad()
        def second_step(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad)

    def step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.w * batch).sum())
        optimizer.second_step()

    module = probe(side.base, training_step=step, configure_optimizers=lambda self: SAM(self.parameters(), lr=1.0))
    module.automatic_optimization = False
    trainer = side.trainer()
    side.fit(module, trainer, 3)
    return trainer.global_step


def growing_data(side: Side) -> Any:
    class Grows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        count = 2

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> Any:
            return torch.tensor(float(index + 1))

    data = Grows()

    def on_train_epoch_end(self: Any) -> None:
        data.count += 1

    module = probe(side.base, training_step=recorded, on_train_epoch_end=on_train_epoch_end)
    side.trainer(max_epochs=3).fit(module, torch.utils.data.DataLoader(data, batch_size=1))
    return len(module.seen)


def bare_optimizer(side: Side) -> Any:
    class Bare:
        def __init__(self, parameters: Any) -> None:
            self.param_groups = [{"params": list(parameters)}]
            self.defaults: dict[str, Any] = {}
            self.state: dict[Any, Any] = {}

        def zero_grad(self, set_to_none: bool = True) -> None: ...

        def step(self, closure: Any) -> Any:
            return closure()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    module = probe(side.base, configure_optimizers=lambda self: Bare(self.parameters()))
    return outcome(lambda: "trains" if side.fit(module, side.trainer(), 1) else "")


def list_of_one_loader(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.seen.append(type(batch).__name__)
        return self.w.sum()

    module = probe(side.base, training_step=step)
    side.trainer().fit(module, [loader(1)])
    return module.seen[0]


def one_name_from_two_loaders(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.log("value", batch.mean(), add_dataloader_idx=False, batch_size=1)

    module = probe(side.base, validation_step=step)
    quiet = {} if side.here else {"verbose": False}
    results = outcome(lambda: side.trainer().validate(module, [loader(1), loader(3)], **quiet))
    return results if isinstance(results, str) else [each["value"] for each in results]


def child_that_logs(side: Side) -> Any:
    class Child(side.base):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            self.log("child", x.mean())
            return x

    module = probe(side.base, training_step=lambda self, batch, batch_idx: (self.w * self.child(batch)).sum())
    module.child = Child()
    trainer = side.trainer()
    return outcome(lambda: bool(side.fit(module, trainer, 1)) and sorted(trainer.callback_metrics))


def second_fit(side: Side) -> Any:
    trainer = side.trainer(max_epochs=2)
    return [len(side.fit(probe(side.base, training_step=recorded), trainer, 3).seen) for _ in range(2)]


def recorded(self: Any, batch: Any, batch_idx: int) -> Any:
    self.seen.append(float(batch))
    return (self.w * batch).sum()


def stopped_epoch(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            if side.here:
                self.trainer.stop("the test wants it")
            else:
                self.trainer.should_stop = True
        return (self.w * batch).sum()

    trainer = side.trainer(max_epochs=3)
    side.fit(probe(side.base, training_step=step), trainer, 5)
    return trainer.current_epoch


def scheduler_of_a_left_epoch(side: Side) -> Any:
    def build(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)]

    def lr_scheduler_step(self: Any, scheduler: Any, metric: Any) -> None:
        self.seen.append(None)
        scheduler.step()

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 1 else None

    changes = {"configure_optimizers": build, "lr_scheduler_step": lr_scheduler_step}
    return len(side.fit(probe(side.base, on_train_batch_start=on_train_batch_start, **changes), side.trainer(), 3).seen)


def loaders_and_optimizers(side: Side) -> Any:
    def train_dataloader(self: Any) -> Any:
        self.seen.append("loader")
        return loader(1)

    def build(self: Any) -> Any:
        self.seen.append("optimizer")
        return torch.optim.SGD(self.parameters(), lr=1.0)

    module = probe(side.base, configure_optimizers=build, train_dataloader=train_dataloader)
    side.trainer().fit(module)
    return module.seen


def x_axis(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("x", float(batch))
        return (self.w * batch).sum()

    places: list[int] = []

    class Theirs(lightning.loggers.CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            places.append(step)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        def save(self) -> None:
            pass

    class Here:
        def on_metrics_logged(self, trainer: Any, event: Any) -> None:
            if event.scope == "step":
                places.append(event.step)

    options = {"extra": [Here()]} if side.here else {"logger": Theirs("."), "log_every_n_steps": 1}
    side.fit(probe(side.base, training_step=step), side.trainer(**options), 3)
    return places


def keyboard_interrupt(side: Side) -> Any:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        raise KeyboardInterrupt

    try:
        side.fit(probe(side.base, training_step=step), side.trainer(), 3)
    except BaseException as error:
        return f"raises {type(error).__name__}"
    return "returns"


def resumed(side: Side, at: int, **options: Any) -> Any:
    """Save a checkpoint after a number of 4 batches, and resume it; return the module."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.ckpt"

        def save(trainer: Any, batch_idx: int) -> None:
            if batch_idx + 1 == at:
                trainer.save_checkpoint(path)

        class Here:
            def on_safe_point(self, trainer: Any, event: Any) -> None:
                save(trainer, trainer.batch_idx)

        class Theirs(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                save(trainer, batch_idx)

        extra = [Here() if side.here else Theirs()]
        side.fit(probe(side.base, training_step=recorded), side.trainer(extra=extra, **options), 4)
        return side.fit(probe(side.base, training_step=recorded), side.trainer(**options), 4, ckpt_path=path)


def resumed_batches(side: Side) -> Any:
    return resumed(side, 2).seen


def resumed_window(side: Side) -> Any:
    return round(-float(resumed(side, 3, accumulate=2).w), 4)


def damaged_checkpoint(side: Side) -> Any:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the damaged file is named

        def trainer() -> Any:
            if side.here:
                return side.trainer(extra=[ours.ModelCheckpoint(folder, every_n_steps=2)])
            keep = lightning.callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_last=True, save_top_k=-1)
            return side.trainer(extra=[keep], enable_checkpointing=True)

        side.fit(probe(side.base), trainer(), 4)
        last = Path(folder) / "last.ckpt"
        last.write_bytes(last.read_bytes()[:100])
        if side.here:  # the newest file has two names
            for path in Path(folder).glob("*step=4.ckpt"):
                path.unlink()
        return outcome(
            lambda: bool(side.fit(probe(side.base), trainer(), 4, ckpt_path="last")) and "resumes from the one before"
        )


# fmt: off
DIFFERENCES = [
    Difference("A5", "LBFGS with accumulation over 2 batches",
               lbfgs_with_accumulation, "trains", "raises MisconfigurationError"),
    Difference("A6", "3 batches whose loss is None: `global_step`", none_losses, 3, 0),
    Difference("A7", "loss 8, accumulation over 2: the loss in `on_before_backward`",
               loss_in_hooks, [4.0, 4.0], [8.0, 8.0]),
    Difference("A9", "a `StopIteration` in `training_step`",
               stop_iteration, "ends the epoch", "raises StopIteration"),
    Difference("B3", "5 batches, accumulation over 2: the updates", short_window, [1.5, 3.5, 2.5], [1.5, 3.5, 5.0]),
    Difference("B4", "2 batches of weight 3 and 1 in a window: the update", weighted_window, 1.5, 1.25),
    Difference("B7", "validation amid 4 batches accumulated by hand: the update", validation_in_a_window, 1.75, 2.5),
    Difference("C2", "a clipping threshold of 0: the updates", clip_at_zero, [1.0, 2.0], "raises MisconfigurationError"),
    Difference("C3", "`gradient_clip_val * 2` in `configure_gradient_clipping`",
               clip_harder_later, "raises MisconfigurationException", 3.0),
    Difference("C4", "`clip_gradients` to 0.5 in manual fp16: the update", clip_in_manual_fp16, 0.002, 0.5),
    Difference("C4", "clipping to 0.5 attached in manual mode, 2 batches",
               clipping_in_manual_mode, "raises MisconfigurationException", 1.0),
    Difference("C5", "the result of `clip_gradients`", total_norm, [None, None], [1.0, 2.0]),
    Difference("D1", "`(optimizer, scheduler)` from `configure_optimizers`",
               optimizer_and_scheduler, "raises MisconfigurationException", "trains"),
    Difference("D1", "`'freqency'` in a scheduler's config", unknown_key, "drops the key", "raises MisconfigurationError"),
    Difference("D3", "`interval='step'`, `frequency=2`, accumulation over 2, 6 batches: scheduler steps",
               scheduler_with_accumulation, 3, 1),
    Difference("D3", "`interval='step'`, `frequency=3`, 3 epochs of 5 batches: scheduler steps",
               scheduler_across_epochs, 3, 5),
    Difference("D4", "3 batches whose loss is None: scheduler steps", scheduler_without_updates, 3, 0),
    Difference("D4", "fp16, 3 batches, one overflows: scheduler steps", steps_with_overflow, 3, 2),
    Difference("D5", "`max_epochs=3`, a stop within the first epoch: `current_epoch` afterwards", stopped_epoch, 1, 0),
    Difference("D5", "`on_train_batch_start` returns -1 for the second batch: steps of the epoch's scheduler",
               scheduler_of_a_left_epoch, 1, 0),
    Difference("E2", "manual optimization, 3 batches: calls of `on_before_zero_grad`", hooks_in_manual_mode, 0, 3),
    Difference("E3", "after a `toggled_optimizer` within another: do the parameters of both need gradients",
               nested_toggle, (True, False), (True, True)),
    Difference("F2", "fp16, `optimizer.optimizer.step(closure)`, 4 batches: the sum of updates",
               raw_step_in_fp16, 2560.0, 10.0),
    Difference("G1", "two optimizers a batch, `max_steps=5`: batches trained", two_optimizers_count_once, 3, 5),
    Difference("G2", "accumulation {0: 4, 1: 2, 2: 1} over 6 batches",
               estimate_with_a_schedule, "estimates 18, takes 11", "estimates 11, takes 11"),
    Difference("G2", "the order in which `fit` prepares a run",
               loaders_and_optimizers, ["optimizer", "loader"], ["loader", "optimizer"]),
    Difference("G3", "`max_steps=3` in an epoch of 5 batches: validations", last_validation, 0, 1),
    Difference("H2", "fp16, two optimizers, both backwards first: the updates", two_backwards_first, [1.0, 0.5], [1.0, 1.0]),
    Difference("H3", "fp16, 3 batches, one overflows: `global_step`", overflow_counts, 3, 2),
    Difference("H4", "fp16, `closure(); optimizer.step()` in `optimizer_step`, 2 batches: the sum of updates",
               closure_then_step_in_fp16, 0.0, 3.0),
    Difference("H5", "fp16, the batch that closes a window has the loss None: the update", none_closes_a_window, 0.0, 1.0),
    Difference("I1", "`self.log(\"n\", 67128463.0)`: the value", float_in_64_bits, 67128464.0, 67128463.0),
    Difference("I1", "one name for two evaluation loaders with `add_dataloader_idx=False`: their results",
               one_name_from_two_loaders, "raises MisconfigurationException", [1.0, 2.0]),
    Difference("I1", "`self.log` in a module within the module",
               child_that_logs, "raises MisconfigurationException", ["child"]),
    Difference("I1", "the x of the values that 3 steps log", x_axis, [0, 1, 2], [1, 2, 3]),
    Difference("J1", "training's random numbers with and without validation",
               random_numbers_in_validation, "other draws", "same draws"),
    Difference("J3", "a `KeyboardInterrupt` in `training_step`",
               keyboard_interrupt, "raises SystemExit", "raises KeyboardInterrupt"),
    Difference("K2", "data of 2, then 3, then 4 samples: batches of one that 3 epochs train", growing_data, 6, 9),
    Difference("K3", "3 steps by a method `second_step` of the optimizer: `global_step`", steps_by_other_methods, 0, 3),
    Difference("K3", "an object that is no `torch.optim.Optimizer`, with its methods",
               bare_optimizer, "trains", "raises MisconfigurationError"),
    Difference("K8", "`fit(module, [loader])`: a batch", list_of_one_loader, "list", "Tensor"),
    Difference("K8", "`max_epochs=2`, `fit` twice with one trainer, 3 batches: batches trained", second_fit, [6, 0], [6, 6]),
    Difference("K8", "a checkpoint after 2 of 4 batches: batches that the resumed epoch trains",
               resumed_batches, [1.0, 2.0], [3.0, 4.0]),
    Difference("K8", "accumulation over 2, a checkpoint after 3 of 4 batches: the sum of updates in the end",
               resumed_window, 2.0, 5.0),
    Difference("K8", "`ckpt_path=\"last\"`, and the newest file is cut short",
               damaged_checkpoint, "raises RuntimeError", "resumes from the one before"),
]
# fmt: on


def measured() -> Iterator[tuple[Difference, Any, Any]]:
    """Yield every case with the values of both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        for difference in DIFFERENCES:
            yield difference, difference.run(Side("lightning")), difference.run(Side("eventtrain"))


def table() -> str:
    """Return the table of the documentation, from measured values."""

    def shown(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    lines = ["| rule | situation | Lightning | eventtrain |", "|---|---|---|---|"]
    lines += [f"| {d.rule} | {d.situation} | {shown(theirs)} | {shown(here)} |" for d, theirs, here in measured()]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(table())
    else:
        PAGE.write_text(replaced(PAGE.read_text(), "differences", table()))
