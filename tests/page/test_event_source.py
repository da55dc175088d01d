"""Sessions' streams in a real browser, with the examples of docs/sessions.md: EventSource and fetch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from service.client import Client
from service.store.model_store import ModelStore
from tests.harness.programs import free_port
from tests.harness.redis_process import redis_process
from tests.harness.server import SERVE, Server, serving
from tests.harness.wait import wait_until

DOCS = (Path(__file__).parents[2] / "docs" / "sessions.md").read_text()
EXAMPLES = re.findall(r"^```js\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
EVENT_SOURCE, FETCH = (example for example in EXAMPLES)
NUM_CHARS = 10_000  # which take the server a second or more


@pytest.fixture(scope="module")
def environment(tiny_store: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with redis_process(tmp_path_factory.mktemp("redis")) as redis:
        yield {
            "GRU_SERVE_MODEL_STORE": str(tiny_store.root),
            "GRU_SERVE_MODEL": "tiny",
            "GRU_SERVE_KERNEL": "torch",
            "GRU_SERVE_ENGINE_THREADS": "1",
            "GRU_SERVE_MAX_TOKENS": "10000000",
            "GRU_SERVE_SESSION_TEXT_CHARS": "10000000",
            "GRU_SERVE_SESSION_CHECKPOINT_CHARS": "65536",
            "GRU_SERVE_SESSION_STORE": redis.url,
            # After its streams have ended, it answers for two more seconds, and refuses.
            "GRU_SERVE_DRAIN_S": "2",
            "GRU_SERVE_DRAIN_NOTICE_S": "2",
        }


@pytest.fixture
def pages(browser: Browser) -> Iterator[dict[str, Page]]:
    """A page for each example."""
    context = browser.new_context(bypass_csp=True)  # any page of the server may run the examples
    yield {example: context.new_page() for example in (EVENT_SOURCE, FETCH)}
    context.close()


def run(page: Page, example: str, **names: Any) -> None:
    """Begin to run an example of the docs on a page of the server; what it gets is in `window.text` and others."""
    page.evaluate(
        """([code, names]) => {
            Object.assign(window, {text: "", problem: null, isDone: false}, names);
            window.ended = new (async () => {}).constructor(code)().catch((error) => (window.problem = String(error)));
        }""",
        [example, names],
    )


def seen(page: Page) -> tuple[int, bool, object]:
    found: list[Any] = page.evaluate("() => [text.length, isDone, problem]")
    return found[0], found[1], found[2]


def begin(url: str, name: str, num_chars: int) -> None:
    """Begin a continuation of a new session, and leave it."""
    with Client(url) as client:
        pieces = client.create("ROMEO:", seed=7, id=name).generate(num_chars)
        next(pieces)
        pieces.close()


def stop(server: Server) -> None:
    server.process.terminate()
    assert server.process.wait(60) == 0


def test_examples__read_a_stream_across_a_restart_of_the_server(
    pages: dict[str, Page], environment: dict[str, str]
) -> None:
    """The stream ends with `reconnect`. Then the server refuses for a while, then nothing listens, then it is back."""
    port = free_port()
    command, url = [*SERVE[:-1], str(port)], f"http://127.0.0.1:{port}"
    with serving(command, environment) as server:
        for number, page in enumerate(pages.values()):
            page.goto(f"{url}/healthz")
            begin(url, f"restarted-{number}", NUM_CHARS)
        for number, (example, page) in enumerate(pages.items()):
            run(page, example, session=f"restarted-{number}")
        for page in pages.values():
            wait_until(lambda page=page: seen(page)[0] > 0)  # type: ignore[misc]
        stop(server)
        lengths = []
        for page in pages.values():
            length, is_done, problem = seen(page)
            assert (is_done, problem) == (False, None)
            lengths.append(length)
    with serving(command, environment):
        for page, length in zip(pages.values(), lengths, strict=True):
            wait_until(lambda page=page: seen(page)[1] or seen(page)[2] is not None)  # type: ignore[misc]
            assert seen(page) == (NUM_CHARS, True, None)
            assert length < NUM_CHARS
        with Client(url) as client:
            whole = "".join(client.create("ROMEO:", seed=7).generate(NUM_CHARS))
        assert [page.evaluate("() => text") for page in pages.values()] == [whole] * 2
