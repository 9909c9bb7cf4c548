"""A folder at a URL that fsspec can write to: `s3://...`, `gs://...`, `abfs://...`, `sftp://...`, `file://...`.

The URL may hold credentials: nothing here shows them, or writes them down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from streamllm.errors import UsageError, reason_of, shown
from streamllm.files import write_atomically

_FIX = "give s3://, gs://, abfs://, sftp:// or file://"


@dataclass(frozen=True)
class Place:
    """A folder at a URL."""

    name: str
    """The URL as it may be shown."""
    _fs: Any
    _root: str
    _secrets: Sequence[str] = ()

    @classmethod
    def at(cls, url: str) -> Place:
        """Raises UsageError for a URL that cannot be written to, and where the library for it is missing."""
        from fsspec.core import url_to_fs

        name, protocol = without_secrets(url), url.partition("://")[0]
        if "::" in url or protocol in ("http", "https"):
            raise UsageError(
                f"output {shown(name)}: cannot be written to; give s3://, gs://, abfs://, sftp:// or file://"
            )
        try:
            fs, root = url_to_fs(url)
        except ImportError as error:
            raise UsageError(f"output {shown(name)}: {_remedy(protocol, error)}") from None
        except Exception as error:  # whatever the protocol's library raises of an address
            reason = _hiding(reason_of(error), _secrets(url))
            raise UsageError(
                f"output {shown(name)}: {reason}; give s3://, gs://, abfs://, sftp:// or file://"
            ) from None
        if not root.strip("/"):
            raise UsageError(f"output {shown(name)}: names no folder; give {protocol}://.../STUDY")
        return cls(name, fs, root.rstrip("/"), _secrets(url))

    def reason(self, error: Exception) -> str:
        return _hiding(f"{type(error).__name__}: {reason_of(error)}", self._secrets)

    def names(self) -> set[str]:
        """Of all files in it, those of the store too, relative to it."""
        self._fs.invalidate_cache()
        found = (path[len(self._root) :].lstrip("/") for path in self._fs.find(self._root))
        return {name for name in found if ".." not in PurePosixPath(name).parts}

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        found = self._fs.cat([self._path(name) for name in names])
        by_path = found if isinstance(found, dict) else {self._path(names[0]): found}
        return {name: by_path[self._path(name)] for name in names}

    def write(self, files: Mapping[str, bytes]) -> None:
        from fsspec.implementations.local import LocalFileSystem

        if not files:
            return
        if isinstance(self._fs, LocalFileSystem):  # which writes in place: a kill would leave a part
            for name, content in files.items():
                path = Path(self._path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
            return
        if not self._fs.async_impl:  # stores of objects, which are asynchronous, have no folders
            for folder in {self._path(name).rpartition("/")[0] for name in files}:
                self._fs.makedirs(folder, exist_ok=True)
        self._fs.pipe({self._path(name): content for name, content in files.items()})

    def remove(self, name: str) -> None:
        self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def without_secrets(url: str) -> str:
    """The URL without user, password, query and fragment."""
    scheme, _, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _secrets(url: str) -> list[str]:
    parts = urlsplit(url)
    values = [value for _, value in parse_qsl(parts.query)]
    found = [*parts.netloc.rpartition("@")[0].split(":"), parts.query, parts.fragment, *values]
    return sorted({one for value in found for one in (value, unquote(value)) if len(one) > 2}, key=len, reverse=True)


def _hiding(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _remedy(protocol: str, error: ImportError) -> str:
    """What to install for URLs of that kind."""
    from fsspec.registry import known_implementations

    module = known_implementations.get(protocol, {}).get("class", "fsspec").partition(".")[0]
    if module != "fsspec":
        return f"needs {module}; pip install {module}"
    return f"{reason_of(error)}; install that with pip"
