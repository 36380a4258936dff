"""The paths that users give: local ones become paths of pathlib, and those with a protocol go through fsspec."""

from __future__ import annotations

import errno
import os
import posixpath
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

from eventtrain.errors import MisconfigurationError, nearest

LOST_SLASH = re.compile("([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")  # a single letter is a drive of Windows
REMEDY = (
    "Give a local path, or one with a single protocol, such as s3:// (pip install s3fs), gs:// (gcsfs), az:// (adlfs), "
    "sftp:// (paramiko) or memory://."
)


@dataclass(frozen=True)
class RemotePath:
    """A file or folder that fsspec reaches, with the part of the interface of :class:`pathlib.Path` that eventtrain uses.

    It is no ``os.PathLike``, so that ``open`` refuses it. Whatever the file system raises is an ``OSError`` here.

    Args:
        url: The path with its protocol.

    Example:
        >>> folder = RemotePath("memory://runs/digits")
        >>> (folder / "last.ckpt").touch()
        >>> [str(path) for path in folder.glob("*.ckpt")]
        ['memory://runs/digits/last.ckpt']
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, other: AnyPath | str) -> AnyPath:
        """Return a path below this one; the other path itself if it is remote or absolute."""
        if isinstance(other, RemotePath) or Path(other).is_absolute():
            return other if isinstance(other, RemotePath) else Path(other)
        protocol, _, rest = self.url.partition("://")
        return RemotePath(f"{protocol}://{posixpath.normpath(posixpath.join(rest, PurePath(other).as_posix()))}")

    def __rtruediv__(self, other: Path) -> RemotePath:
        return self

    @property
    def name(self) -> str:
        """The last part."""
        return posixpath.basename(self.url)

    @property
    def parent(self) -> RemotePath:
        """The folder around it."""
        protocol, _, rest = self.url.partition("://")
        return RemotePath(f"{protocol}://{posixpath.dirname(rest)}")

    def with_name(self, name: str) -> AnyPath:
        """Return the path of another file in the same folder."""
        return self.parent / name

    def absolute(self) -> RemotePath:
        """Return the path itself."""
        return self

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the file system, past its cache, because other processes write too."""
        try:
            fs = file_system(self.url)
            fs.invalidate_cache()
            return getattr(fs, method)(*arguments, **options)
        except OSError:
            raise
        except Exception as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", self.url) from error

    def exists(self) -> bool:
        """Return True if the file or folder exists."""
        return bool(self._call("exists", self.url))

    def is_file(self) -> bool:
        """Return True if it is a file."""
        return bool(self._call("isfile", self.url))

    def is_dir(self) -> bool:
        """Return True if it is a folder. In a store without folders, a path with files below it is one."""
        return bool(self._call("isdir", self.url))

    def stat(self) -> Any:
        """Return its ``st_size`` in bytes and its ``st_mtime`` in seconds since 1970."""
        modified = self._call("modified", self.url)
        return SimpleNamespace(st_size=self._call("size", self.url), st_mtime=modified.timestamp())

    def glob(self, pattern: str) -> list[AnyPath]:
        """Return the entries of a folder whose names match, in order."""
        entries = self._call("ls", self.url, detail=False) if self.is_dir() else ()
        names = sorted(posixpath.basename(entry.rstrip("/")) for entry in entries)
        return [self / name for name in names if fnmatch(name, pattern)]

    def mkdir(self, parents: bool = True, exist_ok: bool = False) -> None:
        """Make a folder and those around it, if the store has folders."""
        self._call("makedirs", self.url, exist_ok=exist_ok)

    def touch(self, exist_ok: bool = True) -> None:
        """Make an empty file."""
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, "there is such a file", self.url)
        self._call("pipe_file", self.url, b"")

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file."""
        if not missing_ok or self.exists():
            self._call("rm_file", self.url)

    def replace(self, target: AnyPath) -> None:
        """Rename the file, over another one if there is one. A store without renames copies it, then deletes it."""
        self._call("mv", self.url, str(target))

    def hardlink_to(self, target: AnyPath) -> None:
        """Make the file a copy of another one in the same store; stores have no links."""
        self._call("copy", str(target), self.url)

    def open(self, mode: str = "rb") -> Any:
        """Open the file to read it."""
        return self._call("open", self.url, mode)

    def get(self, file: str) -> None:
        """Copy the file to a local one."""
        self._call("get_file", self.url, file)

    def put(self, file: str) -> None:
        """Replace the file by a copy of a local one."""
        self._call("put_file", file, self.url)


AnyPath = Path | RemotePath
StrPath = str | os.PathLike[str]


def file_system(url: str) -> Any:
    """Return fsspec's file system of a path with a protocol. fsspec keeps one for each set of options."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # imported late: only remote paths need it

    return url_to_fs(url)[0]


def check_path(value: Any, owner: str, argument: str) -> AnyPath:
    """Return the path that a user gave. ``~`` is the home directory; ``file://`` is local.

    Args:
        value: A text, or a :class:`pathlib.Path`.
        owner: The class or function that takes it.
        argument: The argument's name.

    Raises:
        MisconfigurationError: If it is no path, or its protocol is unknown or not installed.

    Example:
        >>> check_path("memory://runs/", "ModelCheckpoint", "dirpath")
        RemotePath(url='memory://runs')
        >>> check_path("C:/runs", "ModelCheckpoint", "dirpath").name
        'runs'
    """
    if isinstance(value, RemotePath):
        return value
    problem = f"{owner}({argument}={value!r})"
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or "\0" in text:
        raise MisconfigurationError(f"{problem}: give a path as a text or a pathlib.Path.")
    if lost := LOST_SLASH.match(text):
        right = f"{lost[1]}://{text[lost.end() - (lost[1] in ('file', 'local')) :]}"
        raise MisconfigurationError(
            f"{problem}: two slashes follow a protocol, and pathlib.Path drops one of them. Give the text {right!r}."
        )
    protocol, slashes, rest = text.partition("://")
    if not slashes or len(protocol) == 1 or protocol in ("file", "local"):
        try:
            return Path(rest if len(protocol) > 1 and slashes else text).expanduser()
        except RuntimeError as error:
            raise MisconfigurationError(f"{problem}: {error} Write the folder's whole path.") from error
    check_protocol(text, protocol, problem)
    return RemotePath(f"{protocol}://{rest.rstrip('/')}")


def check_protocol(text: str, protocol: str, problem: str) -> None:
    """Refuse a protocol that fsspec does not know, or that it cannot use as it is installed and set up.

    Raises:
        MisconfigurationError: If that is so.
    """
    from fsspec import available_protocols, registry  # type: ignore[import-untyped]

    known = {*available_protocols(), *registry}
    if protocol not in known or "::" in text:
        hint = REMEDY if "::" in text else nearest(protocol.lower(), sorted(known), otherwise=REMEDY)
        raise MisconfigurationError(f"{problem}: {protocol!r} is not one of fsspec's protocols. {hint}")
    try:
        file_system(text)
    except Exception as error:  # each file system raises its own errors for missing packages and settings
        raise MisconfigurationError(
            f"{problem}: fsspec cannot use {protocol}://: {type(error).__name__}: {error}. {REMEDY}"
        ) from error
