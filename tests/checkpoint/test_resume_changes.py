"""A run may freeze and unfreeze layers, and change its parameter groups: a resumed run continues with them as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import ExponentialMovingAverage, GradientAccumulation, LRSchedulerStepping
from tests.kit import On, new_trainer
from tests.resuming import assert_same_run, check_all_safe_points

BATCHES = list(torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0)))


class Frozen(LightningModule):
    """A frozen backbone with a BatchNorm, and a head that is trained."""

    epoch = 1
    """The epoch in which the backbone is unfrozen."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.backbone.requires_grad_(False)
        self.backbone[1].eval()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.head(self.backbone(batch)).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.head(self.backbone(batch)).pow(2).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.1)

    def thaw(self) -> None:
        self.backbone.requires_grad_(True)
        self.backbone[1].train()
        self.optimizers().add_param_group({"params": self.backbone.parameters(), "lr": 0.01})


class InHook(Frozen):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.epoch:
            self.thaw()


class InStep(Frozen):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == 6 and not self.backbone[0].weight.requires_grad:
            self.thaw()
        return super().training_step(batch, batch_idx)


class InValidation(Frozen):
    def on_validation_epoch_end(self) -> None:
        if self.current_epoch == self.epoch:
            self.backbone.requires_grad_(True)
            self.optimizers().add_param_group({"params": self.backbone.parameters()})


class Refreezes(InHook):
    """Freezes as the run begins, which happens again as it is resumed; and removes the group in the end."""

    def on_train_start(self) -> None:
        self.backbone.requires_grad_(False)
        self.backbone[1].eval()

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == self.epoch:
            self.backbone.requires_grad_(False)
            for parameter in self.optimizers().param_groups.pop()["params"]:
                self.optimizers().state.pop(parameter, None)


class AddsAtStart(Frozen):
    """Adds a group in a hook that runs at the beginning of each run, resumed or not."""

    def on_train_start(self) -> None:
        self.backbone.requires_grad_(True)
        self.optimizers().add_param_group({"params": list(self.backbone.parameters())})


class Moves(Frozen):
    """Moves a parameter to the other group, and changes the options of both."""

    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = [{"params": [*self.head.parameters()]}, {"params": [self.backbone[0].weight]}]
        return torch.optim.SGD(groups, lr=0.1)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            head, rest = self.optimizers().param_groups
            rest["params"].append(head["params"].pop())
            rest["lr"], rest["momentum"] = 0.01, 0.9
            self.backbone[0].requires_grad_(True)


class Callbacks:
    """Make the callbacks that unfreeze a module, by name."""

    @staticmethod
    def thaws() -> Any:
        def start(trainer: Any, event: Any) -> None:
            if event.epoch == 1 and not event.batches_done:
                trainer.module.thaw()

        return On(train_epoch_start=start)

    @staticmethod
    def thaws_again() -> Any:
        """It does not ask whether the epoch is continued."""

        def start(trainer: Any, event: Any) -> None:
            if event.epoch == 1:
                trainer.module.thaw()

        return On(train_epoch_start=start)


def check(tmp_path: Path, module: Callable[[], Any], *callbacks: Callable[[], Any], every: int = 1, **options: Any) -> None:
    def build() -> Any:
        loader: DataLoader[Any] = DataLoader(torch.cat(BATCHES), batch_size=4, shuffle=True)  # type: ignore[arg-type]
        arguments = {"max_epochs": 3, "val_check_interval": 3, **options}
        return module(), loader, BATCHES[:2], [each() for each in callbacks], arguments

    assert check_all_safe_points(build, tmp_path, every=every) >= 12


@pytest.mark.parametrize("module", [InHook, InStep, InValidation, Refreezes, AddsAtStart, Moves])
def test_a_run_that_unfreezes_layers_resumes_at_each_safe_point(tmp_path: Path, module: type[Frozen]) -> None:
    check(tmp_path, module)


@pytest.mark.parametrize("callback", [Callbacks.thaws, Callbacks.thaws_again])
def test_so_does_one_whose_callback_unfreezes_them(tmp_path: Path, callback: Callable[[], Any]) -> None:
    check(tmp_path, Frozen, callback)


def test_with_averages_and_windows_of_several_batches(tmp_path: Path) -> None:
    check(tmp_path, InHook, lambda: ExponentialMovingAverage(0.9), lambda: GradientAccumulation(3, remainder="carry"))


class Manual(Frozen):
    """Two optimizers, one of which gets a group."""

    untoggles = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone[0].requires_grad_(True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        first, second = self.optimizers()
        if self.untoggles and self.current_epoch == 1 and batch_idx == 1:
            self.backbone[1].requires_grad_(True)
            second.add_param_group({"params": self.backbone[1].parameters()})
        for optimizer in (first, second):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.head(self.backbone(batch)).pow(2).mean())
            optimizer.step()
            if self.untoggles:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.head.parameters()), torch.optim.SGD(self.backbone[0].parameters(), lr=0.1, momentum=0.9)]


class LeavesToggled(Manual):
    untoggles = False


@pytest.mark.parametrize("module", [Manual, LeavesToggled])
def test_in_manual_optimization_with_several_optimizers(tmp_path: Path, module: type[Manual]) -> None:
    check(tmp_path, module)


# ------------------------------------------------------------------ modes


class FreezesStatistics(Frozen):
    """Puts its BatchNorm into evaluation mode by epochs, as recipes for fine-tuning do."""

    def on_train_epoch_start(self) -> None:
        self.backbone[1].train(self.current_epoch % 2 == 0)


def test_the_mode_of_each_submodule_is_as_it_was(tmp_path: Path) -> None:
    check(tmp_path, FreezesStatistics)


def test_a_checkpoint_that_is_written_in_a_validation_resumes_in_training_mode(tmp_path: Path) -> None:
    def save(trainer: Trainer, event: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(tmp_path / "val.ckpt")

    trainer = new_trainer(On(validation_end=save), max_epochs=2)
    trainer.fit(FreezesStatistics(), BATCHES, BATCHES)
    assert torch.load(tmp_path / "val.ckpt", weights_only=True)["training"] == {
        **dict.fromkeys(("", "backbone", "backbone.0", "backbone.1", "head"), True)
    }
    seen: list[bool] = []
    record = On(train_batch_start=lambda trainer, event: seen.append(trainer.module.training))
    new_trainer(record, max_epochs=2).fit(FreezesStatistics(), BATCHES, BATCHES, ckpt_path=tmp_path / "val.ckpt")
    assert seen and all(seen)


def test_flags_of_a_toggled_optimizer_are_not_those_of_the_user(tmp_path: Path) -> None:
    trainer = new_trainer(On(before_backward=lambda trainer, event: trainer.save_checkpoint(tmp_path / "in.ckpt")))
    trainer.fit(Manual(), BATCHES[:1])
    flags = torch.load(tmp_path / "in.ckpt", weights_only=True)["requires_grad"]
    assert [name for name, flag in flags.items() if not flag] == ["backbone.1.weight", "backbone.1.bias"]


# ------------------------------------------------------------------ parameters that the run makes


class Grows(Frozen):
    """Makes a layer in the second epoch, and makes it before it loads a checkpoint that has it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def grow(self) -> None:
        self.extra = nn.Linear(3, 1, bias=False)
        nn.init.ones_(self.extra.weight)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.grow()
            self.optimizers().add_param_group({"params": self.extra.parameters(), "lr": 0.3})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "extra.weight" in checkpoint["state_dict"]:
            self.grow()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.extra(batch).pow(2).mean() if hasattr(self, "extra") else loss


def test_parameters_that_were_made_during_the_run(tmp_path: Path) -> None:
    check(tmp_path, Grows)


class NewNames(Frozen):
    """Has other names for the layers of Frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.top = self.head
        del self.head

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.top(self.backbone(batch)).pow(2).mean()  # type: ignore[no-any-return]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name.replace("head", "top"): value for name, value in weights}


def test_weights_that_on_load_checkpoint_renames_keep_the_state_of_their_optimizer(tmp_path: Path) -> None:
    trainer = new_trainer(max_epochs=1)
    trainer.fit(Frozen(), BATCHES)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    resumed = new_trainer(max_epochs=1)
    resumed.fit(NewNames(), BATCHES, ckpt_path=tmp_path / "old.ckpt")
    for mine, expected in zip(resumed.optimizers[0].state.values(), trainer.optimizers[0].state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], expected["exp_avg"])


def test_a_module_that_has_trained_before_resumes_too(tmp_path: Path) -> None:
    """Its layers are not frozen any more, so that configure_optimizers finds more of them to train."""
    module = InHook()
    trainer = new_trainer(max_epochs=2)
    trainer.fit(module, BATCHES)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    straight = new_trainer(max_epochs=3)
    straight.fit(InHook(), BATCHES)
    again = new_trainer(max_epochs=3)
    again.fit(module, BATCHES, ckpt_path=tmp_path / "two.ckpt")
    assert_same_run(again, straight, "a module that was trained before")
    again.save_checkpoint(tmp_path / "three.ckpt")
    new_trainer(max_epochs=4).fit(InHook(), BATCHES, ckpt_path=tmp_path / "three.ckpt")


# ------------------------------------------------------------------ schedulers


def halves(step: int) -> float:
    return 0.5**step


class Power:
    """A function with state."""

    def __init__(self, base: float) -> None:
        self.base = base

    def __call__(self, step: int) -> float:
        return float(self.base**step)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, halves),
    "LambdaLR of an object": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, Power(0.5)),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "ReduceLROnPlateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.001]),
}


class Scheduled(Frozen):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": self.make(optimizer), "interval": "step", "monitor": "loss"}]

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.thaw()
            group = self.optimizers().param_groups[1]
            options = {"initial_lr": 0.01, "max_lr": 0.1, "min_lr": 1e-6, "max_momentum": 0.9, "base_momentum": 0.8}
            group.update(options)
            scheduler = self.lr_schedulers()
            for name, value in (("base_lrs", 0.01), ("min_lrs", 0.001)):
                getattr(scheduler, name, []).append(value)
            if functions := getattr(scheduler, "lr_lambdas", None):
                functions.append(copy.deepcopy(functions[0]))
                if isinstance(functions[1], Power):
                    functions[1].base = 0.9


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_continue_with_the_groups_that_were_added(tmp_path: Path, scheduler: str) -> None:
    check(tmp_path, lambda: Scheduled(SCHEDULERS[scheduler]), LRSchedulerStepping, every=3, val_check_interval=None)


def test_another_function_that_the_run_gave_to_a_scheduler_is_an_error_and_no_other_rate(tmp_path: Path) -> None:
    class Other(Scheduled):
        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            if self.current_epoch == 1:
                self.lr_schedulers().lr_lambdas[1] = lambda step: 0.9**step

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.functions = len(checkpoint["lr_schedulers"][0]["lr_lambdas"])

    class Told(Other):
        def configure_optimizers(self) -> Any:
            [optimizer], [config] = super().configure_optimizers()
            if getattr(self, "functions", 1) == 2:
                config["scheduler"].lr_lambdas.append(lambda step: 0.9**step)
            return [optimizer], [config]

    straight = new_trainer(LRSchedulerStepping(), max_epochs=3)
    straight.fit(Other(SCHEDULERS["LambdaLR"]), BATCHES)
    trainer = new_trainer(LRSchedulerStepping(), max_epochs=2)
    trainer.fit(Other(SCHEDULERS["LambdaLR"]), BATCHES)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(MisconfigurationError, match="a LambdaLR to which the run added functions"):
        new_trainer(LRSchedulerStepping(), max_epochs=3).fit(
            Other(SCHEDULERS["LambdaLR"]), BATCHES, ckpt_path=tmp_path / "two.ckpt"
        )
    resumed = new_trainer(LRSchedulerStepping(), max_epochs=3)
    resumed.fit(Told(SCHEDULERS["LambdaLR"]), BATCHES, ckpt_path=tmp_path / "two.ckpt")
    assert torch.equal(resumed.module.backbone[0].weight, straight.module.backbone[0].weight)  # type: ignore[index, union-attr]


# ------------------------------------------------------------------ older checkpoints


def test_a_checkpoint_of_the_second_schema_resumes_as_before(tmp_path: Path) -> None:
    trainer = new_trainer(max_epochs=1)
    trainer.fit(Frozen(), BATCHES)
    content = trainer.collect_checkpoint()
    for key in ("requires_grad", "training", "classes", "parameter_groups"):
        del content[key]
    torch.save({**content, "schema_version": 2}, tmp_path / "second.ckpt")
    straight, resumed = new_trainer(max_epochs=2), new_trainer(max_epochs=2)
    straight.fit(Frozen(), BATCHES)
    resumed.fit(Frozen(), BATCHES, ckpt_path=tmp_path / "second.ckpt")
    assert_same_run(resumed, straight, "the second schema")
