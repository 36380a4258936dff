"""Compare the tokens per second of trainers with those of a hand-tuned loop, on one GPU.

Every contestant trains the same network on the same prefetched batches, in bf16 with fused AdamW and gradients clipped at
norm 1.0. The host waits for the device only at the beginning and at the end of the measured batches. Repetitions are
interleaved. In each repetition, every contestant trains once, in a rotating order, and its speed is divided by the speed of the
hand-tuned loop in the same repetition. So if a ratio is below 1, the contestant is slower. The ratio of the hand-tuned loop to
itself is the noise. Before timing, parameters are compared after a few updates with deterministic kernels::

    python -m benchmarks.gpu
    python -m benchmarks.gpu --models gpt2 --only eventtrain --repetitions 20
    python -m benchmarks.gpu --check-syncs            # does eventtrain wait for the device between steps that log?
    python -m benchmarks.gpu --device cpu --tiny      # no figures: try the program without a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.overhead import quiet
from benchmarks.report import environment, save
from benchmarks.work import parameters
from eventtrain import Callback, LightningModule, Trainer
from eventtrain.callbacks import (
    GradientAccumulation,
    GradientClipping,
    LRSchedulerStepping,
    MixedPrecision,
    TensorBoardLogger,
)
from eventtrain.events import BeforeBatchFetch, Teardown, TrainEpochEnd

CLIP = 1.0
COMPARED = 4
"""The number of batches after which parameters are compared."""
DISTINCT = 8
"""The number of different batches, which a run repeats."""

Batch = tuple[Tensor, Tensor]
"""Tokens, and for each the token that follows it: two tensors ``(batch, context)``."""


@dataclass(frozen=True)
class Setting:
    """A network and its batches.

    Attributes:
        layers: The number of blocks of attention and perceptron.
        width: The number of features of a token.
        heads: The number of heads of attention.
        context: The number of tokens of a sequence.
        vocabulary: The number of different tokens.
        batch_size: The number of sequences of a batch.
        batches: The number of measured batches.
        warm_up: The number of batches before them: they compile, allocate, and let clocks settle.
        compiler: The backend of :func:`torch.compile`; None if nothing is compiled.
    """

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    batch_size: int
    batches: int
    warm_up: int
    compiler: str | None

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the measured batches."""
        return self.batches * self.batch_size * self.context

    @property
    def stretch(self) -> tuple[int, int]:
        """Return the index of the first measured batch, and of the batch after the last, which stops the clock."""
        return self.warm_up, self.warm_up + self.batches

    def tiny(self) -> Setting:
        """Return a tiny copy to try the program with. If the setting is compiled, the copy is only traced."""
        sizes = {"layers": 1, "width": 16, "heads": 2, "context": 8, "vocabulary": 32, "batch_size": 2}
        return replace(self, **sizes, batches=3, warm_up=1, compiler=self.compiler and "eager")


_SMALL = Setting(layers=2, width=128, heads=4, context=64, vocabulary=256, batch_size=8, batches=400, warm_up=50, compiler=None)
SETTINGS = {
    # The size of GPT-2 small, with the vocabulary rounded up to a multiple of 128.
    "gpt2": Setting(
        layers=12,
        width=768,
        heads=12,
        context=1024,
        vocabulary=50304,
        batch_size=16,
        batches=50,
        warm_up=10,
        compiler="inductor",
    ),
    # So small that the device waits for the host: launching operators one by one takes most of a step. If the network is
    # compiled and few operators are left, Python takes most of it.
    "small": _SMALL,
    "small-compiled": replace(_SMALL, compiler="inductor"),
}


# ------------------------------------------------------------------ network and optimizer


class Block(nn.Module):
    """Causal self-attention and a perceptron, each behind a layer norm and beside a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(batch, context, width)``, the shape of the input."""
        split = self.queries_keys_values(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each (batch, heads, context, width of a head)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).flatten(-2))
        features: Tensor = x + self.perceptron(self.perceptron_norm(x))
        return features


class Decoder(nn.Module):
    """A decoder-only transformer whose output weights are the weights of its embedding.

    It computes the loss too, so that a compiler sees the whole forward of a step.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        width = setting.width
        self.embedding = nn.Embedding(setting.vocabulary, width)
        self.position = nn.Parameter(torch.empty(setting.context, width))
        self.blocks = nn.Sequential(*(Block(width, setting.heads) for _ in range(setting.layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, setting.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        for each in self.parameters():
            if each.ndim > 1:
                nn.init.normal_(each, std=0.02)

    def forward(self, tokens: Tensor, following: Tensor) -> Tensor:
        """Return the mean cross-entropy of the following tokens. Both tensors are ``(batch, context)``."""
        logits = self.head(self.norm(self.blocks(self.embedding(tokens) + self.position)))
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def make_network(setting: Setting, device: torch.device) -> nn.Module:
    """Return the network of a setting, compiled in place, with the same weights at each call."""
    torch.manual_seed(0)
    with device:
        network = Decoder(setting)
    if setting.compiler is not None:
        # Sizes never change. A break in the graph is an error, so that it cannot make a step slower unnoticed.
        network.compile(backend=setting.compiler, fullgraph=True, dynamic=False)
    return network


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, whose update of all parameters is one kernel."""
    return torch.optim.AdamW(network.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


# ------------------------------------------------------------------ batches


def make_batches(setting: Setting, device: torch.device, count: int) -> list[Batch]:
    """Return batches on the host, the same at each call; if the device is a GPU, in pinned memory."""
    size = (DISTINCT, setting.batch_size, setting.context + 1)
    drawn = torch.randint(setting.vocabulary, size, generator=torch.Generator().manual_seed(1))
    distinct = [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in drawn]
    if device.type == "cuda":
        distinct = [(tokens.pin_memory(), following.pin_memory()) for tokens, following in distinct]
    return [distinct[index % DISTINCT] for index in range(count)]


class Prefetcher:
    """The batches of a run on their device. Each is copied to it during the training of the batch before.

    It is the loader of every contestant, and the clock: the host waits for the device at the beginning and at the end of the
    measured stretch. On the CPU it makes a copy too, so that the code is the same.

    Args:
        batches: The batches on the host, pinned if the device is a GPU.
        device: The device on which they are handed out.
        stretch: The index of the batch that starts the clock, and of the batch that stops it; None for no clock.

    Attributes:
        seconds: The time of the stretch.
        peak_memory: The largest number of bytes that were allocated on the GPU in it; None on the CPU.
    """

    def __init__(self, batches: Sequence[Batch], device: torch.device, stretch: tuple[int, int] | None = None) -> None:
        self.seconds = 0.0
        self.peak_memory: int | None = None
        self._batches = batches
        self._device = device
        self._backend = torch.get_device_module(device)  # torch.cuda; torch.cpu has streams that do nothing
        self._first, self._last = stretch or (-1, -1)
        self._began = 0.0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        backend, count = self._backend, len(self._batches)
        side = backend.Stream()
        ahead = self._copy(0, side)
        for index in range(count):
            batch = ahead
            # Before the next copy is queued on the side stream, so that this waits only for the current batch.
            backend.current_stream().wait_stream(side)
            if index + 1 < count:
                ahead = self._copy(index + 1, side)
            if index == self._first:
                self._start()
            elif index == self._last:
                self._stop()
            yield batch

    def _copy(self, index: int, side: Any) -> Batch:
        """Queue the copy of a batch: after the steps that were queued so far, and in parallel with the next one.

        The memory belongs to the stream that trains, and no copy overtakes that stream. So the memory can be used again once
        the batch is released, and the allocator does not have to watch two streams.
        """
        tokens, following = self._batches[index]
        copied = torch.empty_like(tokens, device=self._device), torch.empty_like(following, device=self._device)
        side.wait_stream(self._backend.current_stream())
        with self._backend.stream(side):
            copied[0].copy_(tokens, non_blocking=True)
            copied[1].copy_(following, non_blocking=True)
        return copied

    def _start(self) -> None:
        self._backend.synchronize(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._began = time.perf_counter()

    def _stop(self) -> None:
        self._backend.synchronize(self._device)
        self.seconds = time.perf_counter() - self._began
        if self._device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(self._device)


# ------------------------------------------------------------------ contestants


def by_hand(setting: Setting, loader: Prefetcher, device: torch.device) -> nn.Module:
    """Train with plain PyTorch. The loop contains only the work that has to be done in each step."""
    network = make_network(setting, device)
    optimizer = make_optimizer(network)
    clipped = list(network.parameters())
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    for tokens, following in loader:
        with autocast:
            loss = network(tokens, following)
        loss.backward()
        nn.utils.clip_grad_norm_(clipped, CLIP)
        optimizer.step()
        optimizer.zero_grad()  # here, so that the next forward can use their memory
    return network


class Module(LightningModule):
    """A module with the network of a setting, for eventtrain."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        super().__init__()
        self.network = make_network(setting, device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss: Tensor = self.network(*batch)
        return loss

    def configure_optimizers(self) -> Any:
        """Return fused AdamW."""
        return make_optimizer(self.network)


def by_eventtrain(setting: Setting, loader: Prefetcher, device: torch.device) -> nn.Module:
    """Train with eventtrain."""
    module = Module(setting, device)
    callbacks = [MixedPrecision("bf16"), GradientClipping(CLIP)]
    Trainer(max_epochs=1, callbacks=callbacks, default_callbacks=False, device=device).fit(module, loader)
    return module.network


def by_lightning(setting: Setting, loader: Prefetcher, device: torch.device) -> nn.Module:
    """Train with Lightning, in the mode in which it measures its overhead."""
    from lightning import pytorch as lightning  # only if it takes part, because the import takes seconds

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = make_network(setting, device)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss: Tensor = self.network(*batch)
            return loss

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            # Trainer(gradient_clip_val=...) refuses fused optimizers in mixed precision.
            nn.utils.clip_grad_norm_(self.parameters(), CLIP)

        def configure_optimizers(self) -> Any:
            return make_optimizer(self.network)

    accelerator, devices = ("gpu", [device.index]) if device.type == "cuda" else ("cpu", 1)
    trainer = lightning.Trainer(max_epochs=1, accelerator=accelerator, devices=devices, precision="bf16-mixed", barebones=True)
    module = Module()
    trainer.fit(module, loader)
    return module.network


BASELINE = "hand-tuned"
CONTESTANTS: dict[str, Callable[[Setting, Prefetcher, torch.device], nn.Module]] = {
    BASELINE: by_hand,
    "hand-tuned, again": by_hand,
    "eventtrain": by_eventtrain,
    "Lightning": by_lightning,
}


# ------------------------------------------------------------------ measuring


@dataclass
class Result:
    """The times of one contestant in one setting.

    Attributes:
        name: The contestant.
        equal: Whether its parameters equal those of the hand-tuned loop after a few updates, bit for bit.
        difference: The largest difference between them.
        seconds: The time of the measured batches, in each repetition.
        ratios: The speed over the speed of the hand-tuned loop in the same repetition.
        peak_memory: The largest number of bytes that were allocated on the GPU in that time; None on the CPU.
    """

    name: str
    equal: bool
    difference: float
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_memory: int | None = None


def train(name: str, setting: Setting, loader: Prefetcher, device: torch.device) -> nn.Module:
    """Let a contestant train, after all unused memory was released."""
    gc.collect()
    torch.cuda.empty_cache()
    with quiet():
        return CONTESTANTS[name](setting, loader, device)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let torch choose kernels that give the same bits each time; the fastest kernels of a GPU do not.

    If torch has no such kernel, it warns and continues. Then the comparison of the hand-tuned loop with itself shows it.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def final_parameters(name: str, setting: Setting, batches: Sequence[Batch], device: torch.device) -> Tensor:
    """Return the parameters of a contestant after the first few batches, on the host."""
    with deterministic():
        return parameters(train(name, setting, Prefetcher(batches[:COMPARED], device), device)).cpu()


def compare(setting: Setting, names: list[str], repetitions: int, device: torch.device) -> list[Result]:
    """Let contestants train in turn, the hand-tuned loop first, and return their times."""
    # The networks of a setting share the code that is compiled for the first of them, except under Lightning's autocast,
    # which caches no casts. The code is dropped between settings, because torch compiles few versions of one function.
    torch.compiler.reset()
    batches = make_batches(setting, device, setting.stretch[1] + 1)
    expected = final_parameters(BASELINE, setting, batches, device)
    results = []
    for name in names:
        ended_with = final_parameters(name, setting, batches, device)
        results.append(Result(name, torch.equal(ended_with, expected), (ended_with - expected).abs().max().item()))
    for repetition in range(repetitions):
        at = repetition % len(results)
        for result in results[at:] + results[:at]:
            loader = Prefetcher(batches, device, setting.stretch)
            train(result.name, setting, loader, device)
            result.seconds.append(loader.seconds)
            if loader.peak_memory is not None:
                result.peak_memory = max(result.peak_memory or 0, loader.peak_memory)
        for result in results:
            result.ratios.append(results[0].seconds[-1] / result.seconds[-1])
    return results


def table(name: str, setting: Setting, results: list[Result]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        f"| {name} | ms per batch, minimum | tokens/s, best | ratio of minima | median of paired ratios | peak memory, MiB |"
        " parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    fastest = min(results[0].seconds)
    for result in results:
        least = min(result.seconds)
        peak = "-" if result.peak_memory is None else f"{result.peak_memory / 2**20:.0f}"
        same = "equal" if result.equal else f"differ by {result.difference:.1g}"
        lines.append(
            f"| {result.name} | {least / setting.batches * 1e3:.3f} | {setting.tokens / least:.0f} | {fastest / least:.4f} | "
            f"{statistics.median(result.ratios):.4f} | {peak} | {same} |"
        )
    return "\n".join(lines)


def described(name: str, setting: Setting) -> str:
    """Return the description of a setting, in one line."""
    with torch.device("meta"):
        count = sum(each.numel() for each in Decoder(setting).parameters())
    compiled = "not compiled" if setting.compiler is None else f"compiled ({setting.compiler})"
    return (
        f"- {name}: {setting.layers} layers, width {setting.width}, {setting.heads} heads, {count:,} parameters; batches of "
        f"{setting.batch_size} x {setting.context} tokens, {setting.batches} measured; {compiled}"
    )


# ------------------------------------------------------------------ waiting for the device

ACCUMULATE, LOG_EVERY, CHECKED_STEPS = 2, 10, 30
"""For the run that is checked: batches per update, updates from one that logs to the next, and the number of updates."""


class SyncCheck(Callback):
    """Has torch raise an error if the host waits for the device. The check begins after the first step that logs, and leaves
    out steps that log.

    Attributes:
        batches: The number of batches that were trained under the check.
    """

    def __init__(self) -> None:
        self.batches = 0

    def on_before_batch_fetch(self, trainer: Trainer, event: BeforeBatchFetch) -> None:
        """Switch the check on or off for the next batch."""
        step = trainer.global_step + 1  # the step of the batch
        checked = step > LOG_EVERY and step % LOG_EVERY != 0
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        self.batches += checked

    def on_train_epoch_end(self, trainer: Trainer, event: TrainEpochEnd) -> None:
        """Switch the check off, because the end of the epoch logs."""
        torch.cuda.set_sync_debug_mode("default")

    def on_teardown(self, trainer: Trainer, event: Teardown) -> None:
        """Switch the check off, also after an error."""
        torch.cuda.set_sync_debug_mode("default")


class LoggingModule(Module):
    """The same network with a schedule and metrics, which would wait for the device if they were written carelessly."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log the loss of a batch, and return it."""
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return fused AdamW, and one cycle over the updates."""
        optimizer = make_optimizer(self.network)
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-4, total_steps=total)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def check_syncs(setting: Setting, device: torch.device) -> int:
    """Train with eventtrain while torch refuses to wait for the device, except in steps that log.

    Returns:
        The number of batches that were trained under the check.

    Raises:
        RuntimeError: If the host waited for the device; the error is torch's, and its traceback shows the place. Also if torch
            does not notice such a wait.
    """
    if not refuses_to_wait(device):
        raise RuntimeError("torch.cuda.set_sync_debug_mode('error') let a tensor be read: the check would see nothing.")
    torch.compiler.reset()
    loader = Prefetcher(make_batches(setting, device, CHECKED_STEPS * ACCUMULATE), device)
    check = SyncCheck()
    with tempfile.TemporaryDirectory() as folder, quiet():
        callbacks = [
            check,
            MixedPrecision("bf16"),
            GradientAccumulation(ACCUMULATE),
            GradientClipping(CLIP),
            LRSchedulerStepping(),
            TensorBoardLogger(folder, log_every_n_steps=LOG_EVERY),
        ]
        trainer = Trainer(max_epochs=1, callbacks=callbacks, default_callbacks=False, device=device)
        trainer.fit(LoggingModule(setting, device), loader)
    return check.batches


def refuses_to_wait(device: torch.device) -> bool:
    """Return whether torch raises an error if a tensor is read, after it was told to."""
    value = torch.ones((), device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value.item()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


# ------------------------------------------------------------------ the program


def facts_of(device: torch.device, names: list[str], repetitions: int) -> dict[str, Any]:
    """Return facts about the device, the machine and the software."""
    facts = environment() | {"device": device.type, "repetitions": repetitions}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "CUDA": torch.version.cuda}
    if "Lightning" in names:
        facts["Lightning"] = importlib.metadata.version("lightning")
    return facts


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    peers = [name for name in CONTESTANTS if not name.startswith(BASELINE)]
    parser.add_argument("--only", nargs="+", choices=peers, help="contestants beside the hand-tuned loop")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="rewrite docs/performance.md and its JSON")
    parser.add_argument("--check-syncs", action="store_true", help="measure nothing; fail if eventtrain waits for the device")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks and runs too small for figures")
    options = parser.parse_args(arguments)

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "benchmarks.gpu measures on a GPU, and torch sees no CUDA device. To try the program without one, write "
            "--device cpu --tiny."
        )
    if options.check_syncs and options.device == "cpu":
        parser.error("--check-syncs needs a GPU: on the CPU nothing waits for a device. Leave --device out.")
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    settings = {name: SETTINGS[name].tiny() if options.tiny else SETTINGS[name] for name in options.models}
    if options.check_syncs:
        for name, setting in settings.items():
            print(f"{name}: eventtrain did not wait for the device in {check_syncs(setting, device)} batches", flush=True)
        return

    names = [name for name in CONTESTANTS if name not in peers or options.only is None or name in options.only]
    if "Lightning" in names and importlib.util.find_spec("lightning") is None:
        names.remove("Lightning")
        print("Lightning is not installed and takes no part.", file=sys.stderr)
    facts = facts_of(device, names, options.repetitions)
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), file=sys.stderr)
    texts, figures = [], {}
    for name, setting in settings.items():
        results = compare(setting, names, options.repetitions, device)
        figures[name] = {"setting": asdict(setting), "results": [asdict(result) for result in results]}
        texts.append(table(name, setting, results))
        print(f"\n{texts[-1]}", flush=True)
    legend = "\n".join(described(name, setting) for name, setting in settings.items())
    print(f"\n{legend}")
    if options.save:
        save("gpu", "\n\n".join([*texts, legend]), facts, figures)


if __name__ == "__main__":
    main()
