"""The examples of the documentation do what they show."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.server import SERVE, Server, serving

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(SERVE, {}) as server:
        yield server


@pytest.mark.parametrize(("name", "least"), [("sessions.md", 26), ("inspect.md", 20)])
def test_the_examples_print_what_they_show(
    server: Server, name: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / name).read_text().replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.port}")
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert len(examples.examples) >= least
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples, out=report.append, clear_globs=False)
    client = examples.globs["client"]
    client.close()
    assert result.failed == 0, "".join(report)
    if name == "inspect.md":
        assert (tmp_path / "unit.png").stat().st_size > 10_000
