"""API keys: which name a key belongs to. Only the SHA-256 digests of keys are stored, and they give nobody access.

This module knows nothing of HTTP, and may import nothing of this project but `errors`.
"""

from __future__ import annotations

import codecs
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
_MAX_ENTRIES = 1000  # every request's key is compared with each of them
_MAX_FILE_BYTES = 2**18
_CHECK_INTERVAL_S = 1.0  # the file is read at most this often
_READ_S = 0.1  # a request waits for reading the file; a later one has what was read by then
_KEY_BYTES = 32
_VARIABLE, _FILE_VARIABLE = "GRU_SERVE_API_KEYS", "GRU_SERVE_API_KEYS_FILE"


@dataclass(frozen=True, slots=True)
class Entry:
    """A key that the server accepts."""

    name: str  # the owner; several entries may share it, such as an old key and its successor
    digest: bytes  # SHA-256 of the key


def new_key(name: str) -> tuple[str, str]:
    """Return a new random key and the `name:digest` entry that makes a server accept it. Raises InvalidValue."""
    if not _NAME.fullmatch(name):
        raise InvalidValue("a key's name has 1 to 64 letters, digits, dots, underscores or hyphens", param="name")
    key = f"gru-{secrets.token_urlsafe(_KEY_BYTES)}"
    return key, f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"


def read_keys(listed: str, path: Path | None) -> ApiKeys | None:
    """Return the keys of comma-separated entries and of a file, or None if neither is given. Raises InvalidSettings."""
    if not listed and path is None:
        return None
    return ApiKeys(_parse_entries(listed.split(","), _VARIABLE) if listed else (), path)


class ApiKeys:
    """Finds the owner of a key. Any number of threads may use it.

    The file has one entry a line, and comments after #. It is read again when its content changes; if the new content
    is unusable, the entries read before stay valid.
    """

    def __init__(
        self, listed: tuple[Entry, ...], path: Path | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Read the file.

        Args:
            listed: entries that are always valid.
            path: the file with more entries, or None.
            clock: seconds since any fixed moment.

        Raises:
            InvalidSettings: the file is unusable, or two names have the same key.
        """
        self._listed, self._path, self._clock = listed, path, clock
        self._content = _read_file(path)
        self._entries = self._parse(self._content)
        self._checked_at = clock()
        self._reloading = threading.Lock()

    def owner_of(self, key: str) -> str | None:
        """Return the name that a key belongs to, or None for an unknown key. Every key takes the same time."""
        self._reload_if_changed()
        digest, name = hashlib.sha256(key.encode(errors="replace")).digest(), None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                name = entry.name
        return name

    def _reload_if_changed(self) -> None:
        if self._path is None or self._clock() - self._checked_at < _CHECK_INTERVAL_S:
            return
        if not self._reloading.acquire(blocking=False):
            return  # another thread reloads; this request must not wait for a slow disk
        # On a thread of its own, for a network file system may hang, and requests are checked by the thread that all
        # connections share.
        thread = threading.Thread(target=self._reload, name="API keys", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there are too many threads
            self._reloading.release()
        else:
            thread.join(_READ_S)

    def _reload(self) -> None:
        try:
            # Content is compared, not mtime: two writes may share a timestamp, and mounted secrets are chains of links.
            content = _read_file(self._path)
            if content != self._content:
                self._content = content
                self._entries = self._parse(content)
                log.info("API keys read again", num_keys=len(self._entries))
        except InvalidSettings as error:
            log.error("API keys not read: the previous ones stay valid", error=error.message)
        finally:
            self._checked_at = self._clock()
            self._reloading.release()

    def _parse(self, content: bytes | None) -> tuple[Entry, ...]:
        if self._path is None:
            return self._listed
        if content is None:
            raise InvalidSettings(
                f"{_FILE_VARIABLE}: can't read {self._path}: check its name and permissions", param="api_keys_file"
            )
        if len(content) > _MAX_FILE_BYTES:
            raise InvalidSettings(f"{_FILE_VARIABLE}: over {_MAX_FILE_BYTES} bytes", param="api_keys_file")
        lines = _decode(content).splitlines()
        entries = _parse_entries((line.partition("#")[0] for line in lines), _FILE_VARIABLE)
        if not entries:
            raise InvalidSettings(f"{_FILE_VARIABLE}: contains no entry", param="api_keys_file")
        return _check_entries((*self._listed, *entries), _FILE_VARIABLE)


def _decode(content: bytes) -> str:
    """Return the text of a file in UTF-8, with or without the mark that editors of Windows write, or in UTF-16."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and len(content) > 2
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace")


def _read_file(path: Path | None) -> bytes | None:
    """Return the file's content, at most one byte more than is accepted, or None if it can't be read."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES + 1)
    except OSError:
        return None


def _parse_entries(parts: Iterable[str], variable: str) -> tuple[Entry, ...]:
    """Parse `name:sha256-hex` entries and skip empty parts.

    Error messages never quote an entry, because somebody may have put a key there by mistake.
    """
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
    return _check_entries(tuple(entries), variable)


def _check_entries(entries: tuple[Entry, ...], variable: str) -> tuple[Entry, ...]:
    names: dict[bytes, str] = {}
    if len(entries) > _MAX_ENTRIES:
        raise InvalidSettings(f"{variable}: more than {_MAX_ENTRIES} entries")
    for entry in entries:
        if names.setdefault(entry.digest, entry.name) != entry.name:
            raise InvalidSettings(f"{variable}: the same key has two names, {names[entry.digest]} and {entry.name}")
    return entries
