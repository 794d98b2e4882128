"""Remote files: what fsspec reaches (`s3://`, `gs://`, `https://`, `hf://`, `memory://` …), with what a local path is asked for.

In: an address, of a file, a folder or a glob (none over http, where `*` and `?` are part of an address). Out: `Remote`s, read in pieces as they are
needed, not copied to the disk. Credentials are the file system's own business (environment, config files). A file that changes is
noticed by what its server says of it (ETag, time, size). Limits: S3 and Google Storage were never reached from here; the packages that speak
to them (s3fs, gcsfs, adlfs) are not installed with the kit.
"""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from emergency_kit.artifacts import hash_json
from emergency_kit.errors import DataError

# What tells one content from another, by the names that file systems have for it.
_STAMPS = ("etag", "e_tag", "md5", "md5hash", "content_md5", "generation", "commit", "sha256", "oid", "blob_id", "last_modified", "lastmodified", "mtime", "created", "size")


def is_remote(name: str) -> bool:
    """Whether a dataset's name is an address and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", name) is not None


@dataclass(frozen=True)
class Remote:
    """A file of a file system of fsspec's. url: with its scheme; key: by the file system's own name."""

    url: str
    key: str
    filesystem: Any

    def __str__(self) -> str:
        return self.url

    @property
    def pure(self) -> PurePosixPath:
        """Its path, without scheme and query."""
        return PurePosixPath(urlsplit(self.url).path if self.url.startswith("http") else self.key)

    @property
    def name(self) -> str:
        """Its last part."""
        return self.pure.name

    @property
    def suffix(self) -> str:
        """As of a Path."""
        return self.pure.suffix

    @property
    def suffixes(self) -> list[str]:
        """As of a Path."""
        return self.pure.suffixes

    def size_bytes(self) -> int | None:
        """None where its server does not say."""
        return self.filesystem.info(self.key).get("size")

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """A stream of its bytes."""
        return io.BufferedReader(self.filesystem.open(self.key, mode))

    def digest(self) -> str:
        """Hash of what its server says of its content."""
        self.filesystem.invalidate_cache()
        about = {name.lower().replace("-", "_"): str(value) for name, value in self.filesystem.info(self.key).items()}
        return hash_json([self.url.partition("?")[0], [[name, about[name]] for name in _STAMPS if name in about]])


def failures() -> tuple[type[BaseException], ...]:
    """What reading a remote file raises where its server fails; aiohttp's own error is no OSError."""
    aiohttp = sys.modules.get("aiohttp")
    return (OSError, aiohttp.ClientError) if aiohttp else (OSError,)


def find_remote(name: str) -> tuple[PurePosixPath, list[Remote]]:
    """`(folder below which names tell the split, files)`, as of a local name. Raises DataError with what to install, or what is not there."""
    import fsspec

    scheme = name.partition("://")[0]
    try:
        filesystem, key = fsspec.core.url_to_fs(name)
    except ImportError as error:
        package = re.search(r"\b(s3fs|gcsfs|adlfs|ossfs|sshfs|paramiko|smbprotocol|dropboxdrivefs)\b", str(error))
        remedy = f"next: pip install {package[1]}" if package else str(error).splitlines()[0]
        raise DataError(f"dataset {name}: {scheme}:// needs a package that is not installed; {remedy}") from None
    except ValueError as error:
        known = "s3, gs, abfs, https, hf, memory, file"
        raise DataError(f"dataset {name}: {str(error).splitlines()[0]}; expected one of {known} before ://, a Hub dataset (owner/name), or a local path") from None
    globbed = not scheme.startswith("http") and any(mark in key for mark in "*?[")
    try:
        if globbed:
            root, keys = PurePosixPath(re.split(r"[^/]*[*?\[]", key, maxsplit=1)[0] or "."), filesystem.glob(key)
        elif not scheme.startswith("http") and filesystem.isdir(key):
            root, keys = PurePosixPath(key), filesystem.find(key, maxdepth=2)
        else:
            root, keys = None, [key] if filesystem.exists(key) else []
        # A glob also finds folders.
        keys = [found for found in keys if not (globbed and filesystem.isdir(found))]
    except failures() as error:
        raise DataError(f"dataset {name}: cannot be reached ({(str(error).splitlines() or [type(error).__name__])[0][:160]}); check the address, the network and the credentials") from None
    if not keys:
        what = "no such file, or its server cannot be reached" if scheme.startswith("http") else "no file matches" if globbed else "no such file or folder"
        raise DataError(f"dataset {name}: {what}; check dataset.name")
    files = [Remote(filesystem.unstrip_protocol(found), found, filesystem) for found in sorted(keys)]
    return root or files[0].pure.parent, files
