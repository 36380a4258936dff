"""Train a character-level language model on the documentation of Python.

The text is the docstrings of the standard library, so there is nothing to download. A small transformer learns to continue
them. After each epoch it prints its perplexity on modules that it has not seen (a model that guesses among the 96 characters
has 96), and writes a sample into TensorBoard, on the page Text::

    python examples/char_lm.py
    tensorboard --logdir runs
"""

import argparse
import ast
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eventtrain import LightningModule, Trainer, seed_everything
from eventtrain.callbacks import GradientClipping, LearningRateMonitor, TensorBoardLogger

ALPHABET = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))


class CharacterModel(LightningModule):
    """A decoder-only transformer.

    Args:
        context: The number of characters that it sees at once.
        size: The length of the vector of a character.
        heads: The number of attention heads.
        layers: The number of blocks of attention and feed-forward layers.
        max_lr: The learning rate after the warm-up.
        warmup_steps: The number of updates over which the learning rate rises to ``max_lr``.
    """

    def __init__(
        self,
        context: int = 64,
        size: int = 96,
        heads: int = 4,
        layers: int = 2,
        max_lr: float = 4e-3,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(len(ALPHABET), size)
        self.position = nn.Parameter(torch.empty(context, size))
        for table in (self.embedding.weight, self.position):
            nn.init.normal_(table, std=0.05)  # small and of the same size, so that both count in their sum
        block = nn.TransformerEncoderLayer(
            size, heads, 4 * size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(size), enable_nested_tensor=False)
        self.head = nn.Linear(size, len(ALPHABET))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:
        length = characters.shape[1]
        vectors = self.embedding(characters) + self.position[:length]
        return self.head(self.blocks(vectors, mask=self.mask[:length, :length], is_causal=True))

    def loss(self, characters: Tensor) -> Tensor:
        """Return the mean cross entropy of each character but the first, given the characters before it."""
        logits = self(characters[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), characters[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]))

    def on_train_epoch_end(self) -> None:
        perplexity = math.exp(self.trainer.callback_metrics["val_loss"])
        self.log("val_perplexity", perplexity)
        self.print(f"epoch {self.current_epoch}: perplexity {perplexity:.2f}")
        sample = self.sample("Return ", 200)
        self.logger.experiment.add_text("sample", f"```\n{sample}\n```", self.global_step)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.max_lr, weight_decay=0.1)
        warmup, total = self.hparams.warmup_steps, self.trainer.estimated_stepping_batches

        def rate(step: int) -> float:
            """Return a factor that rises linearly, then falls along half a cosine to a tenth."""
            if step < warmup:
                return (step + 1) / warmup
            return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, total - warmup))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def sample(self, prompt: str, length: int) -> str:
        """Continue a prompt by ``length`` characters, each drawn from the distribution of the model."""
        characters = encode(prompt).unsqueeze(0).to(self.device)
        for _ in range(length):
            logits = self(characters[:, -self.hparams.context :])[0, -1]
            drawn = torch.multinomial(logits.softmax(dim=0), 1)
            characters = torch.cat([characters, drawn.unsqueeze(0)], dim=1)
        return "".join(ALPHABET[i] for i in characters[0])


def encode(text: str) -> Tensor:
    """Return the index of each character. If a character is not in the alphabet, it is left out."""
    index = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([index[character] for character in text if character in index])


def docstrings(path: Path) -> str:
    """Return all docstrings of a source file. Its code is not run."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(path.read_bytes()))
    texts = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
    return "\n\n".join(text for text in texts if text)


def main() -> None:
    """Read the text, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="updates per epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", default="runs")
    args = parser.parse_args()

    seed_everything(args.seed)  # before the model is built, so that its initial weights are the same too
    torch.set_num_threads(1)  # a network this small gains little from more, and loses much if they wait for each other
    texts = [docstrings(path) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    model = CharacterModel()

    def loader(texts: list[str], **options: bool) -> DataLoader:
        """Return batches of pieces that are one character longer than the context, because the first is not predicted."""
        length = model.hparams.context + 1
        characters = encode("\n\n".join(texts))
        pieces = characters[: len(characters) // length * length].view(-1, length)
        return DataLoader(TensorDataset(pieces), batch_size=32, **options)

    trainer = Trainer(
        max_epochs=args.epochs,
        limit_train_batches=args.steps,
        limit_val_batches=20,
        callbacks=[
            GradientClipping(1.0),
            LearningRateMonitor(),
            TensorBoardLogger(args.log_dir, name="char_lm", log_every_n_steps=10),
        ],
    )
    # Validate on every tenth module.
    train = [text for i, text in enumerate(texts) if i % 10]
    trainer.fit(model, loader(train, shuffle=True), loader(texts[::10]))

    print(f"Read the samples: tensorboard --logdir {args.log_dir}")
    print(f"final perplexity {trainer.callback_metrics['val_perplexity']:.2f}")


if __name__ == "__main__":
    main()
