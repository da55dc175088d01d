"""API keys: whose name a key stands for. What is kept are hashes: who reads them can't ask for anything.

May not: know of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from service.errors import InvalidSettings, InvalidValue

log = structlog.get_logger(__name__)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_MAX_ENTRIES = 1000  # each is compared with every request's key
_MAX_FILE_BYTES = 2**18
_LOOK_S = 1.0  # how often the file is looked at, at most
_KEY_BYTES = 32
_VARIABLE, _FILE_VARIABLE = "GRU_SERVE_API_KEYS", "GRU_SERVE_API_KEYS_FILE"


@dataclass(frozen=True, slots=True)
class Entry:
    """digest: SHA-256 of the key. Several entries may have one name: an old key and its successor."""

    name: str
    digest: bytes


def new_key(name: str) -> tuple[str, str]:
    """A random key, and the entry by which a server knows it. Raises InvalidValue."""
    if not _NAME.fullmatch(name):
        raise InvalidValue("a key's name has 1 to 64 letters, digits, dots, underscores or hyphens", param="name")
    key = f"gru-{secrets.token_urlsafe(_KEY_BYTES)}"
    return key, f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"


def read_keys(listed: str, path: Path | None) -> ApiKeys | None:
    """The keys of entries separated by commas and of a file; None: neither is given. Raises InvalidSettings."""
    if not listed and path is None:
        return None
    return ApiKeys(_entries(listed.split(","), _VARIABLE) if listed else (), path)


class ApiKeys:
    """Tells whose a key is. Safe for any number of threads.

    The file, one entry a line and comments after #, is read again once it has changed; if it is no good then, what was
    read before stays in force. clock: seconds, of any beginning.
    """

    def __init__(
        self, listed: tuple[Entry, ...], path: Path | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises InvalidSettings if the file is no good, or an entry has two names."""
        self._listed, self._path, self._clock = listed, path, clock
        self._content = _content(path)
        self._entries = self._read(self._content)
        self._looked_at = clock()
        self._looking = threading.Lock()

    def owner_of(self, key: str) -> str | None:
        """The name that a key stands for; None: it is not known. Takes as long for one as for the other."""
        self._look()
        digest, name = hashlib.sha256(key.encode(errors="replace")).digest(), None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                name = entry.name
        return name

    def _look(self) -> None:
        """Take over what has changed in the file."""
        if self._path is None or self._clock() - self._looked_at < _LOOK_S:
            return
        if not self._looking.acquire(blocking=False):
            return  # somebody does: nobody else is to wait for a slow disk
        try:
            # The content and not its time: two writes may have one, and a mounted secret is a chain of links.
            content = _content(self._path)
            if content != self._content:
                self._content = content
                self._entries = self._read(content)
                log.info("API keys read again", num_keys=len(self._entries))
        except InvalidSettings as error:
            log.error("API keys not read: the old ones stay in force", error=error.message)
        finally:
            self._looked_at = self._clock()
            self._looking.release()

    def _read(self, content: bytes | None) -> tuple[Entry, ...]:
        if self._path is None:
            return self._listed
        if content is None:
            raise InvalidSettings(f"{_FILE_VARIABLE}: can't read {self._path}", param="api_keys_file")
        if len(content) > _MAX_FILE_BYTES:
            raise InvalidSettings(f"{_FILE_VARIABLE}: over {_MAX_FILE_BYTES} bytes", param="api_keys_file")
        lines = content.decode(errors="replace").splitlines()
        entries = _entries((line.partition("#")[0] for line in lines), _FILE_VARIABLE)
        if not entries:
            raise InvalidSettings(f"{_FILE_VARIABLE}: holds no entry", param="api_keys_file")
        return _checked((*self._listed, *entries), _FILE_VARIABLE)


def _content(path: Path | None) -> bytes | None:
    """None: it can't be read."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES + 1)
    except OSError:
        return None


def _entries(parts: Iterable[str], variable: str) -> tuple[Entry, ...]:
    """Entries of texts, of which empty ones are none. No message quotes one: somebody may have put a key there."""
    entries = []
    for number, part in enumerate(parts, 1):
        name, _, digest = (word.strip() for word in part.partition(":"))
        if not part.strip():
            continue
        if not _NAME.fullmatch(name) or not _DIGEST.fullmatch(digest):
            raise InvalidSettings(
                f"{variable}: entry {number} is not name:sha256-hex, as `gru-serve keys new NAME` prints it",
                param=variable.removeprefix("GRU_SERVE_").lower(),
            )
        entries.append(Entry(name, bytes.fromhex(digest)))
    return _checked(tuple(entries), variable)


def _checked(entries: tuple[Entry, ...], variable: str) -> tuple[Entry, ...]:
    names: dict[bytes, str] = {}
    if len(entries) > _MAX_ENTRIES:
        raise InvalidSettings(f"{variable}: more than {_MAX_ENTRIES} entries")
    for entry in entries:
        if names.setdefault(entry.digest, entry.name) != entry.name:
            raise InvalidSettings(f"{variable}: one key under two names, {names[entry.digest]} and {entry.name}")
    return entries
