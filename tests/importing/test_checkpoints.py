"""Files that the libraries themselves have written, against what these computed: only where they are, see `.ci/run`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from service.__main__ import main
from service.importing.float_loss import log_probabilities
from service.store.model_store import ModelStore

CHECKPOINTS = Path(os.environ.get("CHECKPOINTS", "not-set"))
FACTS = CHECKPOINTS / "facts.json"
FILES = {
    "tutorial.weights.h5": "tutorial", "tutorial_ckpt": "tutorial", "one_step": "tutorial",
    "sequential1.h5": "sequential1", "sequential1.keras": "sequential1", "sequential1.weights.h5": "sequential1",
    "charrnn_state.pt": "charrnn", "charrnn_module.pt": "charrnn",
}  # fmt: skip

pytestmark = pytest.mark.skipif(not FACTS.is_file(), reason="CHECKPOINTS names no folder with such files")


def facts() -> dict[str, Any]:
    return json.loads(FACTS.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FILES)
def test_checkpoint__computes_what_its_library_computed(tmp_path: Path, name: str) -> None:
    words = ["import", str(CHECKPOINTS / name), "--name", "m", "--model-store", str(tmp_path)]
    charset = {"one_step": [], "charrnn": ["--charset", "string.printable"]}
    words += charset.get(name, charset.get(FILES[name], ["--charset", facts()["vocab"]]))
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    _, artifact = ModelStore(tmp_path).load("m")
    (expected,) = [model for model in facts()["models"] if model["name"] == FILES[name]]

    def read(ids: Any, hidden: Any) -> Any:
        return log_probabilities(artifact.config, artifact.tensors, np.asarray(ids), hidden)

    zero = np.zeros((artifact.config.num_layers, artifact.config.num_units), np.float32)
    ids = artifact.charset.exact(expected["probe"])
    found = read(ids, zero.copy())[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found, expected["logprobs"], atol=1e-4)
    assert abs(found.mean() + expected["nats_per_char"]) < 1e-3
    hidden, text = zero.copy(), ""
    after = read(artifact.charset.exact(expected["prompt"]), hidden)[-1]
    for _ in range(len(expected["greedy"])):
        best = int(after.argmax())
        text += artifact.charset.decode([best])
        after = read([best], hidden)[-1]
    assert text == expected["greedy"]


def test_checkpoint__reset_before_is_refused_by_name(tmp_path: Path) -> None:
    words = ["import", str(CHECKPOINTS / "reset_before.h5"), "--name", "m", "--model-store", str(tmp_path)]
    result = CliRunner().invoke(main, [*words, "--charset", facts()["vocab"]])
    assert result.exit_code == 1
    assert "reset_after=False" in result.output
