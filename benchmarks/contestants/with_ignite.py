"""The contestant Ignite: a custom update function, and handlers around it."""

from __future__ import annotations

from pathlib import Path

from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import LRScheduler
from ignite.handlers.tensorboard_logger import TensorboardLogger
from ignite.handlers.tqdm_logger import ProgressBar
from torch import Tensor, nn

from benchmarks.work import CLIP, LOG_EVERY, Batches, Setting, make_loss, make_model, make_optimizer, make_scheduler


def train(setting: Setting, batches: Batches, folder: Path) -> nn.Module:
    """Bare: create_supervised_trainer with its default options, which reads each loss with item(), and no handlers. Standard:
    a custom update function over 4 batches, because the supplied one has no place for clip_grad_norm_(0.25); it reads each
    loss with item() too. Handlers: LRScheduler before each update, TensorboardLogger every 50 updates, ProgressBar with the
    loss, which redraws at each batch."""
    return _standard(setting, batches, folder) if setting.extras else _bare(setting, batches)


def _bare(setting: Setting, batches: Batches) -> nn.Module:
    model = make_model(setting)
    trainer = create_supervised_trainer(model, make_optimizer(model), make_loss(setting))
    trainer.run(batches, max_epochs=1)
    return model


def _standard(setting: Setting, batches: Batches, folder: Path) -> nn.Module:
    model, loss_function = make_model(setting), make_loss(setting)
    optimizer = make_optimizer(model)
    scheduler = make_scheduler(setting, optimizer)

    def update(engine: Engine, batch: tuple[Tensor, Tensor]) -> float:
        if (engine.state.iteration - 1) % setting.accumulate == 0:
            optimizer.zero_grad()
        model.train()
        x, y = batch
        loss = loss_function(model(x), y)
        (loss / setting.accumulate).backward()
        if engine.state.iteration % setting.accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        return loss.item()

    trainer = Engine(update)
    # At the start of the batch that closes a window, because the wrapper sets the rate of the next update.
    trainer.add_event_handler(Events.ITERATION_STARTED(every=setting.accumulate), LRScheduler(scheduler))
    ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})
    written = Events.ITERATION_COMPLETED(every=LOG_EVERY * setting.accumulate)
    with TensorboardLogger(log_dir=str(folder)) as logger:
        logger.attach_output_handler(trainer, written, tag="training", output_transform=lambda loss: {"loss": loss})
        logger.attach_opt_params_handler(trainer, written, optimizer=optimizer, param_name="lr")
        trainer.run(batches, max_epochs=1)
    return model
