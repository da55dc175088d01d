"""API keys: entries, the file that changes while they are in use, and the command that makes them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import structlog.testing
from click.testing import CliRunner

from service.__main__ import main
from service.api_keys import ApiKeys, new_key, read_keys
from service.errors import InvalidSettings, InvalidValue


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def file_keys(path: Path, clock: Clock) -> ApiKeys:
    return ApiKeys((), path, clock)


def test_a_key_is_known_by_its_hash() -> None:
    key, entry = new_key("alice")
    assert entry == f"alice:{hashlib.sha256(key.encode()).hexdigest()}"
    keys = read_keys(f" {entry.upper().replace('ALICE', 'alice')} , {new_key('bob')[1]},", None)
    assert keys
    assert keys.owner_of(key) == "alice"
    for other in ("", key[:-1], key + "x", entry, "é\udcff", new_key("alice")[0]):
        assert keys.owner_of(other) is None


def test_keys_are_random_and_long() -> None:
    made = {new_key("a")[0] for _ in range(100)}
    assert len(made) == 100
    assert min(map(len, made)) >= 43  # 256 bits


def test_an_old_key_and_its_successor_have_one_owner() -> None:
    (old, old_entry), (new, new_entry) = new_key("alice"), new_key("alice")
    keys = read_keys(f"{old_entry},{new_entry}", None)
    assert keys
    assert (keys.owner_of(old), keys.owner_of(new)) == ("alice", "alice")


def test_without_entries_and_file_there_are_no_keys() -> None:
    assert read_keys("", None) is None


DIGEST = "0" * 64


@pytest.mark.parametrize(
    "listed",
    ["alice", "alice:", f":{DIGEST}", f"a/b:{DIGEST}", f"{'a' * 65}:{DIGEST}", f"a:{DIGEST}0", "a:secret", ","],
)
def test_a_bad_entry_is_refused_and_not_quoted(listed: str, tmp_path: Path) -> None:
    if listed != ",":
        with pytest.raises(InvalidSettings, match="GRU_SERVE_API_KEYS: entry 1 is not name:sha256-hex") as error:
            read_keys(listed, None)
        assert "secret" not in error.value.message
    path = tmp_path / "keys"
    path.write_text(f"# all of them\n{listed.strip(',')}\n")
    with pytest.raises(InvalidSettings, match="GRU_SERVE_API_KEYS_FILE: ") as error:
        read_keys("", path)
    assert "secret" not in error.value.message


def test_one_key_under_two_names_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="two names, a and b"):
        read_keys(f"a:{DIGEST},b:{DIGEST}", None)
    assert read_keys(f"a:{DIGEST},a:{DIGEST}", None)


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe", b"x" * 300_000, b"\n".join(b"a:%064x" % n for n in range(1001))]
)
def test_a_file_that_is_no_good_stops_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidSettings, match="GRU_SERVE_API_KEYS_FILE"):
        read_keys("", path)


def test_the_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    (old, old_entry), (new, new_entry) = new_key("alice"), new_key("alice")
    path.write_text(f"{old_entry}  # until Friday\n")
    keys = file_keys(path, clock)
    before = path.stat()
    path.write_text(f"{new_entry}  # until Friday\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as fast as the clock of the file system
    assert keys.owner_of(new) is None  # it is looked at once a second
    clock.now += 1
    assert keys.owner_of(new) == "alice"
    assert keys.owner_of(old) is None


@pytest.mark.parametrize("content", [None, "", "nonsense\n", "alice:\n"])
def test_a_file_that_has_become_bad_leaves_the_old_keys_in_force(tmp_path: Path, content: str | None) -> None:
    path, clock = tmp_path / "keys", Clock()
    (old, old_entry), (new, new_entry) = new_key("alice"), new_key("alice")
    path.write_text(old_entry)
    keys = file_keys(path, clock)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            clock.now += 1
            assert keys.owner_of(old) == "alice"
    assert [(line["log_level"], "old ones stay" in line["event"]) for line in logs] == [("error", True)]  # said once
    path.write_text(f"{old_entry}\n{new_entry}")
    clock.now += 1
    assert keys.owner_of(new) == "alice"


def test_variable_and_file_count_together(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    (one, one_entry), (other, other_entry) = new_key("alice"), new_key("bob")
    path.write_text(other_entry)
    keys = read_keys(one_entry, path)
    assert keys
    assert (keys.owner_of(one), keys.owner_of(other)) == ("alice", "bob")


def test_the_command_prints_a_key_and_its_entry() -> None:
    words = CliRunner().invoke(main, ["keys", "new", "alice"]).stdout.split()
    assert (words[0], words[2]) == ("key", "entry")
    keys = read_keys(words[3], None)
    assert keys
    assert keys.owner_of(words[1]) == "alice"
    made = json.loads(CliRunner().invoke(main, ["keys", "new", "alice", "--json"]).stdout)
    keys = read_keys(made["entry"], None)
    assert keys
    assert keys.owner_of(made["key"]) == "alice"
    refused = CliRunner().invoke(main, ["keys", "new", "a/b"])
    assert refused.exit_code == 1
    assert "1 to 64 letters" in refused.stderr


@pytest.mark.parametrize("name", ["", "a/b", "a" * 65, "a:b", "é", "a\n"])
def test_a_name_that_could_not_own_anything_is_refused(name: str) -> None:
    with pytest.raises(InvalidValue):
        new_key(name)
