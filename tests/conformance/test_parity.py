"""Behaviour that eventtrain shares with Lightning. The expected values come from running Lightning here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from .frameworks import Settings, assert_same, train_ours, train_theirs


def regression(base: type, **changes: Any) -> Any:
    """Return a linear regression that writes the rate of each step into a journal, with some methods replaced."""

    class Regression(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.layer = nn.Linear(3, 1)
            self.journal: list[Any] = []

        def loss(self, batch: torch.Tensor) -> Any:
            return (self.layer(batch) - batch.sum(1, keepdim=True)).pow(2).mean()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            self.journal.append((batch_idx, self.trainer.optimizers[0].param_groups[0]["lr"]))
            return self.loss(batch)

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    for name, change in changes.items():
        setattr(Regression, name, change)
    return Regression()


def optimizers(build: Any) -> Any:
    return lambda base: regression(base, configure_optimizers=build)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(accumulate=2),
        Settings(accumulate=4),
        Settings(accumulate={0: 2, 1: 1}),
        Settings(clip=(0.1, "norm")),
        Settings(clip=(0.01, "value")),
        Settings(accumulate=3, clip=(0.1, "norm")),
        Settings(precision="bf16"),
        Settings(max_steps=7, epochs=10),
        Settings(limit_train_batches=4),
        Settings(limit_train_batches=0.5, accumulate=2),
        Settings(validate=True, sanity_steps=2),
        Settings(validate=True, val_check_interval=2, accumulate=2),
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in vars(settings).items() if v != getattr(Settings(), k)) or "plain",
)
def test_settings(settings: Settings) -> None:
    assert_same(regression, settings)


def _adamw(self: Any) -> Any:
    return torch.optim.AdamW(self.parameters(), lr=0.01)


def _step_lr(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def _one_cycle(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
    total = self.trainer.estimated_stepping_batches
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _plateau(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


def _every_other_epoch(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "frequency": 2}}


def _lbfgs(self: Any) -> Any:
    return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


@pytest.mark.parametrize("build", [_adamw, _step_lr, _one_cycle, _plateau, _every_other_epoch, _lbfgs])
def test_optimizers_and_schedulers(build: Any) -> None:
    assert_same(optimizers(build), Settings(epochs=4, validate=build is _plateau))


def test_one_cycle_with_accumulation_counts_optimizer_steps() -> None:
    assert_same(optimizers(_one_cycle), Settings(epochs=4, accumulate=2))


def test_none_from_configure_optimizers_updates_nothing() -> None:
    def step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def make(base: type) -> Any:
        return regression(base, configure_optimizers=lambda self: None, training_step=step)

    with pytest.warns(UserWarning, match="no optimizer"):
        assert_same(make, Settings())


# ------------------------------------------------------------------ overridden hooks


def test_warm_up_in_optimizer_step() -> None:
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)
        scale = min(1.0, (self.trainer.global_step + 1) / 5)
        for group in optimizer.param_groups:
            group["lr"] = scale * 0.05

    assert_same(lambda base: regression(base, optimizer_step=optimizer_step), Settings())


def test_optimizer_step_every_other_batch_with_the_wrapped_optimizer() -> None:
    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    assert_same(lambda base: regression(base, optimizer_step=optimizer_step), Settings())


def test_a_scheduler_with_another_interface() -> None:
    class ByEpoch:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def step(self, epoch: int, metric: Any = None) -> None:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.1 / (epoch + 2)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    def build(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": ByEpoch(optimizer), "interval": "epoch"}]

    def lr_scheduler_step(self: Any, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)

    assert_same(
        lambda base: regression(base, configure_optimizers=build, lr_scheduler_step=lr_scheduler_step), Settings(epochs=3)
    )


def test_clipping_in_the_module() -> None:
    def configure_gradient_clipping(
        self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        value = 0.2 if self.current_epoch else 0.1
        self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm="norm")

    assert_same(lambda base: regression(base, configure_gradient_clipping=configure_gradient_clipping), Settings())


def test_backward_and_zero_grad_in_the_module() -> None:
    def backward(self: Any, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward()  # type: ignore[no-untyped-call]

    def optimizer_zero_grad(self: Any, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.journal.append(("zero_grad", epoch, batch_idx))
        optimizer.zero_grad(set_to_none=False)

    assert_same(
        lambda base: regression(base, backward=backward, optimizer_zero_grad=optimizer_zero_grad), Settings(accumulate=2)
    )


# ------------------------------------------------------------------ logging


def test_logged_values_by_step_and_epoch() -> None:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("largest", loss, on_epoch=True, on_step=False, reduce_fx="max")
        self.log_dict({"smallest": loss, "again": loss}, on_epoch=True, on_step=False, reduce_fx="min")
        self.log("number", batch_idx)
        return {"loss": loss, "extra": 1}

    def validation_step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))
        self.log("val_total", float(batch_idx), reduce_fx="sum")

    # Batches of equal size: Lightning's mean is weighted by it too.
    assert_same(
        lambda base: regression(base, training_step=training_step, validation_step=validation_step), Settings(validate=True)
    )


def test_epoch_means_are_weighted_by_the_batch_size() -> None:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
        self.log("mean", batch.mean(), on_epoch=True, on_step=False)
        return self.loss(batch)

    data = [torch.full((size, 3), value) for size, value in ((2, 1.5), (2, 3.5), (1, 5.0))]
    outcome = assert_same(lambda base: regression(base, training_step=training_step), Settings(epochs=1), data)
    assert outcome.metrics["mean"] == 3.0


def test_torchmetrics_objects() -> None:
    import torchmetrics

    def make(base: type) -> Any:
        def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
            prediction = self.layer(batch)
            self.error(prediction, batch.sum(1, keepdim=True))
            self.log("error", self.error, on_step=True, on_epoch=True)
            return self.loss(batch)

        module = regression(base, training_step=training_step)
        module.error = torchmetrics.MeanSquaredError()
        return module

    assert_same(make, Settings(epochs=3))


# ------------------------------------------------------------------ manual optimization


def gan(base: type) -> Any:
    class GAN(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.automatic_optimization = False
            self.generator = nn.Linear(2, 3)
            self.discriminator = nn.Linear(3, 1)
            self.journal: list[Any] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            g_opt, d_opt = self.optimizers()
            g_sch, d_sch = self.lr_schedulers()
            noise = torch.ones(len(batch), 2) * (batch_idx + 1) / 4
            self.toggle_optimizer(d_opt)
            d_loss = self.discriminator(self.generator(noise)).mean() - self.discriminator(batch).mean()
            d_opt.zero_grad()
            self.manual_backward(d_loss)
            self.clip_gradients(d_opt, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            d_opt.step()
            self.untoggle_optimizer(d_opt)
            if batch_idx % 2 == 0:
                self.toggle_optimizer(g_opt)
                g_loss = -self.discriminator(self.generator(noise)).mean()
                g_opt.zero_grad()
                self.manual_backward(g_loss)
                g_opt.step()
                self.untoggle_optimizer(g_opt)
                self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)
            if self.trainer.is_last_batch and (self.trainer.current_epoch + 1) % 2 == 0:
                g_sch.step()
            d_sch.step()
            self.journal.append([o.param_groups[0]["lr"] for o in (g_opt, d_opt)])

        def configure_optimizers(self) -> Any:
            g_opt = torch.optim.Adam(self.generator.parameters(), lr=0.01)
            d_opt = torch.optim.SGD(self.discriminator.parameters(), lr=0.01)
            rates = torch.optim.lr_scheduler
            return [g_opt, d_opt], [rates.StepLR(g_opt, 1, 0.5), rates.ExponentialLR(d_opt, 0.9)]

    return GAN()


def test_a_gan() -> None:
    assert_same(gan, Settings(epochs=3))


def manual(step: Any, build: Any = None) -> Any:
    def make(base: type) -> Any:
        changes = {"configure_optimizers": build} if build else {}
        module = regression(base, training_step=step, **changes)
        module.automatic_optimization = False
        return module

    return make


def test_the_minimal_manual_step() -> None:
    def step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()

    assert_same(manual(step), Settings())


def test_accumulation_by_hand() -> None:
    def step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 4)
        if (batch_idx + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()

    assert_same(manual(step), Settings(epochs=4))


def test_a_closure_by_hand() -> None:
    def step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Any:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    assert_same(manual(step, _lbfgs), Settings())


def test_a_plateau_scheduler_by_hand() -> None:
    def step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.log("loss", loss, on_epoch=True, on_step=False)

    def on_train_epoch_end(self: Any) -> None:
        scheduler = self.lr_schedulers()
        if "loss" in self.trainer.callback_metrics:
            scheduler.step(self.trainer.callback_metrics["loss"])
        self.journal.append(self.optimizers().param_groups[0]["lr"])

    def make(base: type) -> Any:
        module = regression(base, training_step=step, on_train_epoch_end=on_train_epoch_end, configure_optimizers=_plateau)
        module.automatic_optimization = False
        return module

    assert_same(make, Settings(epochs=4))


# ------------------------------------------------------------------ the module's hooks, in order

HOOKS = """
    prepare_data setup configure_model configure_optimizers on_fit_start on_fit_end on_train_start on_train_end
    on_train_epoch_start on_train_epoch_end on_train_batch_start on_train_batch_end on_before_zero_grad
    on_before_backward on_after_backward on_before_optimizer_step on_validation_start on_validation_end
    on_validation_epoch_start on_validation_epoch_end on_validation_batch_start on_validation_batch_end
    on_validation_model_eval on_validation_model_train on_before_batch_transfer on_after_batch_transfer
    transfer_batch_to_device training_step validation_step optimizer_step optimizer_zero_grad backward
    configure_gradient_clipping lr_scheduler_step teardown configure_callbacks on_predict_start on_test_start
""".split()


def recording(base: type, *, automatic: bool = True) -> Any:
    module = regression(base, configure_optimizers=_step_lr)
    module.automatic_optimization = automatic
    kind = type(module)
    if not automatic:

        def step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

        kind.training_step = step

    def record(name: str, original: Any) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.journal.append(name)
            return original(self, *args, **kwargs)

        return hook

    for name in HOOKS:
        if hasattr(kind, name):
            setattr(kind, name, record(name, getattr(kind, name)))
    return module


@pytest.mark.parametrize("automatic", [True, False])
def test_the_order_of_the_modules_hooks(automatic: bool) -> None:
    settings = Settings(validate=True, sanity_steps=1, accumulate=2 if automatic else 1)

    def make(base: type) -> Any:
        return recording(base, automatic=automatic)

    def journal(outcome: Any) -> list[str]:
        # Hooks before the first and after the last event depend on each framework's bookkeeping, so they are left out.
        names = [entry for entry in outcome.journal if isinstance(entry, str)]
        names = names[names.index("on_fit_start") : names.index("on_fit_end") + 1]
        # In manual optimization Lightning has no zero_grad hook; here the same events come in both modes.
        return [name for name in names if automatic or name != "on_before_zero_grad"]

    here, there = (journal(train(make, settings)) for train in (train_ours, train_theirs))
    assert here == there


def test_the_words_of_lightnings_log() -> None:
    def training_step(self: Any, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("a", loss, False, None, True, True, torch.max, False, False, None, True, 4, None, True)
        self.log("b", loss, enable_graph=True, sync_dist_group=None, rank_zero_only=True, metric_attribute=None)
        flags = (self.trainer.training, self.trainer.validating, self.trainer.testing, self.trainer.predicting)
        self.journal.append(flags)
        return loss

    def validation_step(self: Any, batch: torch.Tensor, batch_idx: int) -> None:
        self.journal.append((self.trainer.training, self.trainer.validating, self.trainer.testing, self.trainer.predicting))

    assert_same(
        lambda base: regression(base, training_step=training_step, validation_step=validation_step), Settings(validate=True)
    )
