"""Files: written whole or not at all, whatever ends the process meanwhile.

In: a path and what goes there. Out: the file or folder under its own name only once every byte of it is on the disk. Everything
is filled as a temporary sibling, flushed, then put in place in one step; a folder that stands there already is
exchanged for the new one in one step too, so at no moment is there neither. What a killed process
left behind is recognised by the process's id in its name, and goes with the next write to the same place.
Limits: where the file system cannot exchange two names, an old folder is moved aside first; a process killed between the two
steps leaves it there, and the next write (or `restore`) puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import re
import shutil
import socket
import sys
import uuid
from pathlib import Path
from typing import Iterator

from emergency_kit.errors import UsageError

PARTIAL, RETIRED = ".partial", ".retired"
_NAME = re.compile(r"^\.([0-9a-f]{8})-(\d+)-[0-9a-z_]{8}\.partial$")
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # renameat2(2); renamex_np on macOS
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust's writers (safetensors, tokenizers) end their messages
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "cannot be opened", "Parent directory", "iostream error")


def save_bytes(path: Path, content: bytes) -> Path:
    """Write a file in one step; an existing file is replaced whole. Raises OSError with the file's name."""
    with staged_file(path) as temporary:
        write_bytes(temporary, content)
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in place, all of it; OSError names the file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        rest = memoryview(content)
        while rest:
            written = os.write(descriptor, rest[:1 << 28])
            if written <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            rest = rest[written:]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; on success it is flushed and takes the place of `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path.parent)
    try:
        with _OsErrors(path.parent):
            yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill; on success it is flushed and takes the place of `path`, in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    restore(path)
    temporary = temporary_sibling(path.parent)
    temporary.mkdir()
    try:
        mode = temporary.stat().st_mode & 0o666  # what the umask leaves of a file's permissions
        with _OsErrors(path.parent):
            yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                file.chmod(mode)  # safetensors writes for the owner alone; an artifact is made to be passed on
            flush(file)
        flush(temporary)
        if not path.exists():
            os.replace(temporary, path)
        elif not _exchange(temporary, path):
            _replace_in_two(temporary, path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder for what is needed meanwhile, beside what it is for; it goes at the end, or where a process was killed with the next write here."""
    scratch = temporary_sibling(parent)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places in one step; False where system or file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    elif sys.platform == "darwin":
        failed = library.renamex_np(os.fsencode(first), os.fsencode(second), _RENAME_SWAP)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _replace_in_two(temporary: Path, path: Path) -> None:
    retired = _retired(path)
    os.replace(path, retired)
    try:
        os.replace(temporary, path)
    except OSError:
        os.replace(retired, path)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def restore(path: Path) -> bool:
    """Put back a folder that a killed process had moved aside; whether there was one."""
    retired = _retired(path)
    if not retired.is_dir():
        return False
    if path.exists():
        shutil.rmtree(retired, ignore_errors=True)
        return False
    os.replace(retired, path)
    return True


def _retired(path: Path) -> Path:
    return path.parent / f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}{RETIRED}"


def temporary_sibling(folder: Path) -> Path:
    """A name for a temporary sibling that tells whose it is; leftovers of ended processes go first."""
    remove_leftovers(folder)
    return folder / f".{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{PARTIAL}"


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove temporary files and folders of processes of this host that have ended; what went. Others' stay."""
    gone = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            match = _NAME.match(entry.name)
            if match and match[1] == _host() and not is_running(int(match[2])):
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
                gone.append(path)
    return gone


def is_running(pid: int) -> bool:
    """Whether a process of this host has this id (a reused id counts)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@functools.cache
def _host() -> str:
    """8 hex digits for this host and its table of processes: two containers on one machine differ."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems flush no folders
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


class _OsErrors:
    """Libraries that write with Rust or C++ raise errors of their own: turns them into the OSError that they stand for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        found = as_os_error(error, self.folder) if error else None
        if found is not None and found is not error:
            raise found from error


def as_os_error(error: BaseException, folder: Path) -> OSError | None:
    """The OSError behind an error of a writer of safetensors, tokenizers or torch; None where it is none.

    torch does not always say what failed: no space then, where `folder`'s disk has less than 1 MB left, else an input/output error.
    """
    if isinstance(error, OSError):
        return error
    told = _OS_ERROR.search(str(error))
    if told:
        return OSError(int(told[1]), os.strerror(int(told[1])), str(folder))
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _TORCH_WRITER):
        named = [code for code in errno.errorcode if f"strerror: {os.strerror(code)}" in str(error)]
        code = named[0] if named else errno.ENOSPC if free_bytes(folder) < 1_000_000 else errno.EIO
        return OSError(code, os.strerror(code), str(folder))
    return None


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that holds `folder` or its nearest parent that exists."""
    folder = Path(folder).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_writable(folder: Path, needed_bytes: int = 0, remedy: str = "choose another with --output-dir") -> None:
    """Raise UsageError when `folder` cannot be made, written to, or has less free space than needed."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_sibling(folder)
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"output folder {folder}: not writable ({error.strerror}); {remedy}") from None
    free = free_bytes(folder)
    if free < needed_bytes:
        raise UsageError(f"output folder {folder}: {free / 1e6:.0f} MB free, {needed_bytes / 1e6:.0f} MB needed; "
                         f"free some space or {remedy}")
