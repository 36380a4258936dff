"""Write TensorBoard's event files, cut them off after a checkpoint, and build the records that they hold."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import socket
import time
import warnings
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from eventtrain._torch import summary_writer
from eventtrain.callbacks.loggers.run_files import RunFile, copy_beginning
from eventtrain.checkpoint.rng import isolated_rng
from eventtrain.checkpoint.storage import first_line
from eventtrain.data.device import transfer_to
from eventtrain.module.modes import restore_modes
from eventtrain.paths import AnyPath

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from eventtrain.module.module import LightningModule

FLUSH_INTERVAL = 10.0  # seconds after which an event file writes its buffer to disk
EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")

# ------------------------------------------------------------------ the files


class EventFile:
    """Write an event file of TensorBoard in the caller's thread, through a :class:`RunFile`.

    TensorBoard's own writer uses a thread. A full disk ends that thread with a trace on stderr, and the next value that is
    logged raises an error.

    Args:
        directory: The run's directory.
        owner: The name of the logger, for the warning.
        purge_step: Readers drop the values of this step and later ones that the directory's older files hold; None if they
            are to keep all.

    Raises:
        OSError: If the file cannot be opened.
    """

    def __init__(self, directory: AnyPath, owner: str, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self.directory = directory
        stamps = event_file_stamps(directory)
        # Readers take a directory's files in the order of their names. The name of this one sorts behind the others, even
        # if two files begin within a second, or on machines whose clocks differ.
        stamp = max(int(time.time()), max(stamps, default=0) + 1)
        self._file = RunFile(directory / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}", owner)
        self._records = RecordWriter(self._file)
        self._flushed = 0.0
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is None and not stamps:
            purge_step = 0  # TensorBoard takes the first mark for a beginning, and purges only at later ones
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self.add_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def get_logdir(self) -> str:
        """Return the run's directory."""
        return str(self.directory)

    def add_event(self, event: Any) -> None:
        """Add an event.

        Args:
            event: TensorBoard's record of it.
        """
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_INTERVAL:
            self.flush(now=False)

    def flush(self, *, now: bool = True) -> None:
        """Write the buffer to disk, see :meth:`RunFile.flush`."""
        self._file.flush(now=now)
        self._flushed = time.monotonic()

    @property
    def length(self) -> dict[str, int]:
        """The file's length in bytes as of the last flush, by its name."""
        return {self._file.path.name: self._file.position}

    @property
    def works(self) -> bool:
        """Whether there was no failure, and the file is open."""
        return self._file.works

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


def event_files(directory: AnyPath) -> list[Any]:
    """Return a directory's event files, as :class:`EventFile` names them."""
    return [path for path in directory.glob("events.out.tfevents.*") if EVENT_FILE.match(path.name)]


def event_file_stamps(directory: AnyPath) -> list[int]:
    """Return the seconds in the names of a directory's event files."""
    matches = (EVENT_FILE.match(path.name) for path in event_files(directory))
    return [int(match.group(1)) for match in matches if match]


def lengths_of(directory: AnyPath) -> dict[str, int]:
    """Return the lengths in bytes of a directory's event files, by their names.

    Raises:
        OSError: If they cannot be read.
    """
    return {path.name: path.stat().st_size for path in event_files(directory)}


def is_longer(lengths: Mapping[str, int], others: Mapping[str, int]) -> bool:
    """Return whether one of some files is longer than it was at another time, or was not there.

    Args:
        lengths: The lengths of the files by name.
        others: Their lengths at the other time.
    """
    return any(length > others.get(name, 0) for name, length in lengths.items())


def copy_up_to(source: AnyPath, target: AnyPath, lengths: Mapping[str, int]) -> None:
    """Copy the beginnings of a directory's event files.

    Args:
        source: The directory.
        target: The other directory.
        lengths: The number of bytes of each file, by its name. Other files are left out.

    Raises:
        OSError: If they cannot be copied.
    """
    for path in event_files(source):
        if path.name in lengths:
            copy_beginning(path, target / path.name, lengths[path.name])


def cut_off(directory: AnyPath, owner: str, lengths: Mapping[str, int]) -> None:
    """Take everything out of a directory's event files that was written after a checkpoint.

    Args:
        directory: The run's directory.
        owner: The name of the logger, for the warning.
        lengths: The length in bytes of each file at the checkpoint, by its name. Other files are removed.

    Raises:
        OSError: If the files cannot be changed.
    """
    for path in event_files(directory):
        if path.name not in lengths:
            path.unlink()
        elif path.stat().st_size > lengths[path.name]:
            RunFile(path, owner, lengths[path.name]).close()


def open_writer(directory: AnyPath, owner: str, purge_step: int | None = None) -> SummaryWriter:
    """Return a ``SummaryWriter`` whose events go to an :class:`EventFile`.

    Args:
        directory: The run's directory.
        owner: The name of the logger, for the warning.
        purge_step: See :class:`EventFile`.

    Raises:
        OSError: If the file cannot be opened.
    """
    return summary_writer(directory, partial(EventFile, directory, owner), purge_step)


# ------------------------------------------------------------------ the records


def session_start(hparams: Mapping[str, Any]) -> Any:
    """Return the summary that puts a run and its hyperparameters on TensorBoard's HParams page.

    The run gets no summary of the experiment. Without it, TensorBoard gathers the columns from the hyperparameters and
    scalars of all runs; an experiment's summary in one run would hide the columns of the others.

    Args:
        hparams: The values by name, nested or not. A value that is not a number, string or bool is shown as text.
    """
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo  # type: ignore[import-untyped]

    info = SessionStartInfo(start_time_secs=time.time())
    for name, value in flat(hparams).items():
        if isinstance(value, bool):
            info.hparams[name].bool_value = value
        elif isinstance(value, (int, float)) and math.isfinite(value):  # the page's JSON has no other numbers
            info.hparams[name].number_value = value
        else:
            info.hparams[name].string_value = value if isinstance(value, str) else repr(value)
    return _hparams_summary(SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=info))


def session_end() -> Any:
    """Return the summary that says on the HParams page that the run ended well.

    A run that failed gets none: TensorBoard keeps the first one that it reads, and the run may be resumed.
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
    """Return nested mappings as one dict, with names joined by slashes."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{name}/"))
        else:
            result[f"{prefix}{name}"] = value
    return result


def draw_graph(writer: SummaryWriter, module: LightningModule) -> None:
    """Add the graph of a module's ``forward`` on its ``example_input_array``.

    Leaves the module's modes and the random number generators as they were. If the module cannot be traced, there is a
    warning, and the run continues.

    Args:
        writer: The writer.
        module: The module, on its device.
    """
    name = type(module).__name__
    problem = None
    if module.example_input_array is None:
        problem = "it has no example input. Set self.example_input_array in its __init__ to an argument of forward."
    elif any(map(is_lazy, chain(module.parameters(), module.buffers()))):
        problem = "it has lazy modules, whose weights the first forward draws. Run one in configure_model."
    if problem is not None:
        warnings.warn(f"No graph of {name} is logged: {problem}", stacklevel=2)
        return
    training = {part: part.training for part in module.modules()}
    try:
        with isolated_rng(), torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # Tracing warns of its age and of code that it cannot generalise, which does not matter for a picture. It prints
            # its errors.
            warnings.simplefilter("ignore")
            example = transfer_to(module, module.device)(module.example_input_array)
            writer.add_graph(module, example)
    except Exception as error:
        reason = first_line(error)
        warnings.warn(f"No graph of {name} is logged, because its forward cannot be traced: {reason}", stacklevel=2)
    finally:
        restore_modes(training)
