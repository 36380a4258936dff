"""The loops that people write by hand."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from benchmarks.work import CLIP, LOG_EVERY, Batches, Setting, make_loss, make_model, make_optimizer, make_scheduler


def loop(setting: Setting, batches: Batches, folder: Path) -> nn.Module:
    """Plain PyTorch. In the standard setting, torch's SummaryWriter, and a tqdm bar that shows a new loss every 50 updates."""
    return _standard(setting, batches, folder) if setting.extras else _bare(setting, batches)


def _bare(setting: Setting, batches: Batches) -> nn.Module:
    model, loss_function = make_model(setting), make_loss(setting)
    optimizer = make_optimizer(model)
    model.train()
    for x, y in batches:
        loss = loss_function(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def _standard(setting: Setting, batches: Batches, folder: Path) -> nn.Module:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    model, loss_function = make_model(setting), make_loss(setting)
    optimizer = make_optimizer(model)
    scheduler = make_scheduler(setting, optimizer)
    writer = SummaryWriter(str(folder))
    model.train()
    steps = 0
    bar = tqdm(batches)
    for index, (x, y) in enumerate(bar):
        loss = loss_function(model(x), y)
        if index % setting.accumulate == 0:
            optimizer.zero_grad()
        (loss / setting.accumulate).backward()
        if (index + 1) % setting.accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            steps += 1
            if steps % LOG_EVERY == 0:
                value = loss.item()
                writer.add_scalar("loss", value, steps)
                writer.add_scalar("lr", optimizer.param_groups[0]["lr"], steps)
                bar.set_postfix(loss=value)
            scheduler.step()
    writer.close()
    return model


class Module(nn.Module):
    """A network with a ``training_step`` method, as trainers expect it."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.network = make_model(setting)
        self.loss_function = make_loss(setting)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return self.loss_function(self.network(x), y)


def closure_loop(setting: Setting, batches: Batches, folder: Path) -> nn.Module:
    """Plain PyTorch in the form that a trainer needs: a training_step method and optimizer.step(closure)."""
    model = Module(setting)
    optimizer = make_optimizer(model)
    model.train()
    for index, batch in enumerate(batches):

        def closure(batch: tuple[Tensor, Tensor] = batch, index: int = index) -> Tensor:
            loss = model.training_step(batch, index)
            optimizer.zero_grad()
            loss.backward()
            return loss

        optimizer.step(closure)
    return model.network
