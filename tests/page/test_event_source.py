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
NUM_CHARS = 4000  # which take the server a few seconds


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
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(bypass_csp=True)  # any page of the server may run the examples
    yield context.new_page()
    context.close()


def run(page: Page, url: str, example: str, **names: Any) -> None:
    """Begin to run an example of the docs on a page of the server; what it gets is in `window.text` and others."""
    page.goto(f"{url}/healthz")
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


def begin(url: str, name: str, num_chars: int) -> str:
    """Begin a continuation of a new session, and leave it; return the whole text."""
    with Client(url) as client:
        whole = "".join(client.create("ROMEO:", seed=7).generate(num_chars))
        session = client.create("ROMEO:", seed=7, id=name)
        pieces = session.generate(num_chars)
        next(pieces)
        pieces.close()
    return whole


def stop(server: Server) -> None:
    server.process.terminate()
    assert server.process.wait(60) == 0


@pytest.mark.parametrize("example", ["EventSource", "fetch"])
def test_example__reads_a_stream_across_a_restart_of_the_server(
    page: Page, environment: dict[str, str], example: str
) -> None:
    """The stream ends with `reconnect`. Then the server refuses for a while, then nothing listens, then it is back."""
    port = free_port()
    command, url = [*SERVE[:-1], str(port)], f"http://127.0.0.1:{port}"
    code = EVENT_SOURCE if example == "EventSource" else FETCH
    with serving(command, environment) as server:
        whole = begin(url, f"restarted-{example}", NUM_CHARS)
        run(page, url, code, session=f"restarted-{example}")
        wait_until(lambda: seen(page)[0] > 0)
        stop(server)
        length, is_done, problem = seen(page)
        assert (is_done, problem) == (False, None)
    with serving(command, environment):
        wait_until(lambda: seen(page)[1] or seen(page)[2] is not None)
        assert seen(page) == (len(whole), True, None)
        assert page.evaluate("() => text") == whole
    assert length < len(whole)
