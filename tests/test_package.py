"""The package as people get it: source distribution and wheel, installed and served outside the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import flask
import pytest

from service.commands.options import open_store
from tests.harness.programs import program
from tests.harness.server import Server, serving

pytestmark = pytest.mark.timeout(1200)  # a build compiles the kernel, which a busy machine delays

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
NOT_SOURCE = (
    ".git",
    ".venv*",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.so",
    ".lock",
)


def build(what: str, source: Path, target: Path, environment: dict[str, str] | None = None) -> Path:
    """Build `sdist` or `wheel` from a directory, without network; return its path."""
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, f"build_{what}", str(target)]
    variables = os.environ | (environment or {})
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return target / done.stdout.split()[-1]


def tracked_files() -> list[str]:
    """Return the files of the repository, or of the source distribution that these tests are run from."""
    if not (ROOT / ".git").exists():
        return []
    words = ["ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run([program("git"), *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("package")


@pytest.fixture(scope="module")
def sdist(folder: Path) -> Path:
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return build("sdist", folder / "checkout", folder / "dist")


@pytest.fixture(scope="module")
def wheel(folder: Path, sdist: Path) -> Path:
    """The wheel, built from the source distribution: so that has everything that a build needs.

    The compiler optimises little, which halves its time; the kernel has the same bits. test_build compiles it as an
    installation does.
    """
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {program("c++")} "$@" -O1\n')
    compiler.chmod(0o755)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build("wheel", source, folder / "dist", {"CC": str(compiler), "CXX": str(compiler)})


@pytest.fixture(scope="module")
def environment(folder: Path, wheel: Path) -> Path:
    """A new virtual environment with the wheel. The libraries come from this one, so nothing is downloaded."""
    place = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    words = ["--python", str(place / "bin" / "python"), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    # A path file adds the libraries after the packages of the environment. Path files among the libraries have no
    # effect, so this checkout is not among them.
    (packages / "libraries.pth").write_text(f"{Path(flask.__file__).parents[1]}\n")
    return place


@pytest.fixture(scope="module")
def server(environment: Path, folder: Path) -> Iterator[Server]:
    """`gru-serve serve` of the wheel, in an empty folder."""
    (folder / "empty").mkdir()
    command = [str(environment / "bin" / "gru-serve"), "serve", "--port", "0"]
    with serving(command, {"PYTHONPATH": ""}, folder / "empty") as server:
        yield server
    assert list((folder / "empty").iterdir()) == []


def test_sdist__has_every_file_of_the_repository(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert sorted(set(tracked_files()) - names) == []
    assert not [name for name in names if name.endswith((".so", ".pyc", ".lock"))]
    assert "tests/store/file_system.c" in names


def test_wheel__has_the_newest_version_of_the_shipped_model_and_all_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    newest = open_store(ROOT / "model_store").versions("shakespeare")[-1]
    model = {name for name in names if name.startswith("service/shipped_models/")}
    assert model == {
        f"service/shipped_models/shakespeare/{newest.number}/{path.name}" for path in newest.path.iterdir()
    }
    service = {str(path.relative_to(ROOT)) for path in (ROOT / "service").rglob("*") if path.is_file()}
    needed = {name for name in service if not re.search(r"__pycache__|/native/src/|\.so$|\.pyc$|shipped_models", name)}
    assert sorted(needed - names) == []
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "model_store/"))]
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    assert "Requires-Python: >=3.11" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_wheel__serves_in_an_empty_folder_what_the_readme_asks_for(server: Server, environment: Path) -> None:
    found = re.search(r"curl -sN localhost:8000/v1/completions .*\n +-d '(.*)'", (ROOT / "README.md").read_text())
    assert found is not None
    body = json.loads(found[1])
    with closing(server.open(body)) as connection, connection.makefile("rb") as answer:
        lines = [line.decode().rstrip() for line in iter(answer.readline, b"data: [DONE]\n")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    assert len(text) == body["max_tokens"]
    (loaded,) = server.logged("model loaded")
    assert loaded["store"].startswith(str(environment))
    told = [line for line in map(json.loads, list(server.log)) if "shipped models" in line["event"]]
    assert [Path(line["missing"]).parent.name for line in told] == ["empty"]


def test_wheel__says_where_its_models_are(environment: Path, tmp_path: Path) -> None:
    command = [str(environment / "bin" / "gru-serve"), "models", "show", "shakespeare"]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True, check=True)
    assert re.search(rf"^path +{re.escape(str(environment))}/.*/shipped_models/shakespeare/\d+$", done.stdout, re.M)
    assert f"using the shipped models in {environment}" in done.stderr


def test_setup__says_in_one_line_that_the_kernel_was_not_compiled(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    environment = os.environ | {"CC": "false", "CXX": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("gru-serve: "))
    assert "no C++17 compiler works" in line


def test_make__tells_an_old_python_in_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python3.10"
    code = "import sys; sys.version_info = (3, 10, 12, 'final', 0); exec(sys.argv[1])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$2"\n')
    python.chmod(0o755)
    words = [f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", "serve"]
    done = subprocess.run([program("make"), *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    (told,) = (line for line in done.stderr.splitlines() if not line.startswith("make"))
    assert re.fullmatch(
        r"gru-serve needs Python 3\.11 or later, and .*python3\.10 is 3\.10: .*PYTHON=python3\.12", told
    )
    assert not (tmp_path / "venv").exists()


def test_make__serve_installs_no_test_tools() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^serve: \$\(VENV\)/\.server ;", makefile, re.M)
    rule = makefile.split("$(VENV)/.server: ")[1].split("\n\n")[0]
    assert "dev" not in rule
