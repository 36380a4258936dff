"""The contestant Accelerate: the hand-written loop on prepared objects."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, tqdm
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.work import CLIP, LOG_EVERY, Batches, Setting, make_loss, make_model, make_optimizer, make_scheduler


def train(setting: Setting, batches: Batches, folder: Path) -> nn.Module:
    """Accelerator(cpu=True), and everything through prepare(). The batches are in a DataLoader(batch_size=None), because it
    prepares no other loader. Standard: accumulate() over 4 batches, with adjust_scheduler=False because OneCycleLR here
    counts updates; clip_grad_norm_(0.25) if gradients sync; its TensorBoard tracker, and the loss on its tqdm bar, every
    50 updates."""
    return _standard(setting, batches, folder) if setting.extras else _bare(setting, batches)


def _bare(setting: Setting, batches: Batches) -> nn.Module:
    accelerator = Accelerator(cpu=True)
    model, loss_function = make_model(setting), make_loss(setting)
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model), DataLoader(batches, batch_size=None))
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = loss_function(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
    return accelerator.unwrap_model(model)


def _standard(setting: Setting, batches: Batches, folder: Path) -> nn.Module:
    accumulation = GradientAccumulationPlugin(num_steps=setting.accumulate, adjust_scheduler=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=accumulation, log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("standard")
    model, loss_function = make_model(setting), make_loss(setting)
    optimizer = make_optimizer(model)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(batches, batch_size=None), make_scheduler(setting, optimizer)
    )
    model.train()
    steps = 0
    bar = tqdm(loader)
    for x, y in bar:
        with accelerator.accumulate(model):
            loss = loss_function(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
                steps += 1
                if steps % LOG_EVERY == 0:
                    value = loss.item()
                    accelerator.log({"loss": value, "lr": scheduler.get_last_lr()[0]}, step=steps)
                    bar.set_postfix(loss=value)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.end_training()
    return accelerator.unwrap_model(model)
