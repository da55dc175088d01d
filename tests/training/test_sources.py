"""The files that the options of a corpus name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.errors import InvalidCorpus
from service.training.sources import Sources, find_sources, shown


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with texts, hidden files, and links."""
    root = tmp_path / "poems"
    for name in ("b/2.txt", "b/10.txt", "a/z.txt", "c.txt", ".hidden", ".git/config", "b/.x"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "loop").symlink_to(root)
    (root / "d.txt").symlink_to(root / "a" / "z.txt")
    os.mkfifo(root / "pipe")
    return root


def names(sources: Sources) -> list[str]:
    return [source.name for source in sources.files]


def test_find_sources__reads_a_folder_in_the_order_of_its_names(folder: Path) -> None:
    sources = find_sources([folder])
    assert names(sources) == ["z.txt", "10.txt", "2.txt", "c.txt"]
    assert all(source.is_found for source in sources.files)
    assert sources.name == "poems: 4 files"
    assert sources.notes == (
        "hidden, left out: .git, .hidden, .x",
        "named twice and read once: d.txt",
        "links to folders, left out: loop",
        "not regular files, left out: pipe",
    )


def test_find_sources__reads_several_in_the_order_in_which_they_are_given(folder: Path) -> None:
    sources = find_sources([folder / "c.txt", folder / "b", "-", folder / "b" / "2.txt", "-"])
    assert names(sources) == ["c.txt", "10.txt", "2.txt", "standard input"]
    assert (sources.name, sources.num_bytes) == ("4 files", None)
    assert sources.words == ("c.txt", "b", "-", "2.txt", "-")
    assert [source.is_found for source in sources.files] == [False, True, True, False]
    assert "named twice and read once: 2.txt, standard input" in sources.notes
    assert find_sources([folder / "c.txt", folder / "a"]).num_bytes == len("c.txt" + "a/z.txt")


def test_find_sources__expands_patterns(folder: Path) -> None:
    assert names(find_sources([f"{folder}/*.txt"])) == ["c.txt", "d.txt"]
    assert names(find_sources([f"{folder}/[ab]"])) == ["z.txt", "10.txt", "2.txt"]
    assert names(find_sources([f"{folder}/b/**"])) == ["10.txt", "2.txt"]
    (folder / "what?.txt").write_text("a name that looks like a pattern")
    sources = find_sources([folder / "what?.txt"])
    assert names(sources) == ["what?.txt"]
    assert not sources.files[0].is_found


def test_find_sources__says_what_does_not_exist(folder: Path) -> None:
    (folder / "empty" / ".hidden").mkdir(parents=True)
    for word, message in [
        (folder / "absent", "can't read .*absent: No such file"),
        (f"{folder}/*.md", r"no file matches .*/\*.md"),
        (folder / "empty", "the folder .*empty has no files to read"),
    ]:
        with pytest.raises(InvalidCorpus, match=message) as caught:
            find_sources([word])
        assert caught.value.param == "corpus"


def test_shown__makes_any_name_safe(tmp_path: Path) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9\n\x1b[1m\xc3\xa9.txt"))
    path.write_text("text")
    source = find_sources([path]).files[0]
    assert source.name == r"caf\xe9\n\x1b[1mé.txt"
    assert shown(path) == f"{tmp_path}/{source.name}"
    assert names(find_sources([tmp_path])) == [source.name]
