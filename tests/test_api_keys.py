"""API keys: their entries, a file that changes while it is in use, and the command that makes keys."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog.testing
from click.testing import CliRunner

from service.__main__ import main
from service.api_keys import ApiKeys, new_key, read_keys
from service.errors import InvalidSettings, InvalidValue
from tests.harness.wait import wait_until


class Clock:
    """A clock that a test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def file_keys(path: Path, clock: Clock) -> ApiKeys:
    return ApiKeys((), path, clock)


def test_owner_of__finds_a_key_by_its_digest() -> None:
    key, entry = new_key("alice")
    assert entry == f"alice:{hashlib.sha256(key.encode()).hexdigest()}"
    keys = read_keys(f" {entry.upper().replace('ALICE', 'alice')} , {new_key('bob')[1]},", None)
    assert keys
    assert keys.owner_of(key) == "alice"
    for other in ("", key[:-1], key + "x", entry, "é\udcff", new_key("alice")[0]):
        assert keys.owner_of(other) is None


def test_new_key__is_random_and_has_256_bits() -> None:
    made = {new_key("a")[0] for _ in range(100)}
    assert len(made) == 100
    assert min(len(key.removeprefix("gru-")) for key in made) >= 43  # 256 bits, 6 a character


def test_owner_of__an_old_key_and_its_successor_have_the_same_owner() -> None:
    (old, old_entry), (new, new_entry) = new_key("alice"), new_key("alice")
    keys = read_keys(f"{old_entry},{new_entry}", None)
    assert keys
    assert (keys.owner_of(old), keys.owner_of(new)) == ("alice", "alice")


def test_read_keys__without_entries_and_file_gives_none() -> None:
    assert read_keys("", None) is None


DIGEST = "0" * 64


@pytest.mark.parametrize(
    "listed",
    ["alice", "alice:", f":{DIGEST}", f"a/b:{DIGEST}", f"{'a' * 65}:{DIGEST}", f"a:{DIGEST}0", "a:secret", ","],
)
def test_read_keys__refuses_a_bad_entry_without_quoting_it(listed: str, tmp_path: Path) -> None:
    if listed != ",":
        with pytest.raises(InvalidSettings, match="GRU_SERVE_API_KEYS: entry 1 is not name:sha256-hex") as error:
            read_keys(listed, None)
        assert "secret" not in error.value.message
    path = tmp_path / "keys"
    path.write_text(f"# all of them\n{listed.strip(',')}\n")
    with pytest.raises(InvalidSettings, match="GRU_SERVE_API_KEYS_FILE: ") as error:
        read_keys("", path)
    assert "secret" not in error.value.message


def test_read_keys__refuses_a_key_with_two_names() -> None:
    with pytest.raises(InvalidSettings, match="the same key has two names, a and b"):
        read_keys(f"a:{DIGEST},b:{DIGEST}", None)
    assert read_keys(f"a:{DIGEST},a:{DIGEST}", None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "can't read"),
        (b"", "contains no entry"),
        (b"\xff\xfe", "entry 1 is not name:sha256-hex"),
        (b"x" * 300_000, "over 262144 bytes"),
        (b"\n".join(b"a:%064x" % n for n in range(1001)), "more than 1000 entries"),
    ],
    ids=["missing", "empty", "binary", "long", "many"],
)
def test_read_keys__refuses_an_unusable_file_with_a_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidSettings, match=f"GRU_SERVE_API_KEYS_FILE: {reason}"):
        read_keys("", path)


def test_api_keys__reads_a_changed_file_again(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    (old, old_entry), (new, new_entry) = new_key("alice"), new_key("alice")
    path.write_text(f"{old_entry}  # until Friday\n")
    keys = file_keys(path, clock)
    before = path.stat()
    path.write_text(f"{new_entry}  # until Friday\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if both writes had the same timestamp
    assert keys.owner_of(new) is None  # the file is checked once a second
    clock.now += 1
    assert keys.owner_of(new) == "alice"
    assert keys.owner_of(old) is None


def test_api_keys__a_file_that_hangs_delays_one_request(tmp_path: Path) -> None:
    """As on a network file system whose server is silent. Here a named pipe into which nobody writes."""
    path, clock = tmp_path / "keys", Clock()
    (old, old_entry), (new, new_entry) = new_key("alice"), new_key("bob")
    path.write_text(old_entry)
    keys = file_keys(path, clock)
    path.unlink()
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        try:
            before = threading.active_count()
            for _ in range(50):
                clock.now += 1
                assert pool.submit(keys.owner_of, old).result(10) == "alice"
            assert threading.active_count() <= before + 2  # the pool's and one that hangs
        finally:
            writer = os.open(path, os.O_WRONLY)
        path.unlink()
        path.write_text(new_entry)
        os.write(writer, old_entry.encode())
        os.close(writer)

    def is_known() -> bool:
        clock.now += 1
        return keys.owner_of(new) == "bob"

    wait_until(is_known)


@pytest.mark.parametrize("content", [None, "", "nonsense\n", "alice:\n"])
def test_api_keys__an_unusable_new_file_leaves_the_previous_keys_valid(tmp_path: Path, content: str | None) -> None:
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
    assert [(line["log_level"], "previous ones stay valid" in line["event"]) for line in logs] == [("error", True)]
    path.write_text(f"{old_entry}\n{new_entry}")
    clock.now += 1
    assert keys.owner_of(new) == "alice"


def test_read_keys__combines_variable_and_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    (one, one_entry), (other, other_entry) = new_key("alice"), new_key("bob")
    path.write_text(other_entry)
    keys = read_keys(one_entry, path)
    assert keys
    assert (keys.owner_of(one), keys.owner_of(other)) == ("alice", "bob")


def test_keys_command__prints_a_key_and_its_entry() -> None:
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
def test_new_key__refuses_an_unusable_name(name: str) -> None:
    with pytest.raises(InvalidValue):
        new_key(name)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_read_keys__a_file_may_come_from_windows(tmp_path: Path, encoding: str, line_end: str) -> None:
    """Windows' editors begin a file with a byte order mark, and its shell writes UTF-16."""
    path, (one, one_entry), (other, other_entry) = tmp_path / "keys", new_key("alice"), new_key("bob")
    path.write_bytes(line_end.join([one_entry, "# Bob's", other_entry, ""]).encode(encoding))
    keys = read_keys("", path)
    assert keys
    assert (keys.owner_of(one), keys.owner_of(other)) == ("alice", "bob")
