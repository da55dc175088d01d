"""The files of a corpus: what the options name, in which order it is read, and what is left out."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.errors import InvalidCorpus

STDIN = "-"
_LEADS_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}  # errors of a broken link
_MAX_NAMED = 3  # files that a note names at most


@dataclass(frozen=True)
class Source:
    """A file to read, or standard input."""

    path: Path | None  # None for standard input
    # Whether a folder or a pattern contains it. A binary file is then left out; one that the user names is refused.
    is_found: bool = False

    @property
    def name(self) -> str:
        """The name without its folder, in a form that is safe in every terminal and file."""
        return "standard input" if self.path is None else shown(self.path.name)

    @property
    def place(self) -> str:
        """The path, in a form that is safe in every terminal and file."""
        return "standard input" if self.path is None else shown(self.path)


@dataclass(frozen=True)
class Sources:
    """The files of a corpus, in the order in which they are read."""

    words: tuple[str, ...]  # what the user named, without folders, in a form that is safe everywhere
    files: tuple[Source, ...]
    folder: str  # what precedes the number of files in the corpus' name
    notes: tuple[str, ...]  # a line for each kind of file that is left out

    @property
    def name(self) -> str:
        """The name of the corpus: the file's, or how many files there are."""
        return self.name_of(self.files)

    def name_of(self, files: Sequence[Source]) -> str:
        """Return the name of the corpus if only these files are read."""
        return files[0].name if len(files) == 1 else f"{self.folder}{len(files):,} files"

    @property
    def num_bytes(self) -> int | None:
        """The size of all files; None if one of them has no size, such as standard input."""
        total = 0
        for source in self.files:
            try:
                facts = os.stat(source.path) if source.path is not None else None
            except OSError:
                return None  # reading it says what is wrong
            if facts is None or not stat.S_ISREG(facts.st_mode):
                return None
            total += facts.st_size
        return total


def find_sources(words: Sequence[str | Path]) -> Sources:
    """Return the files that the words name.

    A word is a file, a folder, a pattern of the shell (`*`, `?`, `[...]`, `**`) or `-` for standard input. Of a folder,
    all regular files below it are read whose names, and whose folders' names, don't begin with a dot, in the order of
    their names. Links to files are followed, links to folders are not. A file that is named twice is read once.

    Raises InvalidCorpus for a file that doesn't exist, and for a folder or a pattern without files.
    """
    skipped: dict[str, list[str]] = {}
    files: list[Source] = []
    seen: set[tuple[int, int] | str] = set()
    for word in words:
        for source in _expand(word, skipped):
            key: tuple[int, int] | str = STDIN
            if source.path is not None:
                try:
                    facts = os.stat(source.path)
                except OSError as error:
                    raise cannot_read(source, error) from error
                key = facts.st_dev, facts.st_ino
            if key in seen:
                skipped.setdefault("named twice and read once", []).append(source.name)
            else:
                seen.add(key)
                files.append(source)
    if not files:
        raise InvalidCorpus("no corpus is given", param="corpus")
    folder = f"{shown(Path(words[0]).resolve().name)}: " if len(words) == 1 and os.path.isdir(words[0]) else ""
    named = tuple(
        STDIN if str(word) == STDIN else shown(Path(word).name or Path(word).resolve().name) for word in words
    )
    return Sources(named, tuple(files), folder, tuple(f"{what}: {listed(names)}" for what, names in skipped.items()))


def _expand(word: str | Path, skipped: dict[str, list[str]]) -> Iterator[Source]:
    """Yield the files that a word names. Adds what is left out to `skipped`, names by the reason."""
    path = Path(word)
    if str(word) == STDIN:
        yield Source(None)
    elif os.path.isdir(path):  # unlike Path.is_dir, it raises nothing; opening the file says what is wrong
        num_files = 0
        for source in _files_below(path, skipped):
            num_files += 1
            yield source
        if not num_files:
            raise InvalidCorpus(f"the folder {shown(path)} has no files to read", param="corpus")
    elif not os.path.lexists(path) and glob.has_magic(str(word)):
        matches = sorted(glob.glob(str(word), recursive=True), key=os.fsencode)
        if not matches:
            raise InvalidCorpus(f"no file matches {shown(path)}", param="corpus")
        for match in matches:
            if os.path.isdir(match):
                if "**" not in str(word):  # such a pattern also matches the files in the folder
                    yield from _files_below(Path(match), skipped)
            else:
                yield Source(Path(match), is_found=True)
    else:
        yield Source(path)


def _files_below(folder: Path, skipped: dict[str, list[str]]) -> Iterator[Source]:
    """Yield the files below a folder in the order of their names, level by level."""
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if path is not folder and path.name.startswith("."):
            skipped.setdefault("hidden, left out", []).append(shown(path.name))
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if not os.path.islink(path) or error.errno not in _LEADS_NOWHERE:
                raise cannot_read(Source(path), error) from error
            mode = 0
        if stat.S_ISDIR(mode):
            if path is not folder and path.is_symlink():
                skipped.setdefault("links to folders, left out", []).append(shown(path.name))
                continue
            try:
                entries = sorted(path.iterdir(), key=os.fsencode, reverse=True)
            except OSError as error:
                raise InvalidCorpus(f"can't read the folder {shown(path)}: {error.strerror}", param="corpus") from error
            waiting += entries
        elif stat.S_ISREG(mode):
            yield Source(path, is_found=True)
        else:
            skipped.setdefault("not regular files, left out", []).append(shown(path.name))


def cannot_read(source: Source, error: OSError) -> InvalidCorpus:
    """Return the error for a file that can't be opened or read."""
    return InvalidCorpus(f"can't read {source.place}: {error.strerror or error}", param="corpus")


def shown(path: str | Path) -> str:
    r"""Return a path in a form that is safe everywhere: bytes that are not UTF-8 as `\xff`, a line end as `\n`."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def listed(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
