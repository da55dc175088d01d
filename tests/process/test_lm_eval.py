"""lm-evaluation-harness, unchanged, against the real server: its `local-completions` model scores a task of our own.

It needs 900 MB of packages, so the test runs only if TEST_LM_EVAL is set.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.store.model_store import ModelStore
from tests.harness.environments import ROOT, environment
from tests.harness.server import SERVE, Server, serving

TASK = Path(__file__).parent / "lm_eval_task"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment in which lm-evaluation-harness is installed."""
    if not os.environ.get("TEST_LM_EVAL"):
        pytest.skip("set TEST_LM_EVAL=1: it installs 900 MB of packages in an environment of their own")
    return environment(ROOT / "tests" / "ecosystem" / "lm-eval") / "bin" / "python"


@pytest.fixture(scope="module")
def server(tiny_store: ModelStore) -> Iterator[Server]:
    with serving(SERVE, {"GRU_SERVE_MODEL_STORE": str(tiny_store.root), "GRU_SERVE_MODEL": "tiny"}) as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's tokenizer in a folder, which lm-evaluation-harness counts with by default."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(server.call("GET", f"/v1/models/tiny/{name}")[1]))
    return folder


def scores(server: Server, document: dict[str, Any]) -> list[float]:
    """Return the log-probability of each choice of a document after its text."""
    prompts = [document["text"] + choice for choice in document["choices"]]
    body = {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 0}
    status, answer = server.call("POST", "/v1/completions", body)
    assert status == 200
    start = len(document["text"])
    return [math.fsum(choice["logprobs"]["token_logprobs"][start:]) for choice in answer["choices"]]


@pytest.mark.parametrize(("num_concurrent", "batch_size"), [(4, 1), (1, 4)])
def test_lm_eval__finds_the_log_probabilities_that_the_server_gives(
    python: Path, server: Server, tokenizer: Path, tmp_path: Path, num_concurrent: int, batch_size: int
) -> None:
    model = {
        "base_url": f"http://127.0.0.1:{server.port}/v1/completions", "model": "tiny",
        "tokenizer": str(tokenizer), "tokenizer_backend": "huggingface", "tokenized_requests": False,
        "num_concurrent": num_concurrent,
    }  # fmt: skip
    command = [
        str(python), "-m", "lm_eval", "--model", "local-completions",
        "--batch_size", str(batch_size), "--model_args", ",".join(f"{name}={value}" for name, value in model.items()),
        "--tasks", "gru_serve_choice", "--include_path", str(TASK), "--log_samples", "--output_path", str(tmp_path),
    ]  # fmt: skip
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    result = subprocess.run(
        command, cwd=TASK.parents[2], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    samples = [json.loads(line) for line in next(tmp_path.rglob("samples_*.jsonl")).read_text().splitlines()]
    assert len(samples) == len((TASK / "choices.jsonl").read_text().splitlines())
    num_right = 0
    for sample in samples:
        expected = scores(server, sample["doc"])
        assert [float(logprob) for logprob, _ in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-9)
        num_right += expected.index(max(expected)) == sample["doc"]["answer"]
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]["gru_serve_choice"]
    assert results["acc,none"] == pytest.approx(num_right / len(samples))
