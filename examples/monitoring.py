"""Watch a run with every logger and monitor: its metrics, its cost, and the events of a step.

The network and the pictures are those of ``digits.py``. The run writes scalars, histograms, pictures, text and hyperparameters
for TensorBoard, a file of JSON lines, a profile of its phases, a trace of torch's operators, and a page that shows the events
of single steps::

    python examples/monitoring.py
    tensorboard --logdir runs
"""

import argparse
from pathlib import Path

import torch
from digits import DigitClassifier, loaders
from torch import Tensor

from eventtrain import Callback, Trainer, seed_everything
from eventtrain.callbacks import (
    EventTimeline,
    GradientAccumulation,
    GradientClipping,
    GradientNormMonitor,
    JSONLinesLogger,
    LearningRateMonitor,
    ModelSummary,
    Profiler,
    SystemMonitor,
    TensorBoardLogger,
    TorchProfiler,
)
from eventtrain.events import MetricsLogged, ValidationBatchEnd


class MistakenDigits(Callback):
    """Draws pictures that the network takes for another digit. It shows how to write a callback.

    Listens to ``validation_batch_end``, and to ``metrics_logged`` after each validation.

    Args:
        most: The largest number of pictures to draw.
    """

    def __init__(self, most: int = 16) -> None:
        self.most = most
        self.pictures: list[Tensor] = []

    def on_validation_batch_end(self, trainer: Trainer, event: ValidationBatchEnd) -> None:
        images, labels = event.batch
        mistaken = trainer.module(images).argmax(dim=1) != labels
        self.pictures.extend(images[mistaken][: self.most - len(self.pictures)])

    def on_metrics_logged(self, trainer: Trainer, event: MetricsLogged) -> None:
        if event.stage != "validation" or not self.pictures:
            return
        # Enlarged four times, because a picture of 8x8 pixels is too small to see.
        pictures = torch.stack(self.pictures).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        trainer.callback(TensorBoardLogger).writer.add_images("mistaken", pictures, event.step)
        self.pictures.clear()


def main() -> None:
    """Train with every logger and monitor attached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", default="runs")
    args = parser.parse_args()

    seed_everything(args.seed)
    torch.set_num_threads(1)
    log_dir = Path(args.log_dir)
    model = DigitClassifier()
    model.example_input_array = torch.zeros(1, 1, 8, 8)  # an input for the graph and for the shapes in the summary
    train, val, _ = loaders(batch_size=32)
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[
            GradientAccumulation(2),
            GradientClipping(1.0),
            ModelSummary(),
            LearningRateMonitor(),
            GradientNormMonitor(),
            SystemMonitor(interval=1.0),
            Profiler(),
            TorchProfiler(dirpath=log_dir / "monitoring" / "torch"),
            EventTimeline(dirpath=log_dir / "monitoring" / "timeline"),
            MistakenDigits(),
            TensorBoardLogger(log_dir, name="monitoring", log_every_n_steps=5, histograms=20, log_graph=True),
            JSONLinesLogger(log_dir / "monitoring" / "metrics.jsonl", log_every_n_steps=5),
        ],
    )
    print(trainer.describe())
    trainer.fit(model, train, val)

    print(f"Look at the run: tensorboard --logdir {args.log_dir}")
    print(f"Open the events of single steps: {log_dir / 'monitoring' / 'timeline'}")
    print(f"validation accuracy {trainer.callback_metrics['accuracy/val']:.3f}")


if __name__ == "__main__":
    main()
