"""Every example runs, prints the lines that it promises, and leaves the values that it promises in TensorBoard."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch.utils.data import DataLoader, TensorDataset

import eventtrain
from eventtrain import Trainer, events

EXAMPLES = Path(__file__).parents[1] / "examples"
# The settings that make each example short. An example that is not in here fails test_every_example_is_tested.
SHORT = {
    "char_lm": ("--epochs", "2", "--steps", "10"),
    "custom_schedule": ("--epochs", "5"),
    "digits": ("--epochs", "2"),
    "distributed": ("--epochs", "2"),
    "gan": ("--epochs", "3"),
    "lbfgs": ("--steps", "5"),
    "monitoring": ("--epochs", "2"),
    "resume": ("--epochs", "2"),
}
LONG = ("char_lm", "distributed", "gan", "resume")  # even so: tests marked as slow run these
WITHOUT_LOGS = ("custom_schedule", "lbfgs")


class Run:
    """Runs an example in a new directory, with every warning an error."""

    def __init__(self, name: str, directory: Path, *options: str) -> None:
        self.directory = directory
        if name not in WITHOUT_LOGS:
            options = (*options, "--log-dir", "logs")
        # The package that is tested here, wherever it was imported from; one thread, because tests share the machine.
        path = [str(Path(eventtrain.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *options]
        directory.mkdir(exist_ok=True)
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}"
        self.lines = done.stdout.splitlines()
        self.stderr = done.stderr

    @functools.cached_property
    def events(self) -> Any:
        """The events that the run wrote for TensorBoard."""
        (directory,) = self.directory.glob("logs/*/version_0")
        assert list(directory.glob("events.out.tfevents.*"))
        return EventAccumulator(str(directory), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()

    def scalars(self, tag: str) -> dict[int, float]:
        """Return the values of a tag by step."""
        return {event.step: event.value for event in self.events.Scalars(tag)}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Return a function that runs an example once, when a test asks for it."""
    return functools.cache(lambda name: Run(name, tmp_path_factory.mktemp(name), *SHORT[name]))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def number(pattern: str, line: str) -> float:
    match = re.fullmatch(pattern, line)
    assert match, f"{line!r} does not match {pattern!r}"
    return float(match.group(1))


# ------------------------------------------------------------------ all of them


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHORT)


@pytest.mark.parametrize("name", sorted(SHORT))
def test_the_docstring_says_how_to_run_it(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"\n    python examples/{name}.py" in docstring
    assert ("\n    tensorboard --logdir runs" in docstring) == (name not in WITHOUT_LOGS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in sorted(SHORT)]
)
def test_an_example_writes_only_to_the_given_folder(name: str, short_run: Callable[[str], Run]) -> None:
    run = short_run(name)
    assert [path.name for path in run.directory.iterdir()] == ([] if name in WITHOUT_LOGS else ["logs"])
    assert any("tensorboard --logdir logs" in line for line in run.lines) == (name not in WITHOUT_LOGS)


# ------------------------------------------------------------------ digits


def test_digits(short_run: Callable[[str], Run]) -> None:
    run = short_run("digits")
    assert number(r"test accuracy (\d\.\d{3})", run.lines[-1]) > 0.8
    expected = {"loss/train", "accuracy/train", "loss/val", "accuracy/val", "loss/test", "accuracy/test", "lr-AdamW", "epoch"}
    assert set(run.events.Tags()["scalars"]) == expected
    assert list(run.scalars("loss/train")) == list(range(10, 81, 10))
    assert list(run.scalars("accuracy/val")) == [40, 80]
    assert "_hparams_/session_start_info" in run.events.PluginTagToContent("hparams")
    assert "epoch 2/2" in run.stderr  # the default progress bar


@pytest.mark.slow
def test_digits_repeat_themselves(tmp_path: Path, short_run: Callable[[str], Run]) -> None:
    run, again = short_run("digits"), Run("digits", tmp_path, *SHORT["digits"])
    assert again.scalars("loss/train") == run.scalars("loss/train")
    assert again.lines == run.lines


@pytest.mark.slow
def test_digits_as_it_comes(tmp_path: Path) -> None:
    run = Run("digits", tmp_path)
    assert number(r"test accuracy (\d\.\d{3})", run.lines[-1]) >= 0.97
    # 10 epochs of 40 updates and 10 of 20: the cycle of the learning rate is over with the last of them.
    rates = run.scalars("lr-AdamW")
    assert list(rates)[-1] == 600
    assert max(rates.values()) == pytest.approx(0.01, rel=0.01)
    assert rates[600] == pytest.approx(0.01 / 25 / 1e4, rel=1e-3)


# ------------------------------------------------------------------ gan


@pytest.mark.slow
def test_gan(short_run: Callable[[str], Run]) -> None:
    run = short_run("gan")
    assert 0 < number(r"final losses: discriminator (\d\.\d{3}), generator \d\.\d{3}", run.lines[-1]) < 1
    assert 0 < number(r"final losses: discriminator \d\.\d{3}, generator (\d\.\d{3})", run.lines[-1]) < 9
    assert set(run.events.Tags()["scalars"]) == {"discriminator_loss", "generator_loss", "lr-Adam-0", "lr-Adam-1", "epoch"}
    (picture,) = run.events.Images("digits")
    assert (picture.step, picture.width, picture.height) == (168, 288, 288)


def test_gan_steps_at_two_frequencies() -> None:
    gan = load("gan")
    model = gan.DigitGAN(draw_every=2)
    trainer = Trainer(max_epochs=1, default_callbacks=False)
    steps = []

    @trainer.signals.after_optimizer_step.connect
    def count(trainer: Trainer, event: events.AfterOptimizerStep) -> None:
        steps.append("generator" if event.optimizer is trainer.optimizers[0] else "discriminator")

    trainer.fit(model, DataLoader(TensorDataset(torch.rand(40, 1, 8, 8)), batch_size=8))
    both = ["discriminator", "generator"]
    assert steps == ["discriminator", *both, "discriminator", *both, "discriminator"]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gan_grid() -> None:
    images = torch.arange(1.0, 7.0).reshape(6, 1, 1, 1).expand(6, 2, 3, 2)
    picture = load("gan").grid(images, columns=3, border=1, zoom=1)
    row = torch.tensor([[1, 1, 0, 2, 2, 0, 3, 3, 0]] * 3 + [[0] * 9])
    below = torch.where(row > 0, row + 3, 0)
    assert torch.equal(picture, torch.cat([row, below]).float().expand(2, 8, 9))
    assert load("gan").grid(images, columns=2, border=0, zoom=5).shape == (2, 45, 20)


# ------------------------------------------------------------------ lbfgs


def test_lbfgs(short_run: Callable[[str], Run]) -> None:
    run = short_run("lbfgs")
    losses = [number(r"step +\d+, after +\d+ evaluations: loss (\S+)", line) for line in run.lines[:-1]]
    evaluations = [number(r"step +\d+, after +(\d+) evaluations: loss \S+", line) for line in run.lines[:-1]]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert evaluations[-1] > 50
    assert number(r"final loss (\S+)", run.lines[-1]) == losses[-1] < 1e-3


# ------------------------------------------------------------------ custom_schedule


def test_custom_schedule(short_run: Callable[[str], Run]) -> None:
    run = short_run("custom_schedule")
    pattern = r"epoch \d: step +(\d+), val_loss (\S+), (\d) batches per step, clipped at (\S+), learning rate (\S+)"
    rows = [match.groups() for line in run.lines if (match := re.fullmatch(pattern, line))]
    steps, losses, batches, thresholds, rates = ([float(value) for value in column] for column in zip(*rows, strict=True))
    assert steps == [50, 100, 113, 126, 139]
    assert batches == [1, 4, 4, 4, 4]
    assert thresholds == [1.0, 0.8, 0.64, 0.51, 0.41]
    assert rates[0] == 0.1
    assert rates[-1] < 0.1
    assert losses[0] > 10 * losses[-1]
    assert number(r"final val_loss (\S+)", run.lines[-1]) == losses[-1]


# ------------------------------------------------------------------ char_lm


@pytest.mark.slow
def test_char_lm(short_run: Callable[[str], Run]) -> None:
    run = short_run("char_lm")
    first, second = (number(r"epoch \d: perplexity (\S+)", line) for line in run.lines[:2])
    assert 96 > first > second
    assert number(r"final perplexity (\S+)", run.lines[-1]) == second
    assert set(run.events.Tags()["scalars"]) == {"train_loss", "val_loss", "val_perplexity", "lr-AdamW", "epoch"}
    rates = run.scalars("lr-AdamW")
    assert rates == pytest.approx({step: 4e-3 * step / 50 for step in (10, 20)})  # warming up
    samples = run.events.Tensors("sample/text_summary")
    assert [sample.step for sample in samples] == [10, 20]
    assert samples[0].tensor_proto.string_val[0].decode().startswith("```\nReturn ")


def test_char_lm_sees_no_later_character() -> None:
    model = load("char_lm").CharacterModel().eval()
    characters = torch.randint(96, (1, 20))
    changed = characters.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 96
    with torch.no_grad():
        before, after = model(characters), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


# ------------------------------------------------------------------ monitoring


def test_monitoring_shows_a_run_from_every_side(short_run: Callable[[str], Run]) -> None:
    run = short_run("monitoring")
    assert number(r"validation accuracy (\d\.\d{3})", run.lines[-1]) > 0.5
    scalars = set(run.events.Tags()["scalars"])
    assert {"loss/train", "accuracy/val", "lr-AdamW", "grad_norm", "grad_norm_clipped_fraction", "time/forward_ms"} <= scalars
    assert {"system/process_rss_bytes", "system/cpu_percent"} <= scalars
    assert any(tag.startswith("gradients/") for tag in run.events.Tags()["histograms"])
    assert "mistaken" in run.events.Tags()["images"] or run.scalars("accuracy/val")[40] == 1.0
    assert run.events.Graph().node
    text = "\n".join(run.lines)
    assert "-> EventTimeline.on_safe_point" in text, "describe()"
    assert "29,258 parameters" in text, "the summary"
    assert "a step, by itself" in text and "aten::convolution_backward" in text, "both profiles"
    records = [json.loads(line) for line in (run.directory / "logs/monitoring/metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss/train"] for record in records if record["scope"] == "step"}
    assert losses == run.scalars("loss/train")
    (page,) = run.directory.glob("logs/monitoring/timeline/*.html")
    assert "train_batch_start" in page.read_text()
    (trace,) = run.directory.glob("logs/monitoring/torch/*.json")
    assert "eventtrain/backward" in trace.read_text()


# ------------------------------------------------------------------ distributed


@pytest.mark.slow
def test_distributed_in_one_process(short_run: Callable[[str], Run]) -> None:
    run = short_run("distributed")
    assert run.lines[-2] == "processes 1, updates 40"
    assert number(r"test accuracy (\d\.\d{3})", run.lines[-1]) > 0.8


# ------------------------------------------------------------------ resume


@pytest.mark.slow
def test_resume(short_run: Callable[[str], Run]) -> None:
    run = short_run("resume")
    assert run.lines[0] == "starts"
    assert re.fullmatch(r"weights [0-9a-f]{16}", run.lines[-1])
    assert (run.directory / "logs" / "resume" / "checkpoints" / "last.ckpt").exists()
    assert list(run.scalars("loss/train")) == [10, 20, 30, 40]


@pytest.mark.slow
def test_resume_ends_alike_with_and_without_a_kill(tmp_path: Path) -> None:
    undisturbed = Run("resume", tmp_path / "straight", "--epochs", "25")
    directory = tmp_path / "killed"
    directory.mkdir()
    command = [sys.executable, "-W", "error", str(EXAMPLES / "resume.py"), "--epochs", "25", "--log-dir", "logs"]
    environment = {**os.environ, "PYTHONPATH": str(Path(eventtrain.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for how in (signal.SIGKILL, signal.SIGTERM):
        with open(tmp_path / f"{how.name}.txt", "wb") as errors:
            process = subprocess.Popen(
                command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("starts" if how == signal.SIGKILL else "resumes at update ")
        checkpoint = directory / "logs" / "resume" / "checkpoints" / "last.ckpt"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:  # until it has written another
            assert process.poll() is None, (tmp_path / f"{how.name}.txt").read_text()
            time.sleep(0.01)
        process.send_signal(how)
        process.stdout.close()
        assert process.wait() == (-signal.SIGKILL if how == signal.SIGKILL else 128 + signal.SIGTERM)
    last = Run("resume", directory, "--epochs", "25")
    assert re.fullmatch(r"resumes at update \d+", last.lines[0])
    assert last.lines[-1] == undisturbed.lines[-1]
    assert last.scalars("loss/train") == undisturbed.scalars("loss/train")
