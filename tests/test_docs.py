"""The examples of the documentation do what they show."""

from __future__ import annotations

import doctest
from pathlib import Path

from tests.serving import SERVE, serving

DOCS = Path(__file__).parent.parent / "docs"


def test_the_examples_of_sessions_print_what_they_show() -> None:
    with serving(SERVE, {"GRU_SERVE_LOG_LEVEL": "warning"}) as server:
        text = (DOCS / "sessions.md").read_text().replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.port}")
        examples = doctest.DocTestParser().get_doctest(text, {}, "sessions.md", None, 0)
        assert len(examples.examples) > 25
        report: list[str] = []
        result = doctest.DocTestRunner(verbose=False).run(examples, out=report.append, clear_globs=False)
        client = examples.globs["client"]
        client.close()
        assert result.failed == 0, "".join(report)
