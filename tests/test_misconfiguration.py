"""Callbacks that are refused, each beside the nearest form that trains."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import pytest

from eventtrain import Callback, Trainer, seed_everything
from eventtrain.callbacks import (
    DistributedDataParallel,
    EarlyStopping,
    FullyShardedDataParallel,
    GradientAccumulation,
    GradientClipping,
    GradientNormMonitor,
    JSONLinesLogger,
    LambdaCallback,
    MixedPrecision,
    ModelCheckpoint,
    ModelSummary,
    Profiler,
    ProgressBar,
    TensorBoardLogger,
    TerminateOnNaN,
    Timer,
)
from tests.kit import ModuleOf
from tests.misconfigurations import (
    BATCHES,
    Case,
    Data,
    after_fit,
    before_fit,
    check_refusal,
    check_remedy,
    evaluates,
    fit,
)

pytestmark = pytest.mark.usefixtures("in_tmp_path")


class Misspelled(Callback):
    def on_train_batch_stop(self, trainer: Any, event: Any) -> None:
        pass


class Spelled(Callback):
    def on_train_batch_end(self, trainer: Any, event: Any) -> None:
        pass


class WrongArguments(Callback):
    def on_train_batch_end(self, trainer: Any) -> None:  # type: ignore[override]
        pass


class ForLightning(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        pass


class Coroutine(Callback):
    async def on_train_batch_end(self, trainer: Any, event: Any) -> None:  # type: ignore[override]
        pass


class Keeps(Callback):
    def __init__(self, key: str = "kept") -> None:
        self.key = key

    @property
    def state_key(self) -> str:
        return self.key

    def state_dict(self) -> dict[str, Any]:
        return {"value": 1}


def listener(name: str, *parameters: str) -> Any:
    """Return a callback that has a method with these parameters, and a handler."""
    namespace: dict[str, Any] = {}
    exec(f"def {name}({', '.join(('self', *parameters))}): pass", namespace)
    return type("Listener", (Callback,), {name: namespace[name], "on_fit_end": lambda self, trainer, event: None})()


def foreign(name: str, module: str) -> Any:
    """Return an object of a user's class that derives from a class of another library."""
    base = type(name, (), {"__module__": module})
    return type("Mine", (base,), {"on_fit_end": lambda self, trainer, event: None})()


class ForgetsSuper(EarlyStopping):
    def __init__(self, limit: float) -> None:
        self.limit = limit


class CallsSuper(EarlyStopping):
    def __init__(self, limit: float) -> None:
        super().__init__("w", threshold=limit)


class Counts(Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: Any, event: Any) -> None:
        self.count += 1


class ForgetsToCount(Counts):
    def __init__(self) -> None:
        self.name = "batches"


class CountsToo(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.name = "batches"


def monitored(callback: Any) -> Trainer:
    model = ModuleOf()
    model.on_train_epoch_end = lambda: model.log("w", model.w)  # type: ignore[method-assign]
    return fit(model, callback)


def wrong_call(stage: str, **arguments: Any) -> Any:
    """Call a stage with arguments by name, after a module."""
    return before_fit(lambda trainer: getattr(trainer, stage)(ModuleOf(), **arguments))


def right_call(stage: str, *args: Any, **arguments: Any) -> Trainer:
    model = evaluates(test_step=lambda self, batch, batch_idx: None, forward=lambda self, batch: batch)
    return after_fit(lambda trainer, module: getattr(trainer, stage)(module, *args, **arguments), model)


ARGUMENTS: dict[str, Case] = {
    # ---------------------------------------------------------------- the arguments of Trainer
    **{
        f"Trainer({name}={value!r})": Case(
            lambda name=name, value=value: fit(**{name: value}),  # type: ignore[misc]
            (rf"Trainer\({name}={re.escape(repr(value))}\): there is no such argument", *message),
            right,
        )
        for name, value, message, right in (
            ("accelerator", "gpu", (r"Trainer\(device='cuda'\)",), lambda: fit(device="cpu")),
            ("devices", 4, ("DistributedDataParallel", "torchrun"), fit),
            ("strategy", "fsdp", (r"FullyShardedDataParallel\(\)",), fit),
            ("precision", "16-mixed", (r"MixedPrecision\('fp16'\)",), lambda: fit(None, MixedPrecision("bf16"))),
            ("logger", True, (r"TensorBoardLogger\(\)", "JSONLinesLogger"), lambda: fit(None, JSONLinesLogger())),
            (
                "log_every_n_steps",
                1,
                (r"TensorBoardLogger\(log_every_n_steps=1\)",),
                lambda: fit(None, TensorBoardLogger(log_every_n_steps=1)),
            ),
            ("max_time", "00:12:00:00", (r"Timer\('00:12:00:00'\)",), lambda: fit(None, Timer("00:12:00:00"))),
            ("overfit_batches", 2, (r"Trainer\(limit_train_batches=2\)",), lambda: fit(limit_train_batches=2)),
            ("enable_checkpointing", True, (r"ModelCheckpoint\(\)",), lambda: fit(None, ModelCheckpoint())),
            ("enable_progress_bar", False, ("default_callbacks=False",), lambda: fit(default_callbacks=False)),
            ("enable_model_summary", True, (r"ModelSummary\(\)",), lambda: fit(None, ModelSummary())),
            ("accumulate_grad_batches", 2, (r"GradientAccumulation\(2\)",), lambda: fit(None, GradientAccumulation(2))),
            ("gradient_clip_val", 0.5, (r"GradientClipping\(0\.5\)",), lambda: fit(None, GradientClipping(0.5))),
            (
                "gradient_clip_algorithm",
                "value",
                (r"GradientClipping\(1\.0, 'value'\)",),
                lambda: fit(None, GradientClipping(1.0, "value")),
            ),
            ("profiler", "simple", (r"Profiler\(\)",), lambda: fit(None, Profiler(print_summary=False))),
            ("plugins", [], ("on_before_forward", "Preemption"), fit),
            ("gpus", 1, (r"Trainer\(device='cuda'\)",), fit),
            ("resume_from_checkpoint", "a.ckpt", (r"trainer\.fit\(model, ckpt_path='a\.ckpt'\)",), fit),
            ("progress_bar_refresh_rate", 20, (r"ProgressBar\(interval=",), lambda: fit(None, ProgressBar(interval=0.5))),
            (
                "track_grad_norm",
                2,
                (r"GradientNormMonitor\(norm_type=2\)",),
                lambda: fit(None, GradientNormMonitor(norm_type=2)),
            ),
            ("terminate_on_nan", True, (r"TerminateOnNaN\(\)",), lambda: fit(None, TerminateOnNaN())),
            ("auto_lr_find", True, ("max_steps=100",), lambda: fit(max_epochs=None, max_steps=2)),
            ("num_train_epochs", 3, (r"Trainer\(max_epochs=3\)",), lambda: fit(max_epochs=3)),
            ("max_duration", "2ep", (r"Trainer\(max_epochs=3\)", "Timer"), lambda: fit(max_epochs=2)),
            ("eval_steps", 2, ("val_check_interval=2, check_val_every_n_epoch=None",), fit),
            ("train_dataset", [1, 2], (r"trainer\.fit\(model, torch\.utils\.data\.DataLoader",), fit),
            ("max_epoch", 3, ("Did you mean 'max_epochs'",), lambda: fit(max_epochs=3)),
            ("limit_validation_batches", 1, ("Did you mean 'limit_",), lambda: fit(limit_val_batches=1)),
            ("acelerator", "cpu", ("Did you mean 'accelerator'", "device='cuda'"), fit),
            ("zzz", 1, ("The arguments are max_epochs, min_epochs",), fit),
        )
    },
    "several arguments of Lightning": Case(
        lambda: fit(accelerator="gpu", gradient_clip_val=1.0),
        (r"Trainer\(accelerator='gpu'\).*\n.*Trainer\(gradient_clip_val=1\.0\)",),
        lambda: fit(None, GradientClipping(1.0)),
    ),
    "a number of epochs by position": Case(
        lambda: Trainer(10),  # type: ignore[call-arg]
        (r"Trainer\(10\): too many positional arguments", r"Trainer\(max_epochs=3\)"),
        lambda: fit(max_epochs=3),
    ),
    "a model by position": Case(
        lambda: Trainer(ModuleOf(), 3),  # type: ignore[call-arg, arg-type]
        (r"Trainer\(.*, 3\): too many positional", r"trainer\.fit\(model"),
        fit,
    ),
    # ---------------------------------------------------------------- the arguments of the stages
    **{
        f"{stage}({', '.join(arguments)})": Case(
            lambda stage=stage, arguments=arguments: wrong_call(stage, **arguments),  # type: ignore[misc]
            (rf"Trainer\.{stage}\({next(iter(arguments))}=", "there is no such argument", message),
            right,
        )
        for stage, arguments, message, right in (
            ("fit", {"train_dataloader": BATCHES}, "train_dataloaders=loader", fit),
            (
                "fit",
                {"train_loader": BATCHES, "val_loader": BATCHES},
                r"\n.*val_dataloaders=loader",
                lambda: fit(evaluates(), val=BATCHES),
            ),
            ("fit", {"trainloader": BATCHES}, "train_dataloaders=loader", fit),
            ("fit", {"dm": Data()}, "datamodule=datamodule", lambda: fit(data=None, datamodule=Data())),
            ("fit", {"ckpt": "last"}, "ckpt_path='last'", fit),
            ("fit", {"epochs": 3}, r"Trainer\(max_epochs=3\)", lambda: fit(max_epochs=3)),
            ("fit", {"callback": []}, r"Trainer\(callbacks=\[\.\.\.\]\)", fit),
            ("validate", {"verbose": False}, "print the result", lambda: right_call("validate", BATCHES)),
            ("validate", {"val_dataloaders": BATCHES}, "Did you mean 'dataloaders'", lambda: right_call("validate", BATCHES)),
            ("test", {"test_dataloaders": BATCHES}, "Did you mean 'dataloaders'", lambda: right_call("test", BATCHES)),
            ("predict", {"data": BATCHES}, "dataloaders=loader", lambda: right_call("predict", dataloaders=BATCHES)),
        )
    },
    "seeding with workers": Case(
        lambda: seed_everything(1, workers=True),  # type: ignore[call-arg]
        (r"seed_everything\(workers=True\): there is no such argument", "workers of loaders are seeded too"),
        lambda: fit(seed=seed_everything(1)),
    ),
    "seeding without a number": Case(
        lambda: seed_everything(),  # type: ignore[call-arg]
        (r"seed_everything\(\): missing a required argument: 'seed'",),
        lambda: fit(seed=seed_everything(1)),
    ),
    # ---------------------------------------------------------------- callbacks that nobody calls, or of other libraries
    **{
        f"a callback's {name}({', '.join(parameters)})": Case(
            lambda name=name, parameters=parameters: fit(None, listener(name, *parameters)),  # type: ignore[misc]
            (rf"Listener\.{name}", message),
            right,
        )
        for name, parameters, message, right in (
            (
                "setup",
                ("trainer", "pl_module", "stage"),
                r"never called\. Write `def on_setup\(self, trainer, event\)`",
                lambda: fit(None, listener("on_setup", "trainer", "event")),
            ),
            (
                "teardown",
                ("trainer", "pl_module", "stage=None"),
                r"Write `def on_teardown\(self, trainer, event\)`",
                lambda: fit(None, listener("on_teardown", "trainer", "event")),
            ),
            (
                "train_epoch_end",
                ("trainer", "event"),
                r"Write `def on_train_epoch_end\(self, trainer, event\)`",
                lambda: fit(None, listener("on_train_epoch_end", "trainer", "event")),
            ),
            (
                "on_sanity_check_start",
                ("trainer", "pl_module"),
                r"on_validation_start\(self, trainer, event\)`, and ask `trainer\.sanity_checking`",
                lambda: fit(None, listener("on_validation_start", "trainer", "event")),
            ),
            ("on_init_start", ("trainer",), r"on_setup\(", lambda: fit(None, listener("on_setup", "trainer", "event"))),
            (
                "on_keyboard_interrupt",
                ("trainer", "pl_module"),
                "event.exception, KeyboardInterrupt",
                lambda: fit(None, listener("on_exception", "trainer", "event")),
            ),
            (
                "on_epoch_end",
                ("trainer", "pl_module"),
                r"on_train_epoch_end\(.*on_validation_epoch_end\(",
                lambda: fit(None, listener("on_validation_epoch_end", "trainer", "event")),
            ),
            (
                "on_batch_end",
                ("trainer", "pl_module"),
                r"on_train_batch_end\(",
                lambda: fit(None, listener("on_train_batch_end", "trainer", "event")),
            ),
            (
                "on_step_end",
                ("args", "state", "control", "**kwargs"),
                r"on_after_update\(",
                lambda: fit(None, listener("on_after_update", "trainer", "event")),
            ),
            (
                "on_train_begin",
                ("logs=None",),
                r"on_train_start\(",
                lambda: fit(None, listener("on_train_start", "trainer", "event")),
            ),
        )
    },
    **{
        f"an object of {module}'s {name}": Case(
            lambda name=name, module=module: fit(None, foreign(name, module)),  # type: ignore[misc]
            (f"Mine: {module.partition('.')[0]}'s {name} does not work here", message),
            right,
        )
        for name, module, message, right in (
            ("Callback", "lightning.pytorch.callbacks.callback", r"eventtrain\.Callback", lambda: fit(None, Spelled())),
            ("Callback", "pytorch_lightning.callbacks.callback", r"trainer\.module", lambda: fit(None, Spelled())),
            ("RichProgressBar", "lightning.pytorch.callbacks", r"ProgressBar\(\)", lambda: fit(None, ProgressBar())),
            ("CSVLogger", "lightning.pytorch.loggers", "JSONLinesLogger", lambda: fit(None, JSONLinesLogger())),
            ("WandbLogger", "pytorch_lightning.loggers", "on_metrics_logged", fit),
            ("AdvancedProfiler", "lightning.pytorch.profilers", r"EventTimeline\(\)", fit),
            ("FSDPStrategy", "lightning.pytorch.strategies", r"FullyShardedDataParallel\(\)", fit),
            ("TrainerCallback", "transformers.trainer_callback", r"eventtrain\.Callback", lambda: fit(None, Spelled())),
            ("EarlyStopping", "keras.callbacks", r"EarlyStopping\('val_loss'\)", fit),
        )
    },
    "a subclass of a shipped callback without super": Case(
        lambda: fit(None, ForgetsSuper(1.0)),
        (r"ForgetsSuper\.__init__ does not call `super\(\)\.__init__", "EarlyStopping"),
        lambda: monitored(CallsSuper(1.0)),
    ),
    "a subclass of one's own callback without super": Case(
        lambda: fit(None, ForgetsToCount()),
        (r"ForgetsToCount\.__init__ does not call `super\(\)\.__init__", "Counts"),
        lambda: fit(None, CountsToo()),
    ),
    "a LambdaCallback with a hook of Lightning": Case(
        lambda: LambdaCallback(on_sanity_check_end=print),
        (r"LambdaCallback\(on_sanity_check_end=\.\.\.\) names no event", "on_validation_end"),
        lambda: fit(None, LambdaCallback(on_validation_end=lambda trainer, event: None)),
    ),
    "an option that torch's wrapper does not have": Case(
        lambda: DistributedDataParallel(find_unused_parameter=True),
        (r"DistributedDataParallel\(find_unused_parameter=True\)", "Did you mean 'find_unused_parameters'"),
        fit,
    ),
    "an option of another kind of sharding": Case(
        lambda: FullyShardedDataParallel(cpu_offload=True),
        (r"FullyShardedDataParallel\(cpu_offload=True\)", "CPUOffloadPolicy"),
        fit,
    ),
}

CASES: dict[str, Case] = {
    **ARGUMENTS,
    "a callback's class": Case(
        lambda: fit(None, GradientClipping),
        ("GradientClipping is a class", r"GradientClipping\(\.\.\.\)"),
        lambda: fit(None, Spelled()),
    ),
    "a callback twice": Case(
        lambda: fit(None, *[Spelled()] * 2), ("Spelled", "attached twice", "once"), lambda: fit(None, Spelled(), Spelled())
    ),
    "two of one role": Case(
        lambda: fit(None, MixedPrecision("bf16"), MixedPrecision("fp16")),
        ("MixedPrecision and MixedPrecision", "role 'precision'", "Keep one"),
        lambda: fit(None, MixedPrecision("bf16")),
    ),
    "two with one state key": Case(
        lambda: fit(None, Keeps(), Keeps()), ("Keeps and Keeps", "'kept'", "state_key"), lambda: fit(None, Keeps(), Keeps("b"))
    ),
    "a misspelled handler": Case(
        lambda: fit(None, Misspelled()),
        (r"Misspelled\.on_train_batch_stop", "names no event", "Did you mean 'on_train_batch_"),
        lambda: fit(None, Spelled()),
    ),
    "a handler with other arguments": Case(
        lambda: fit(None, WrongArguments()),
        (r"WrongArguments\.on_train_batch_end", "trainer", r"def on_train_batch_end\(self, trainer, event\)"),
        lambda: fit(None, Spelled()),
    ),
    "a handler written for Lightning": Case(
        lambda: fit(None, ForLightning()),
        (r"ForLightning\.on_train_batch_end", "Lightning", r"trainer\.module", r"\(self, trainer, event\)"),
        lambda: fit(None, Spelled()),
    ),
    "a handler that is a coroutine": Case(
        lambda: fit(None, Coroutine()), (r"Coroutine\.on_train_batch_end", "coroutine"), lambda: fit(None, Spelled())
    ),
    "a callback's name": Case(
        lambda: fit(None, "progress_bar"), ("'progress_bar'|str", "callback|listen|on_"), lambda: fit(None, ProgressBar())
    ),
    "a number for callbacks": Case(lambda: fit(None, 5), ("5|int", "callback|listen|on_"), lambda: fit(None, Spelled())),
    "a listener with other arguments": Case(
        lambda: before_fit(lambda trainer: trainer.signals.train_start.connect(lambda: None)),
        ("lambda", r"\(trainer, event=event\)", "train_start"),
        lambda: before_fit(lambda trainer: trainer.signals.train_start.connect(lambda trainer, event: None)),
    ),
    "a callback that is not attached": Case(
        lambda: after_fit(lambda trainer, module: trainer.callback(MixedPrecision)),
        ("No MixedPrecision", r"there are \[\]", r"callbacks=\[\.\.\.\]"),
        lambda: before_fit(lambda trainer: None),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_refusal_names_the_mistake_and_the_remedy(case: str) -> None:
    check_refusal(CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_correct_form_trains(case: str) -> None:
    check_remedy(CASES[case])


ROOMS = ("callbacks", "checkpoint", "core", "data", "metrics", "module", "optim", "run")


def test_the_rooms_hold_many_cases() -> None:
    rooms = [import_module(f"tests.{room}.test_misconfiguration") for room in ROOMS]
    assert len(CASES) + sum(len(room.CASES) for room in rooms) > 100
