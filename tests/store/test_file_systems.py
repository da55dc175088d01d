"""The model store on the file systems that people have: network shares, stray files, links, and other users' files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from service.__main__ import main
from service.commands.options import open_store
from service.errors import InvalidArtifact, ModelNotFound, StoreError
from service.model.artifact import CARD, CONFIG, WEIGHTS
from service.model.manifest import MANIFEST
from service.store.model_store import ModelStore
from tests.harness.models import publish_tiny, tiny_config
from tests.harness.programs import program

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "store")
    publish_tiny(store)
    return store


def run(*words: str) -> Result:
    """Run a command of gru-serve."""
    return CliRunner().invoke(main, list(words))


# File systems that refuse a call


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What the store answers on each imitated file system."""
    if sys.platform != "linux":
        pytest.skip("LD_PRELOAD is Linux's")
    folder = tmp_path_factory.mktemp("interposed")
    library = folder / "file_system.so"
    command = [program("cc"), "-shared", "-fPIC", "-o", str(library), str(HERE / "file_system.c"), "-ldl"]
    subprocess.run(command, check=True)
    words = ["nfs", "no-locks", "directory", "no-modes", "no-rename", "no-move"]
    config = json.dumps(tiny_config().model_dump())
    done = subprocess.run(
        [sys.executable, "-m", "tests.store.publish_on", str(folder / "store"), config, *words],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("fault", ["nfs", "directory", "no-modes"])
def test_publish__works_on_a_file_system_that(answers: dict[str, dict[str, str]], fault: str) -> None:
    left = answers[fault].pop("left")
    assert set(answers[fault].values()) == {"ok"}, answers[fault]
    assert left == ".lock 1 store.json"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no-locks", "can't lock files"),
        ("no-rename", "can't rename a file over another one"),
        ("no-move", "can't rename a folder"),
    ],
)
def test_check_writable__tells_what_the_file_system_lacks(
    answers: dict[str, dict[str, str]], fault: str, reason: str
) -> None:
    assert answers[fault]["check"].startswith("StoreError: can't publish into ")
    assert reason in answers[fault]["check"]
    assert "publish into a store on a local disk and copy the version" in answers[fault]["check"]
    assert answers[fault]["publish"].startswith("StoreError: ")
    assert answers[fault]["left"] in (".lock", ".lock store.json", "")


def test_publish__leaves_the_staging_directory_of_a_living_writer(store: ModelStore) -> None:
    """Two writers overlap; neither removes what the other one is writing."""
    from service.store.staging import staging_directory

    directory = store.root / "tiny"
    with staging_directory(directory) as other:
        (other / "half").write_text("half")
        assert publish_tiny(store) == "tiny@2"
        assert (other / "half").exists()
    assert sorted(path.name for path in directory.iterdir()) == [".lock", "1", "2", "store.json"]


# Stray files


STRAY_FILES = [
    ".DS_Store", "._model.safetensors", ".nfs0000000000a1b2c3", "desktop.ini", "Desktop.ini", "Thumbs.db",
    ".README.md.swp", "README.md~", ".model.safetensors.Xy12ab", ".gitignore", "model.safetensors.dvc", "#README.md#",
    "~$card.docx", "README.md.bak", "Icon\r", ".fuse_hidden000001",
]  # fmt: skip
STRAY_FOLDERS = [
    "@eaDir",
    ".ipynb_checkpoints",
    "lost+found",
    ".AppleDouble",
    "#recycle",
    "..2026_11_26",
    "__pycache__",
]


def test_load__ignores_what_systems_and_editors_leave_in_a_version(store: ModelStore) -> None:
    version = store.resolve("tiny")
    for name in STRAY_FILES:
        (version.path / name).write_bytes(b"stray")
    for name in STRAY_FOLDERS:
        (version.path / name).mkdir()
    (version.path / "..data").symlink_to("..2026_11_26")
    assert store.load("tiny")[1].config == tiny_config()
    assert store.describe(version).version == version
    store.verify("tiny")
    for place in (store.root, store.root / "tiny"):
        for name in STRAY_FOLDERS:
            (place / name).mkdir()
        (place / ".DS_Store").write_bytes(b"stray")
    assert store.names() == ["tiny"]
    assert publish_tiny(store) == "tiny@2"


def test_publish__ignores_what_appears_in_its_staging_directory(store: ModelStore) -> None:
    from service.model.artifact import write_artifact
    from tests.harness.models import random_tensors

    def write(staging: Path) -> None:
        (staging / ".DS_Store").write_bytes(b"stray")
        (staging / "@eaDir").mkdir()
        write_artifact(staging, tiny_config(), random_tensors(tiny_config()), {}, {})

    version = store.publish("tiny", write)
    assert store.load(version.ref)[0] == version
    assert ".DS_Store" not in json.loads((version.path / MANIFEST).read_text())["files"]


def test_load__refuses_any_other_file_and_says_what_to_do(store: ModelStore) -> None:
    (store.resolve("tiny").path / "weights.bin").write_bytes(b"")
    with pytest.raises(InvalidArtifact, match=r"weights\.bin is not in the manifest.*move it elsewhere"):
        store.load("tiny")


# Files that decide nothing


@pytest.mark.parametrize("change", ["edited", "removed", "a folder"])
def test_verify__a_changed_card_is_a_warning(store: ModelStore, change: str) -> None:
    card = store.resolve("tiny").path / CARD
    card.unlink()
    if change == "edited":
        card.write_text("# my notes\n")
    elif change == "a folder":
        card.mkdir()
    (warning,) = store.verify("tiny")
    assert CARD in warning
    assert "decides nothing" in warning
    assert store.load("tiny")[1].warnings == (warning,)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "training.json", MANIFEST])
def test_verify__every_other_changed_file_is_an_error(store: ModelStore, name: str) -> None:
    path = store.resolve("tiny").path / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(InvalidArtifact, match=name):
        store.verify("tiny")


def test_verify__names_the_conversion_of_line_ends(store: ModelStore) -> None:
    """As git does with core.autocrlf=true, unless .gitattributes says otherwise."""
    path = store.resolve("tiny").path
    for name in (CONFIG, MANIFEST, "training.json"):
        (path / name).write_bytes((path / name).read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(InvalidArtifact, match=r"line ends were converted.*core\.autocrlf"):
        store.verify("tiny")


def test_clone__with_autocrlf_verifies(tmp_path: Path) -> None:
    git = program("git")
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    source, clone = tmp_path / "source", tmp_path / "clone"
    shutil.copytree(ROOT / "model_store", source / "model_store", ignore=shutil.ignore_patterns("*.lock"))
    if (ROOT / ".gitattributes").exists():
        shutil.copy(ROOT / ".gitattributes", source)
    identity = ["-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "a"]):
        subprocess.run([git, *words], cwd=source, check=True)
    subprocess.run([git, "clone", "-q", "-c", "core.autocrlf=true", str(source), str(clone)], check=True)
    store = ModelStore(clone / "model_store")
    for version in store.versions("shakespeare"):
        assert store.verify(version.ref) == ()
    assert store.aliases("shakespeare") == ModelStore(ROOT / "model_store").aliases("shakespeare")


# Links


def link_files(version: Path, elsewhere: Path) -> None:
    """As DVC and git-annex do: every file is a link into a cache."""
    elsewhere.mkdir()
    for path in list(version.iterdir()):
        path.rename(elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)


def link_data(version: Path, elsewhere: Path) -> None:  # noqa: ARG001
    """As Kubernetes does in mounted volumes: a link to ..data, which is a link to the newest folder."""
    folder = version / "..2026_11_26"
    names = os.listdir(version)
    folder.mkdir()
    for name in names:
        (version / name).rename(folder / name)
        (version / name).symlink_to(f"..data/{name}")
    (version / "..data").symlink_to(folder.name)


def link_version(version: Path, elsewhere: Path) -> None:
    """As people do: the version is a link to a folder elsewhere."""
    version.rename(elsewhere)
    version.symlink_to(elsewhere)


def link_name(version: Path, elsewhere: Path) -> None:
    version.parent.rename(elsewhere)
    version.parent.symlink_to(elsewhere)


@pytest.mark.parametrize("link", [link_files, link_data, link_version, link_name], ids=lambda each: each.__name__)
def test_load__follows_links(store: ModelStore, tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    version = store.resolve("tiny")
    digest = store.describe(version).digest
    link(version.path, tmp_path / "elsewhere")
    assert store.names() == ["tiny"]
    assert store.versions("tiny") == [version]
    assert store.load("tiny")[1].digest == digest == store.describe(version).digest
    assert store.verify("tiny@1") == ()
    assert publish_tiny(store) == "tiny@2"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nowhere", r"is a link to .*nowhere.*, which is not there"),
        (CONFIG, r"is a link that leads back to itself"),
        ("/dev/null", r"is not a regular file"),
        (".", r"is not a regular file"),
    ],
)
def test_load__says_why_it_refuses_a_link(store: ModelStore, target: str, reason: str) -> None:
    config = store.resolve("tiny").path / CONFIG
    config.unlink()
    config.symlink_to(target)
    with pytest.raises(InvalidArtifact, match=reason):
        store.load("tiny")


def test_load__opens_no_device_behind_a_link(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open a device can have an effect, and to open a pipe can wait for ever."""
    path = store.resolve("tiny").path
    os.mkfifo(path / ".pipe")
    opened: list[str] = []
    os_open = os.open

    def note(name: Any, *rest: Any, **named: Any) -> int:
        opened.append(str(name))
        return os_open(name, *rest, **named)

    monkeypatch.setattr(os, "open", note)
    for target in (".pipe", "/dev/null"):
        (path / CONFIG).unlink()
        (path / CONFIG).symlink_to(target)
        with pytest.raises(InvalidArtifact, match=r"not a regular file"):
            store.load("tiny")
    assert not [name for name in opened if name.endswith((".pipe", "null", CONFIG))]


def test_load__a_link_that_changes_between_check_and_read_is_refused(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is opened is checked again: the file that the link led to has become a link to a pipe."""
    path, real = store.resolve("tiny").path / CONFIG, tmp_path / "real.json"
    path.rename(real)
    path.symlink_to(real)
    os.mkfifo(tmp_path / "pipe")
    os_open = os.open

    def swap(name: Any, *rest: Any, **named: Any) -> int:
        if str(name) == str(real):
            real.unlink()
            real.symlink_to(tmp_path / "pipe")
        return os_open(name, *rest, **named)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(InvalidArtifact, match="not a regular file"):
        store.load("tiny")


def test_versions__a_link_to_nothing_is_listed_and_told(store: ModelStore) -> None:
    (store.root / "tiny" / "2").symlink_to("/nowhere/at/all")
    assert [version.number for version in store.versions("tiny")] == [1, 2]
    with pytest.raises(InvalidArtifact, match=r"is a link to /nowhere/at/all, which is not there"):
        store.load("tiny@2")
    assert publish_tiny(store) == "tiny@3"


@pytest.mark.parametrize(
    ("target", "reason"), [("nowhere", "is a link to nowhere"), ("broken", "leads back to itself")]
)
def test_name__that_is_a_broken_link_is_told(store: ModelStore, target: str, reason: str) -> None:
    """A folder of a model that DVC has not fetched, or that is not mounted, is not the same as no model."""
    (store.root / "broken").symlink_to(target)
    with pytest.raises(StoreError, match=reason):
        store.resolve("broken")
    assert (store.names(), list(store.unreadable())) == (["tiny"], ["broken"])
    with pytest.raises(ModelNotFound, match=r"it has: tiny; can't be read: broken$"):
        store.resolve("third")
    listed = run("models", "list", "--model-store", str(store.root))
    assert (listed.exit_code, "broken  unreadable: see models verify" in listed.stdout) == (0, True), listed.output
    verified = run("models", "verify", "--model-store", str(store.root))
    assert (verified.exit_code, reason in verified.stdout) == (1, True), verified.output


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: root.symlink_to("nowhere"), "is a link to nowhere, which is not there"),
        (lambda root: root.symlink_to(root.name), "is a link that leads back to itself"),
        (lambda root: root.write_text("version https://git-lfs"), "is a file, and not the folder of a model store"),
    ],
)
def test_store__that_is_no_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], reason: str
) -> None:
    """Neither are the shipped models used instead, as if there were nothing, nor is anything written."""
    make(tmp_path / "model_store")
    with pytest.raises(StoreError, match=reason):
        ModelStore(tmp_path / "model_store").resolve("tiny")
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a cab " * 5000)
    for named in ([], ["--model-store", "model_store"]):
        for words in (["models", "list"], ["generate", "--prompt", "R"], ["serve"]):
            result = run(*words, *named)
            assert (result.exit_code, reason in result.stderr) == (1, True), result.output
    with pytest.raises(StoreError, match=reason):
        open_store(None, create=True)


@pytest.mark.parametrize("inside", ["tiny", "tiny/1"])
def test_commands__name_the_store_if_a_folder_inside_it_was_given(store: ModelStore, inside: str) -> None:
    for words in (["models", "list"], ["models", "verify"], ["generate", "--prompt", "R"], ["serve"]):
        result = run(*words, "--model-store", str(store.root / inside))
        assert (result.exit_code, f"is inside a model store: name {store.root}\n" in result.stderr) == (1, True)
    assert ModelStore(store.root).around() is None


def test_resolve__says_that_a_folder_of_another_user_may_not_be_read(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of /proc/1/cwd, a link that may not even be followed."""
    (store.root / "theirs").symlink_to(store.root / "tiny")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "readlink", refuse)
    with pytest.raises(StoreError, match="may not read"):
        store.resolve("theirs")


def test_delete__of_a_link_leaves_what_it_leads_to(store: ModelStore, tmp_path: Path) -> None:
    version = store.resolve("tiny")
    link_version(version.path, tmp_path / "elsewhere")
    store.delete("tiny@1")
    assert store.names() == []
    assert (tmp_path / "elsewhere" / WEIGHTS).exists()
    assert sorted(path.name for path in (store.root / "tiny").iterdir()) == [".lock", "store.json"]


# Permissions


@pytest.mark.parametrize("umask", [0o077, 0o027])
def test_publish__under_a_narrow_umask_others_can_read(tmp_path: Path, umask: int) -> None:
    store = ModelStore(tmp_path / "new" / "store")
    before = os.umask(umask)
    try:
        store.check_writable("tiny")
        publish_tiny(store)
        store.set_alias("tiny", "stable", 1)
    finally:
        os.umask(before)
    for path in [store.root, *store.root.rglob("*")]:
        if path.name != ".lock":
            needed = 0o555 if path.is_dir() else 0o444
            assert stat.S_IMODE(path.stat().st_mode) & needed == needed, path


def test_publish__leaves_the_modes_of_folders_that_exist(tmp_path: Path) -> None:
    """Somebody who closed a store wants it closed. Bits for the group survive too."""
    root = tmp_path / "store"
    root.mkdir(mode=0o700)
    (root / "tiny").mkdir()
    (root / "tiny").chmod(0o2770)
    before = os.umask(0o002)
    try:
        version = ModelStore(root).resolve(publish_tiny(ModelStore(root)))
    finally:
        os.umask(before)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "tiny").stat().st_mode) == 0o2770
    assert stat.S_IMODE((version.path / CONFIG).stat().st_mode) == 0o664


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function that closes a folder or file to this process, which may be root's."""

    def close(forbidden: Path) -> None:
        for name in ("scandir", "open", "listdir", "stat", "lstat"):
            original = getattr(os, name)

            def refuse(path: Any = ".", *rest: Any, original: Any = original, **named: Any) -> Any:
                if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(forbidden):
                    raise PermissionError(errno.EACCES, "Permission denied", str(path))
                return original(path, *rest, **named)

            monkeypatch.setattr(os, name, refuse)

    return close


@pytest.mark.parametrize("closed", ["", "tiny"])
def test_resolve__says_that_a_store_may_not_be_read(
    store: ModelStore, forbid: Callable[[Path], None], closed: str
) -> None:
    forbid(store.root / closed)
    for call in (store.resolve, store.load, store.verify):
        with pytest.raises(StoreError, match=r"may not read .*: Permission denied.*chmod"):
            call("tiny")


def test_names__says_that_a_store_may_not_be_read(store: ModelStore, forbid: Callable[[Path], None]) -> None:
    forbid(store.root)
    with pytest.raises(StoreError, match="may not read"):
        store.names()


def test_names__one_closed_folder_hides_only_itself(store: ModelStore, forbid: Callable[[Path], None]) -> None:
    publish_tiny(store, "other")
    forbid(store.root / "tiny")
    assert store.names() == ["other"]
    with pytest.raises(ModelNotFound, match=r"can't be read: tiny"):
        store.resolve("third")


def test_load__says_which_file_may_not_be_read(store: ModelStore, forbid: Callable[[Path], None]) -> None:
    forbid(store.resolve("tiny").path / WEIGHTS)
    with pytest.raises(InvalidArtifact, match=rf"may not read .*{WEIGHTS}: Permission denied.*chmod"):
        store.load("tiny")


def test_models_list__says_permission(store: ModelStore, forbid: Callable[[Path], None]) -> None:
    forbid(store.root)
    for words in (["models", "list"], ["models", "show", "tiny"], ["generate", "--model", "tiny", "--prompt", "R"]):
        result = run(*words, "--model-store", str(store.root))
        assert result.exit_code == 1
        assert "Permission denied" in result.stderr, result.output
        assert "none" not in result.stderr
