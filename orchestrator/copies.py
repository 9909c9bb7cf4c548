"""A copy of a study at a URL (`s3://...`, `gs://...`, `file://...`, whatever fsspec can write to), kept while a sweep
runs: when its machine is lost, the same command on another one goes on, and nothing that was finished is repeated.

At the URL lie the files of the study's folder, and under `.store` the measurements that they name and all others of the
same model.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from streamllm.errors import UsageError, shown
from streamllm.files import write_atomically
from streamllm.results.study_folder import StudyFolder, rows_and_damage
from streamllm.terminal.printing import say
from streamllm.terminal.progress import working

from .place import Place

_STORE = ".store"
_SETTINGS = "sweep.json"
_KNOWN_BY = ("journal.log", _SETTINGS)
"""By these a study is known to be there. They are sent first, as all else can be made anew of the journal; and brought
back last, so that a kill before leaves no study here."""
_AT_ONCE = 64
"""Files that are read or written together, by libraries that can."""
_ENTRY = re.compile(rb"\b[0-9a-f]{64}\b")
"""What names a measurement of the store."""
_GROWING = (".jsonl", ".log")
_PAUSE_SEC, _LONGEST_PAUSE_SEC = 2.0, 60.0
_SHARE = 20
"""A pause is so many times as long as looking and copying took before."""
_NICENESS = 15
"""On a CPU, copying must not show in the timings."""


def bring_back(url: str, folder: StudyFolder, study: str) -> None:
    """Brings the copy of the study here if it is not here already. Raises UsageError where the URL cannot be read or
    written, and where it has another study, or more of this one than there is here."""
    place = Place.at(url)
    try:
        place.write({".probe": b""})
        with suppress(Exception):  # who may write may not be allowed to remove
            place.remove(".probe")
        names = place.names()
        theirs = _settings(place.read([_SETTINGS])[_SETTINGS]) if _SETTINGS in names else {}
        rows = place.read(["trials.jsonl"])["trials.jsonl"] if "trials.jsonl" in names else b""
    except Exception as error:
        raise UsageError(
            f"output {shown(place.name)}: cannot be used ({place.reason(error)}); the credentials are those of its "
            f"library, from its environment variables or files"
        ) from None
    here, _ = folder.known_configuration()
    if here is not None:
        _check_same(place, folder, here, theirs, rows)
    elif _SETTINGS in names:
        if theirs.get("study", study) != study:
            raise UsageError(f"output {shown(place.name)}: has the study {theirs['study']!r}; give another URL")
        _fetch(place, folder, names)


def _check_same(
    place: Place, folder: StudyFolder, here: Mapping[str, Any], there: Mapping[str, Any], rows: bytes
) -> None:
    """here, there: settings; rows: there. Raises UsageError."""
    if there.get("study_id", here.get("study_id")) != here.get("study_id"):
        raise UsageError(
            f"output {shown(place.name)}: has another study, not the one in {folder.path}; give another URL, or move "
            f"that folder away to go on with the copy"
        )
    ours, wrong = rows_and_damage(folder.trials)
    more = _trials(rows) - {str(row.trial) for row in ours}
    if more and not wrong:
        raise UsageError(
            f"output {shown(place.name)}: the copy has {len(more)} more finished trials than {folder.path}; move that "
            f"folder away to go on with the copy"
        )


def _fetch(place: Place, folder: StudyFolder, names: set[str]) -> None:
    """Raises UsageError."""
    entries = sorted(name for name in names if name.startswith(f"{_STORE}/"))
    entries.sort(key=lambda name: name.endswith(".json"))  # an array is there before the entry it belongs to
    files = sorted(name for name in names if not _is_hidden(name))
    files.sort(key=lambda name: (name in _KNOWN_BY, name == _SETTINGS))
    to = {name: folder.store / name.removeprefix(f"{_STORE}/") for name in entries}
    wanted = [name for name, path in to.items() if not path.exists()] + files
    try:
        with working(f"bringing back {place.name}") as progress:
            for done, some in _parts(wanted):
                for name, content in place.read(some).items():
                    path = to.get(name, folder.path / name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, content)
                progress(done, len(wanted))
    except Exception as error:  # of the library, or of the disk
        raise UsageError(f"output {shown(place.name)}: cannot be brought back ({place.reason(error)})") from None
    trials = len({row.trial for row in rows_and_damage(folder.trials)[0] if isinstance(row.trial, int)})
    measured = sum(name.endswith(".json") for name in entries)
    say(f"brought back from {place.name}: {trials} trials, {measured} measurements", sys.stderr)


@contextmanager
def kept(url: str | None, folder: StudyFolder, note: Callable[[str], None]) -> Iterator[None]:
    """A context in which the copy at the URL, if there is one, follows the folder, and that leaves it complete. What
    goes wrong with it is noted; the sweep goes on."""
    if url is None:
        yield
        return
    following = _Following(Copy(Place.at(url), folder), note)
    try:
        yield
    finally:
        following.finish()


@dataclass
class Copy:
    """What of the study is at the place already, as far as this process has seen."""

    place: Place
    folder: StudyFolder
    _there: set[str] | None = None
    """Names of files at the place; None: not asked yet."""
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name of a file of the folder -> its time and size when it was last sent."""
    _looked: dict[Path, int] = field(default_factory=dict)
    """Folder of the store -> its time when it was last looked through."""
    _seen: set[str] = field(default_factory=set)
    """Entries of the store that have been looked at."""
    _owed: set[str] = field(default_factory=set)
    """Those of them that are to be sent."""

    def update(self) -> None:
        """Sends what is new. A measurement that a file names is there before the file. Raises whatever the place's
        library raises; the next call goes on."""
        if self._there is None:
            self._there = self.place.names()
        changed = dict(self._changed())
        contents = {name: content for name, (_, content) in changed.items()}
        self._send_entries({match.decode() for content in contents.values() for match in _ENTRY.findall(content)})
        for name in sorted(contents, key=lambda name: (name not in _KNOWN_BY, name != _SETTINGS, name)):
            self.place.write({name: contents[name]})
            self._sent[name] = changed[name][0]
            self._there.add(name)
        for path in (self.folder.outcome, self.folder.confirmed):  # which a sweep that goes on takes away
            if path.name in self._there and not path.exists():
                self.place.remove(path.name)
                self._there.discard(path.name)
                self._sent.pop(path.name, None)
        self._owed |= self._of_the_model()
        self._send_entries(self._owed)
        self._owed.clear()

    def _changed(self) -> Iterator[tuple[str, tuple[tuple[int, int], bytes]]]:
        """Files that are not as they were sent, rows before the journal, which is to know no less than they."""
        paths = [path for path in self.folder.path.rglob("*") if path.is_file() and path not in self.folder.locks]
        for path in sorted(paths, key=lambda path: path.name in _KNOWN_BY):
            name = path.relative_to(self.folder.path).as_posix()
            with suppress(FileNotFoundError):
                status = path.stat()
                stamp = (status.st_mtime_ns, status.st_size)
                if not _is_hidden(name) and self._sent.get(name) != stamp:
                    content = path.read_bytes()
                    yield name, (stamp, content[: content.rfind(b"\n") + 1] if path.suffix in _GROWING else content)

    def _send_entries(self, names: Iterable[str]) -> None:
        """Those of the names that are entries of the store, with their arrays, which come first."""
        assert self._there is not None
        files = [Path(name[:2], f"{name}{suffix}") for suffix in (".npy", ".json") for name in sorted(names)]
        wanted = [str(file) for file in files if f"{_STORE}/{file.as_posix()}" not in self._there]
        for _, some in _parts([name for name in wanted if (self.folder.store / name).is_file()]):
            contents = {f"{_STORE}/{name}": (self.folder.store / name).read_bytes() for name in some}
            self.place.write(contents)
            self._there |= contents.keys()

    def _of_the_model(self) -> set[str]:
        """The entries that have come since the last time and are of the study's weights."""
        digest = (self.folder.known_configuration()[0] or {}).get("model_digest")
        if not digest or not self.folder.store.is_dir():
            return set()
        found = set()
        for part in self.folder.store.iterdir():
            changed = part.stat().st_mtime_ns
            if changed == self._looked.get(part):
                continue
            if time.time_ns() - changed > 5e9:  # or it may change once more and look the same
                self._looked[part] = changed
            for path in part.glob("*.json"):
                if path.stem not in self._seen and not path.name.startswith("."):
                    self._seen.add(path.stem)
                    with suppress(FileNotFoundError):
                        if digest.encode() in path.read_bytes():
                            found.add(path.stem)
        return found


class _Following:
    """The thread that keeps a copy up to date."""

    def __init__(self, copy: Copy, note: Callable[[str], None]) -> None:
        self._copy = copy
        self._note = note
        self._closing = threading.Event()
        self._problem: str | None = None
        self._is_complete = False
        self._thread = threading.Thread(target=self._follow, name="copy", daemon=True)
        self._thread.start()

    def finish(self, patience_sec: float = 20.0, limit_sec: float = 600.0) -> None:
        """Waits until all is copied; gives up on a place that is away for `patience_sec`, or after `limit_sec`."""
        self._closing.set()
        now = started = away_since = time.monotonic()
        with working(f"copying to {self._copy.place.name}"):
            while self._thread.is_alive() and now - away_since <= patience_sec and now - started <= limit_sec:
                self._thread.join(1.0)
                now = time.monotonic()
                if self._problem is None:
                    away_since = now
        if self._is_complete:
            self._note(f"the copy at {self._copy.place.name} is complete")
        else:
            self._note(
                f"warning: the copy at {self._copy.place.name} is not complete ({self._problem or 'it takes long'}); "
                f"the results are complete in {self._copy.folder.path}, and the same command completes the copy"
            )

    def _follow(self) -> None:
        with suppress(OSError, AttributeError):  # of this thread alone, and only where there is such a thing
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        pause = _PAUSE_SEC
        while True:
            is_last = self._closing.is_set()
            started = time.monotonic()
            self._tell(self._attempt())
            if is_last and self._problem is None:
                self._is_complete = True
                return
            again = 2 * pause if self._problem else max(_SHARE * (time.monotonic() - started), _PAUSE_SEC)
            pause = min(again, _LONGEST_PAUSE_SEC)
            if is_last:
                time.sleep(_PAUSE_SEC)
            else:
                self._closing.wait(pause)

    def _attempt(self) -> str | None:
        """What is wrong, if anything is."""
        try:
            self._copy.update()
        except Exception as error:  # whatever it is, the sweep goes on
            return self._copy.place.reason(error)
        return None

    def _tell(self, problem: str | None) -> None:
        before, self._problem = self._problem, problem
        with suppress(Exception):  # a reader of notes who has gone is no reason to copy no more
            if problem is not None and before is None:
                self._note(f"warning: the copy at {self._copy.place.name} is behind ({problem}); it is tried again")
            elif problem is None and before is not None:
                self._note(f"the copy at {self._copy.place.name} is up to date again")


def _settings(content: bytes) -> dict[str, Any]:
    """Of a copy of `sweep.json`; {} if it is damaged."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _trials(lines: bytes) -> set[str]:
    return {str(found["trial"]) for line in lines.splitlines() if "trial" in (found := _settings(line))}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _parts(names: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """Some at a time, and how many those are in all by then."""
    for start in range(0, len(names), _AT_ONCE):
        yield min(start + _AT_ONCE, len(names)), names[start : start + _AT_ONCE]
