"""What loggers share: a place for each run, files that outlive a full disk, and a description of the run."""

from __future__ import annotations

import contextlib
import io
import math
import os
import platform
import re
import socket
import sys
import time
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eventtrain.checkpoint.rng import isolated_rng
from eventtrain.data.device import move_to_device
from eventtrain.errors import MisconfigurationError
from eventtrain.module.modes import restore_modes
from eventtrain.version import __version__

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from eventtrain.module.module import LightningModule
    from eventtrain.trainer import Trainer

MOST_TEXT = 20_000  # characters of a module's text that are kept
FLUSH_INTERVAL = 10.0  # seconds after which what an event file holds back is written

# ------------------------------------------------------------------ a place for each run


def next_version(parent: Path) -> Path:
    """The first ``version_<n>`` in a directory that is free, after the largest that is taken."""
    taken = [int(m.group(1)) for child in parent.glob("version_*") if (m := re.fullmatch(r"version_(\d+)", child.name))]
    return parent / f"version_{max(taken, default=-1) + 1}"


def new_version(parent: Path) -> Path:
    """Makes the directory of :func:`next_version`: of runs that begin at the same time, each has its own."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        directory = next_version(parent)
        with contextlib.suppress(FileExistsError):  # another run took it just now
            directory.mkdir()
            return directory


def new_file(path: Path) -> Path:
    """Makes an empty file that is the caller's alone: the path, or where it is taken, ``<stem>-<n><suffix>``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = path, 0
    while True:
        with contextlib.suppress(FileExistsError):
            candidate.touch(exist_ok=False)
            return candidate
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")


def portable(path: Path | None, root: str) -> str | None:
    """A path as a checkpoint keeps it: relative to the run's root where it lies below, so that the tree can be moved."""
    if path is None:
        return None
    inside, base = path.resolve(), Path(root).resolve()
    return (inside.relative_to(base) if inside.is_relative_to(base) else inside).as_posix()


def check_cadence(owner: str, argument: str, value: Any) -> None:
    """Refuses a cadence that is no whole number from 1.

    Raises:
        MisconfigurationError: It is such.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MisconfigurationError(f"{owner}({argument}={value!r}): it has to be a whole number from 1.")


# ------------------------------------------------------------------ files


@contextlib.contextmanager
def refusing_bad_places(owner: str, argument: str) -> Generator[None, None, None]:
    """Names the logger and the argument to change where a place can't be written from the start.

    Raises:
        MisconfigurationError: It cannot.
    """
    try:
        yield
    except OSError as error:
        raise MisconfigurationError(
            f"{owner} cannot write to {error.filename}: {error.strerror}. Give a {argument} that can be written to."
        ) from error


class RunFile:
    """A file that a run appends to for as long as that works.

    The first failure, a full disk or a file that has gone, gives one warning; from then on everything is dropped, because
    a run is worth more than its log.

    Args:
        path: The file; it and its directory are made where they are not there.
        owner: Who writes it, for the warning.
        position: Where to go on, in bytes; what lies behind is cut off. The end of the file where None.

    Raises:
        OSError: The file cannot be opened.

    Attributes:
        position: The file's length in bytes, as of the last flush that succeeded.
    """

    def __init__(self, path: Path, owner: str, position: int | None = None) -> None:
        self.path = path.absolute()  # the program may change its directory
        self.owner = owner
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        self.position = file.seek(0, os.SEEK_END)
        if position is not None and position < self.position:
            file.truncate(position)
            self.position = file.seek(0, os.SEEK_END)
        self._file: Any = file

    def write(self, data: bytes) -> None:
        """Appends, for now to a buffer."""
        if self._file is not None:
            try:
                self._file.write(data)
            except OSError as error:
                self._give_up(error)

    def flush(self) -> None:
        """Writes what is in the buffer."""
        if self._file is not None:
            try:
                self._file.flush()
                os.stat(self.path)  # one that was removed takes all that is written to it
                self.position = self._file.tell()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Flushes and closes the file; does nothing to one that is closed."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        file, self._file = self._file, None
        with contextlib.suppress(OSError):  # its buffer can't be written either
            file.close()
        warnings.warn(
            f"{self.owner} has stopped writing: {self.path} cannot be written to any more ({error.strerror}). The run goes on "
            "and nothing more of it is logged there.",
            stacklevel=3,
        )


# ------------------------------------------------------------------ TensorBoard's files


class EventFile:
    """An event file of TensorBoard's that writes in the caller's thread, through a :class:`RunFile`.

    TensorBoard's own writer leaves it to a thread, which a full disk ends with a trace on stderr, and an error wherever
    something is logged next.

    Args:
        directory: The run's directory.
        owner: Who writes it, for the warning.
        purge_step: Readers forget what the directory's files held before of this step and later ones; None for nothing.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, directory: Path, owner: str, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self.directory = directory
        begun = event_file_stamps(directory)
        # Readers take a directory's files in the order of their names: this one's sorts behind those that are there, two
        # that are begun within a second, or on machines whose clocks differ, included.
        stamp = max(int(time.time()), max(begun, default=0) + 1)
        self._file = RunFile(directory / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}", owner)
        self._records = RecordWriter(self._file)
        self._flushed = 0.0
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is None and not begun:
            purge_step = 0  # TensorBoard takes the first mark for a beginning, and purges at later ones alone
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self.add_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def get_logdir(self) -> str:
        """The run's directory."""
        return str(self.directory)

    def add_event(self, event: Any) -> None:
        """Adds an event."""
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Writes what is held back."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()


EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")


def event_files(directory: Path) -> list[Path]:
    """A directory's event files, as :class:`EventFile` names them."""
    return [path for path in directory.glob("events.out.tfevents.*") if EVENT_FILE.match(path.name)]


def event_file_stamps(directory: Path) -> list[int]:
    """The seconds in the names of a directory's event files."""
    found = (EVENT_FILE.match(path.name) for path in event_files(directory))
    return [int(match.group(1)) for match in found if match]


def cut_off(directory: Path, kept: Mapping[str, int]) -> None:
    """Takes from a directory's event files what came after a checkpoint.

    Args:
        directory: The run's directory.
        kept: The files that there were, with their lengths in bytes; others are removed.

    Raises:
        OSError: They cannot be changed.
    """
    for path in event_files(directory):
        if path.name not in kept:
            path.unlink()
        elif path.stat().st_size > kept[path.name]:
            os.truncate(path, kept[path.name])


def open_writer(directory: Path, owner: str, purge_step: int | None = None) -> SummaryWriter:
    """A ``SummaryWriter`` whose events go to an :class:`EventFile`; arguments and errors as there."""
    from torch.utils.tensorboard import SummaryWriter  # when used: it takes seconds to import
    from torch.utils.tensorboard.writer import FileWriter

    class RunWriter(SummaryWriter):
        file_writer: Any
        all_writers: Any

        def _get_file_writer(self) -> Any:
            if self.file_writer is None:
                self.file_writer = FileWriter.__new__(FileWriter)  # its __init__ would open TensorBoard's own file
                self.file_writer.event_writer = EventFile(directory, owner, self.purge_step)
                self.all_writers = {str(directory): self.file_writer}
                self.purge_step = None  # only once, should the writer be used again after it was closed
            return self.file_writer

    return RunWriter(str(directory), purge_step=purge_step)


def session_start(hparams: Mapping[str, Any]) -> Any:
    """The summary that puts a run and its hyperparameters on TensorBoard's HParams page.

    No summary of the experiment goes with it: TensorBoard then gathers the columns from all runs, hyperparameters and
    scalars alike, where an experiment's summary in one run would hide the others'.

    Args:
        hparams: The values by name, nested or not; what is no number, string or bool is shown as text.
    """
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo  # type: ignore[import-untyped]

    info = SessionStartInfo(start_time_secs=time.time())
    for name, value in flat(hparams).items():
        if isinstance(value, bool):
            info.hparams[name].bool_value = value
        elif isinstance(value, (int, float)) and math.isfinite(value):  # the page's JSON knows no others
            info.hparams[name].number_value = value
        else:
            info.hparams[name].string_value = value if isinstance(value, str) else repr(value)
    return _hparams_summary(SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=info))


def session_end() -> Any:
    """The summary that says on the HParams page that the run ended well.

    There is none for a run that failed: TensorBoard keeps the first that it reads, and the run may be resumed.
    """
    from tensorboard.plugins.hparams.api_pb2 import Status  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    info = SessionEndInfo(status=Status.STATUS_SUCCESS, end_time_secs=time.time())
    return _hparams_summary(SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=info))


def _hparams_summary(tag: str, content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams.metadata import NULL_TENSOR, create_summary_metadata

    return Summary(value=[Summary.Value(tag=tag, metadata=create_summary_metadata(content), tensor=NULL_TENSOR)])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names joined by slashes."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{name}/"))
        else:
            result[f"{prefix}{name}"] = value
    return result


def draw_graph(writer: SummaryWriter, module: LightningModule) -> None:
    """Adds the graph of a module's ``forward`` on its ``example_input_array``, and leaves the module's modes and the random
    number generators as they were. A module that cannot be traced is worth a warning and no run.

    Args:
        writer: The writer.
        module: The module, on its device.
    """
    name = type(module).__name__
    if module.example_input_array is None:
        warnings.warn(
            f"No graph of {name} is logged: it has no example input. Set self.example_input_array in its __init__ to what "
            "forward takes.",
            stacklevel=2,
        )
        return
    training = {part: part.training for part in module.modules()}
    try:
        with isolated_rng(), torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # Tracing warns of its age, and of what it could not generalise, which a picture need not do; it prints its errors.
            warnings.simplefilter("ignore")
            example = move_to_device(module.example_input_array, module.device)
            writer.add_graph(module, example)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(f"No graph of {name} is logged, since its forward could not be traced: {reason}", stacklevel=2)
    finally:
        restore_modes(training)


# ------------------------------------------------------------------ what a run is


def environment(trainer: Trainer) -> dict[str, Any]:
    """Where a run takes place, by name."""
    facts = {
        "eventtrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": " ".join(sys.argv),
        "working directory": os.getcwd(),
        "device": trainer.device,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
    }
    if trainer.device.type == "cuda":
        facts |= {"CUDA": torch.version.cuda, "GPU": torch.cuda.get_device_name(trainer.device)}
    return facts


def configuration(trainer: Trainer) -> dict[str, Any]:
    """How a run trains, by name, once its optimizers exist."""
    facts: dict[str, Any] = {
        "module": type(trainer.module).__name__,
        "optimization": "automatic" if trainer.module.automatic_optimization else "manual",
        **{field: getattr(trainer.extent, field) for field in trainer.extent.__slots__},
        **{f"limit of {stage} batches": limit for stage, limit in trainer.limits.items()},
        "num_sanity_val_steps": trainer.num_sanity_val_steps,
        "seed": trainer.seed,
    }
    for kind, parts in (
        ("callback", [described(callback) for callback in trainer.callbacks]),
        ("optimizer", [repr(optimizer.optimizer) for optimizer in trainer.optimizers]),
        ("scheduler", [f"{type(c.scheduler).__name__} per {c.interval}" for c in trainer.lr_scheduler_configs]),
    ):
        facts |= {f"{kind} {number}": text for number, text in enumerate(parts, 1)}
    return facts


def described(part: Any) -> str:
    """An object in a line: its own ``repr``, or its class and the plain ones of its public attributes."""
    kind: Any = type(part)
    if kind.__repr__ is not object.__repr__:
        return repr(part)
    plain = (bool, int, float, str, os.PathLike, type(None))
    attributes = [f"{name}={v!r}" for name, v in vars(part).items() if not name.startswith("_") and isinstance(v, plain)]
    return f"{kind.__name__}({', '.join(attributes)})"


def table(facts: Mapping[str, Any]) -> str:
    """Facts as a table in Markdown, which TensorBoard renders."""
    rows = [f"| {name} | {' '.join(str(value).split()).replace('|', chr(92) + '|')} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def module_text(module: LightningModule) -> str:
    """A module's parts as a block of code in Markdown, with how many parameters it has, shortened where it is very long."""
    text = repr(module)
    if len(text) > MOST_TEXT:
        text = f"{text[:MOST_TEXT]}\n... and {len(text) - MOST_TEXT} characters more"
    parameters = list(module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    head = f"{sum(p.numel() for p in parameters)} parameters, {trained} of them trained"
    return "\n".join([head, "", *(f"    {line}" for line in text.splitlines())])
