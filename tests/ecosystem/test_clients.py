"""Clients of the ecosystem, unchanged, against the real server: each as a user of it would write it.

Each folder here is a client: what it needs (`requirements.txt` or `package.json`), and what is done with it, in
`use.py`, `use.mjs` or `use.sh`. The clients are installed into environments of their own at the first run, so the tests
run only if TEST_CLIENTS is set: `quick` for those that are used most, `all` for all of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.api_keys import new_key
from service.store.model_store import ModelStore
from tests.harness.environments import ROOT, environment
from tests.harness.models import publish_tiny
from tests.harness.programs import program
from tests.harness.server import SERVE, serving

HERE = Path(__file__).parent
QUICK = [
    "openai-python", "openai-node", "langchain-openai", "litellm", "llm", "llama-index", "vercel-ai",
    "openapi-python-client",
]  # fmt: skip
SLOW = ["inspect-ai", "lm-eval", "aiperf", "guidellm"]
USE_S = 300
MODEL = "shakespeare"
# A model that knows all characters of JSON, and nothing else.
FORMS_MODEL, ASCII = "forms", "\n" + "".join(map(chr, range(32, 127)))
RUN = os.environ.get("TEST_CLIENTS", "")
# Nothing on the network but the server, and nothing in the user's own folders.
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False", "AI_SDK_LOG_WARNINGS": "false", "NO_PROXY": "127.0.0.1",
}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(RUN not in ("quick", "all"), reason="set TEST_CLIENTS=quick or all: it installs the clients"),
    pytest.mark.timeout(1_500),
]


@dataclass(frozen=True)
class Place:
    """A server, and the key that clients have on it."""

    port: int
    key: str


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the shipped model, and of a small one that can write JSON."""
    store = tmp_path_factory.mktemp("store") / "models"
    shutil.copytree(ROOT / "model_store", store)
    publish_tiny(ModelStore(store), FORMS_MODEL, chat="play", charset=ASCII)
    return store


def place(models: Path, **settings: str) -> Iterator[Place]:
    """Serve the models of a store."""
    key, entry = new_key("client")
    keys = {"GRU_SERVE_API_KEYS": entry} if settings.pop("keys", "") else {}
    store = {"GRU_SERVE_MODEL_STORE": str(models), "GRU_SERVE_MODEL": MODEL}
    with serving(SERVE, store | keys | settings) as server:
        yield Place(server.port, key)


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Place]:
    """A server with keys, on which a client may have four streams, and a stream may last as long as a test needs."""
    yield from place(models, keys="1", GRU_SERVE_MAX_STREAMS="4", GRU_SERVE_MAX_TOKENS="10000000")


@pytest.mark.parametrize("client", QUICK + (SLOW if RUN == "all" else []))
def test_client__works_unchanged(server: Place, client: str, tmp_path: Path) -> None:
    output = use(client, server, tmp_path)
    assert output.splitlines()[-1] == "ok", output[-4_000:]


# Texts that the schema allows may have characters that the model doesn't know, and ids may be of sessions that are gone
# by then. `expected.py` holds such refusals to the codes that are meant.
@pytest.mark.skipif(RUN != "all", reason="set TEST_CLIENTS=all: it sends thousands of requests")
@pytest.mark.timeout(3_000)
@pytest.mark.parametrize("keys", ["", "1"], ids=["open", "keyed"])
def test_schemathesis__finds_no_failure(models: Path, keys: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        served = stack.enter_context(contextmanager(place)(models, keys=keys, GRU_SERVE_MAX_TOKENS="200"))
        output = use("schemathesis", served, tmp_path, limit_s=1_400, EXAMPLES="300", KEYED=keys)
    assert output.splitlines()[-1] == "ok", output[-8_000:]


def use(client: str, server: Place, folder: Path, limit_s: float = USE_S, **variables: str) -> str:
    """Run what is done with a client; return what it printed. Fails if it fails."""
    source = HERE / client
    installed = environment(source)
    (script,) = source.glob("use.*")
    if script.suffix == ".mjs":  # its imports are resolved from the folder that it is in
        shutil.copy(script, installed)
        command = [program("node"), str(installed / script.name)]
    else:
        command = [str(installed / "bin" / "python") if script.suffix == ".py" else program("bash"), str(script)]
    base = f"http://127.0.0.1:{server.port}"
    paths = os.pathsep.join([str(installed / "bin"), os.environ.get("PATH", "")])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GRU_SERVE_"))}
    given = {
        "PATH": paths, "HOME": str(folder), "HERE": str(source), "HOST_URL": base, "BASE_URL": f"{base}/v1",
        "API_KEY": server.key, "MODEL": MODEL, "FORMS_MODEL": FORMS_MODEL,
    }  # fmt: skip
    process = subprocess.Popen(
        command, cwd=folder, env=inherited | OFFLINE | given | variables, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the client, and the processes that it has started
        output, _ = process.communicate()
        pytest.fail(f"{client} took more than {limit_s} s: {output[-8_000:]}")
    assert process.returncode == 0, output[-8_000:]
    return output
