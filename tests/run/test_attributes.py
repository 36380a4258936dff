"""What a program sets on a trainer has an effect, or is refused; requests outside a fit are not lost in silence."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from eventtrain import Callback, MisconfigurationError, Trainer
from eventtrain.callbacks import EarlyStopping, GradientClipping, ModelCheckpoint, ModelSummary, Timer
from tests.kit import FakeProcesses, Line, ModuleOf, On, Recorder, connections, new_trainer, train

BATCHES = [torch.ones(1)] * 4


def set_at(batch: int, name: str, value: Any) -> On:
    """Return a callback that sets an attribute of the trainer after a batch of the run, counted from 0."""

    def write(trainer: Any, event: Any) -> None:
        if trainer.total_batch_idx == batch:
            setattr(trainer, name, value)

    return On(train_batch_end=write)


# ------------------------------------------------------------------ should_stop


def test_should_stop_true_stops_after_the_batch() -> None:
    trainer = train(ModuleOf(), BATCHES, set_at(1, "should_stop", True), max_epochs=5)
    assert (trainer.global_step, trainer.should_stop, trainer.stop_reason) == (2, True, "trainer.should_stop = True")


@pytest.mark.parametrize(("arguments", "steps"), [({"min_steps": 6}, 6), ({"min_epochs": 2}, 8), ({"min_epochs": 0}, 1)])
def test_should_stop_waits_for_min_steps_and_min_epochs(arguments: dict[str, Any], steps: int) -> None:
    assert train(ModuleOf(), BATCHES, set_at(0, "should_stop", True), max_epochs=5, **arguments).global_step == steps


def test_should_stop_set_by_the_module_stops_too() -> None:
    class Stops(ModuleOf):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = self.current_epoch == 1

    trainer = train(Stops(), BATCHES, max_epochs=5)
    assert (trainer.current_epoch, trainer.global_step) == (2, 8)


def test_should_stop_false_withdraws_the_request() -> None:
    writes = set_at(1, "should_stop", True), set_at(1, "should_stop", False)
    trainer = train(ModuleOf(), BATCHES, *writes)
    assert (trainer.global_step, trainer.should_stop, trainer.stop_reason) == (4, False, None)


def test_should_stop_false_withdraws_nothing_that_other_processes_know_of() -> None:
    trainer = new_trainer(On(fit_start=lambda trainer, event: trainer.stop("agreed", by_all=True)))
    trainer.processes = FakeProcesses()
    trainer.callbacks.append(On(train_start=lambda trainer, event: setattr(trainer, "should_stop", False)))
    trainer.fit(ModuleOf(), BATCHES)
    assert trainer.stop_reason == "agreed" and trainer.global_step == 0


# ------------------------------------------------------------------ requests outside a fit


@pytest.mark.parametrize(
    "request_end",
    [
        lambda trainer: trainer.stop("enough"),
        lambda trainer: trainer.stop("enough", force=True),
        lambda trainer: trainer.interrupt("enough"),
        lambda trainer: trainer.end_epoch("enough"),
        lambda trainer: setattr(trainer, "should_stop", True),
    ],
)
@pytest.mark.parametrize("when", ["before", "test", "after"])
def test_a_request_outside_a_fit_warns_and_changes_nothing(request_end: Any, when: str, in_tmp_path: None) -> None:
    trainer = new_trainer(On(test_batch_end=lambda trainer, event: request_end(trainer)))
    if when == "after":
        trainer.fit(ModuleOf(), BATCHES)
    with pytest.warns(UserWarning, match=r"trainer\.\w+\('.*'\) does nothing, because no fit is running"):
        trainer.test(Line(), [torch.ones(1, 1)]) if when == "test" else request_end(trainer)
    assert (trainer.should_stop, trainer.stop_reason) == (False, None)
    trainer.fit(ModuleOf(), BATCHES)
    assert trainer.global_step == 4


@pytest.mark.parametrize("event", ["join_processes", "setup", "prepare_loader", "fit_start", "train_start"])
def test_a_request_from_the_beginning_of_a_fit_on_counts(event: str) -> None:
    trainer = train(ModuleOf(), BATCHES, On(**{event: lambda trainer, event: trainer.stop("at once")}))
    assert (trainer.global_step, trainer.stop_reason) == (0, "at once")


def test_a_timer_that_is_over_does_not_warn_in_a_later_validation(in_tmp_path: None) -> None:
    trainer = train(Line(), [torch.ones(1, 1)], Timer(1e-9), max_epochs=3)
    assert trainer.should_stop
    trainer.validate(Line(), [torch.ones(1, 1)])


# ------------------------------------------------------------------ trainer.callbacks


class Counts(Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, trainer: Trainer, event: Any) -> None:
        self.batches += 1


class Others(Callback):
    def on_train_epoch_end(self, trainer: Trainer, event: Any) -> None: ...


def appended(trainer: Trainer, callback: Any) -> None:
    trainer.callbacks.append(callback)


def extended(trainer: Trainer, callback: Any) -> None:
    trainer.callbacks.extend([callback])


def added(trainer: Trainer, callback: Any) -> None:
    trainer.callbacks += [callback]


def assigned(trainer: Trainer, callback: Any) -> None:
    trainer.callbacks = [*trainer.callbacks, callback]  # type: ignore[assignment]


def inserted_at_the_end(trainer: Trainer, callback: Any) -> None:
    trainer.callbacks.insert(len(trainer.callbacks), callback)


def sliced(trainer: Trainer, callback: Any) -> None:
    trainer.callbacks[1:] = [callback]


@pytest.mark.parametrize("add", [appended, extended, added, assigned, inserted_at_the_end, sliced])
def test_a_callback_added_to_the_list_is_attached(add: Any) -> None:
    first, counts = Others(), Counts()
    trainer = new_trainer(first)
    add(trainer, counts)
    trainer.fit(ModuleOf(), BATCHES)
    assert trainer.callbacks == [first, counts] and counts.batches == 4


def removed(trainer: Trainer, callback: Any) -> None:
    trainer.callbacks.remove(callback)


def popped(trainer: Trainer, callback: Any) -> None:
    assert trainer.callbacks.pop(0) is callback


def deleted(trainer: Trainer, callback: Any) -> None:
    del trainer.callbacks[0]


def filtered(trainer: Trainer, callback: Any) -> None:
    trainer.callbacks = [each for each in trainer.callbacks if each is not callback]  # type: ignore[assignment]


def cleared(trainer: Trainer, callback: Any) -> None:
    others = trainer.callbacks[1:]
    trainer.callbacks.clear()
    trainer.callbacks.extend(others)


@pytest.mark.parametrize("remove", [removed, popped, deleted, filtered, cleared])
def test_a_callback_removed_from_the_list_is_detached(remove: Any) -> None:
    counts, stays = Counts(), Others()
    trainer = new_trainer(counts, stays)
    remove(trainer, counts)
    trainer.fit(ModuleOf(), BATCHES)
    assert trainer.callbacks == [stays] and counts.batches == 0
    assert connections(trainer) == {"train_epoch_end": [stays.on_train_epoch_end]}


@pytest.mark.parametrize(
    "change",
    [
        lambda callbacks: callbacks.insert(0, Counts()),
        lambda callbacks: callbacks.reverse(),
        lambda callbacks: callbacks.sort(key=lambda each: type(each).__name__, reverse=True),
        lambda callbacks: callbacks.__setitem__(0, Counts()),
    ],
)
def test_another_order_is_refused_and_nothing_is_changed(change: Any) -> None:
    trainer = new_trainer(GradientClipping(1.0), Others())
    before = list(trainer.callbacks), connections(trainer)
    with pytest.raises(MisconfigurationError, match="in the order in which they were attached, and a new one comes last"):
        change(trainer.callbacks)
    assert (list(trainer.callbacks), connections(trainer)) == before


def test_what_cannot_be_attached_is_refused_in_the_list_too() -> None:
    trainer = new_trainer(callback := Counts())
    for wrong, message in (
        (lambda: trainer.callbacks.append(Counts), "is a class"),
        (lambda: trainer.callbacks.append("ModelCheckpoint"), "listens to nothing"),
        (lambda: trainer.callbacks.append(callback), "attached twice"),
        (lambda: trainer.callbacks.__imul__(2), "attached twice"),
        (lambda: setattr(trainer, "callbacks", [callback, On(train_bacth_end=lambda trainer, event: None)]), "train_batch_end"),
    ):
        with pytest.raises(MisconfigurationError, match=message):
            wrong()
    with pytest.raises(ValueError, match="not in list"):
        trainer.callbacks.remove(Others())
    assert trainer.callbacks == [callback]


def test_a_callback_appended_in_a_run_listens_from_the_next_event_on_and_stays() -> None:
    counts = Counts()

    class Appends(ModuleOf):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.callbacks.append(counts)

    trainer = train(Appends(), BATCHES, max_epochs=2)
    assert counts.batches == 4 and trainer.callbacks == [counts]


def test_callbacks_removed_in_a_run_leave_it_and_the_module_may_remove_all() -> None:
    counts = Counts()

    class Brings(ModuleOf):
        def configure_callbacks(self) -> Any:
            return [Others()]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.trainer.callbacks.clear()

    trainer = train(Brings(), BATCHES, counts)
    assert counts.batches == 2 and trainer.callbacks == [] and connections(trainer) == {}


@pytest.mark.parametrize(("callbacks", "number"), [(None, 0), (Counts(), 1), ((Counts(),), 1)])
def test_callbacks_may_be_one_or_none(callbacks: Any, number: int) -> None:
    assert len(new_trainer().callbacks) == 0
    trainer = Trainer(callbacks=callbacks, default_callbacks=False)
    assert len(trainer.callbacks) == number
    trainer.callbacks = callbacks
    assert len(trainer.callbacks) == number


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_the_callbacks_of_a_copied_trainer_are_connected_once(copied: Any) -> None:
    trainer = train(ModuleOf(), BATCHES, Counts())
    again = copied(trainer)
    again.fit(ModuleOf(), BATCHES)
    assert [trainer.callbacks[0].batches, again.callbacks[0].batches] == [4, 8]


# ------------------------------------------------------------------ configure_callbacks


class Brings(ModuleOf):
    """Brings callbacks of its own."""

    def __init__(self, *brought: Any) -> None:
        super().__init__()
        self.brought = list(brought)

    def configure_callbacks(self) -> Any:
        return self.brought

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", loss := super().training_step(batch, batch_idx))
        return loss


class CountsMore(Counts):
    """A subclass: it replaces callbacks of its base."""


@pytest.mark.parametrize("kind", [Counts, CountsMore])
def test_the_modules_callback_replaces_the_trainers_of_the_same_class_during_the_run(kind: type[Counts]) -> None:
    theirs, other, ours = Counts(), Others(), kind()
    trainer = new_trainer(theirs, other)
    before = connections(trainer)
    during: list[Any] = []
    module = Brings(ours)
    module.on_train_start = lambda: during.extend(trainer.callbacks)  # type: ignore[method-assign]
    trainer.fit(module, BATCHES)
    assert (during, theirs.batches, ours.batches) == ([other, ours], 0, 4)
    assert trainer.callbacks == [theirs, other] and connections(trainer) == before
    trainer.fit(ModuleOf(), BATCHES)
    assert (theirs.batches, ours.batches) == (4, 4)


@pytest.mark.parametrize("brought", [None, [], Counts()])
def test_configure_callbacks_may_return_one_callback_or_none(brought: Any) -> None:
    module = ModuleOf(configure_callbacks=lambda: brought)
    assert train(module, BATCHES).global_step == 4
    assert getattr(brought, "batches", 4) == 4


def test_a_base_class_replaces_no_subclass_and_a_plain_object_replaces_nothing() -> None:
    more, base = CountsMore(), Counts()
    names: list[str] = []
    plain = [On(train_start=lambda trainer, event, name=name: names.append(name)) for name in "ab"]  # type: ignore[misc]
    train(Brings(base, plain[1]), BATCHES, more, plain[0])
    assert (more.batches, base.batches, names) == (4, 4, ["a", "b"])


def test_shipped_callbacks_are_replaced_with_their_roles_and_files(in_tmp_path: Any) -> None:
    theirs = [GradientClipping(1.0), ModelCheckpoint("theirs"), EarlyStopping("missing")]
    module = Brings(GradientClipping(0.5), ModelCheckpoint("ours"), EarlyStopping("loss"))
    seen = Recorder("after_gradient_clipping")
    trainer = train(module, BATCHES, *theirs, seen)
    assert {event.gradient_clip_val for event in seen.events} == {0.5}
    assert trainer.callback(ModelCheckpoint) is theirs[1]
    assert [path.name for path in Path().iterdir()] == ["ours"]


def test_replaced_callbacks_come_back_after_an_error() -> None:
    theirs = Counts()
    trainer = new_trainer(Others(), theirs, ModelSummary())
    before = list(trainer.callbacks), connections(trainer)
    with pytest.raises(MisconfigurationError, match="attached twice"):
        trainer.fit(Brings(ours := Counts(), ours), BATCHES)
    assert (list(trainer.callbacks), connections(trainer)) == before
    trainer.fit(ModuleOf(), BATCHES)
    assert theirs.batches == 4


# ------------------------------------------------------------------ other attributes


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_epochs", 5, r"trainer\.max_epochs = 5 would change nothing\. Give Trainer\(max_epochs=\.\.\.\)"),
        ("max_steps", 5, r"Give Trainer\(max_steps="),
        ("min_epochs", 5, r"Give Trainer\(min_epochs="),
        ("limit_train_batches", 2, r"Give Trainer\(limit_train_batches="),
        ("val_check_interval", 2, r"Give Trainer\(val_check_interval="),
        ("inference_mode", False, r"Give Trainer\(inference_mode="),
        ("fast_dev_run", True, r"Give Trainer\(fast_dev_run="),
        ("global_step", 5, "read-only, because the run writes it"),
        ("current_epoch", 5, "read-only, because the run writes it"),
        ("callback_metrics", {}, "read-only, because the run writes it"),
        ("logger", None, r"TensorBoardLogger"),
        ("accumulate_grad_batches", 4, r"GradientAccumulation\(4\)"),
        ("gradient_clip_val", 0.5, r"GradientClipping\(0\.5\)"),
        ("precision", "bf16", "MixedPrecision"),
        ("shoud_stop", True, "Did you mean 'should_stop'"),
        ("callback", None, None),
        ("calbacks", [], "Did you mean 'callbacks'"),
        ("devcie", "cpu", "Did you mean 'device'"),
        ("zzzzz", 1, "Keep values of your own in the module, a callback, or a subclass"),
    ],
)
def test_an_attribute_that_would_change_nothing_is_refused(name: str, value: Any, message: str | None) -> None:
    trainer = new_trainer()
    if message is None:
        setattr(trainer, name, value)  # a method: people replace it in tests
        assert vars(trainer)[name] is value
        return
    with pytest.raises(MisconfigurationError, match=message):
        setattr(trainer, name, value)
    assert name not in vars(trainer)


def test_attributes_that_have_an_effect_are_set() -> None:
    trainer = new_trainer()
    trainer.seed, trainer.default_root_dir, trainer.device = 3, "elsewhere", torch.device("cpu")
    trainer._mine = 1  # type: ignore[attr-defined]
    with mock.patch.object(trainer, "save_checkpoint") as saved:
        trainer.save_checkpoint("a.ckpt")
    saved.assert_called_once_with("a.ckpt")
    trainer.fit(ModuleOf(), BATCHES)
    assert (trainer.seed, trainer.default_root_dir, trainer.global_step) == (3, "elsewhere", 4)


def test_a_device_that_is_set_is_checked_as_the_argument_is() -> None:
    trainer = new_trainer()
    trainer.device = "cpu"  # type: ignore[assignment]
    assert trainer.device == torch.device("cpu")
    trainer.fit(ModuleOf(), BATCHES)
    assert trainer.global_step == 4
    with pytest.raises(MisconfigurationError, match=r"device='gpu': write 'cuda'"):
        trainer.device = "gpu"  # type: ignore[assignment]


def test_a_subclass_has_attributes_of_its_own_before_and_after_super_and_later() -> None:
    class Named(Trainer):
        limit_val_batches: Any = "declared by the class"

        def __init__(self, project: str, **arguments: Any) -> None:
            self.project = project
            super().__init__(**arguments)
            self.results: list[int] = []
            self.limit_val_batches = 2

    trainer = Named("a", max_epochs=1, device="cpu", default_callbacks=False)
    trainer.results = [1]
    trainer.later = 2  # type: ignore[attr-defined]
    assert (trainer.project, trainer.results, trainer.limit_val_batches) == ("a", [1], 2)
    for name in ("max_epochs", "limit_train_batches", "global_step"):
        with pytest.raises(MisconfigurationError, match=f"trainer.{name}"):
            setattr(trainer, name, 1)
    trainer.fit(ModuleOf(), BATCHES)
    assert trainer.global_step == 4
