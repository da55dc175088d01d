"""The files for Hugging Face's libraries: `tokenizers` reads every text as the charset does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.model import hugging_face
from service.model.charset import Charset
from service.store.model_store import ModelStore
from tests.harness.own_environment import own_python

ROOT = Path(__file__).parents[2]
PEER = Path(__file__).parent / "tokenizers_peer.py"
PACKAGES = ["tokenizers==0.23.3"]  # without what it needs to download: it loads files here


CHARSETS = {
    "shipped": ModelStore(ROOT / "model_store").describe(
        ModelStore(ROOT / "model_store").resolve("shakespeare")
    ).config.charset,
    "letters and marks": "\n aeiouAEIOU\u0301\u0308\u0327\u0323éÜ",
    "marks before letters": "\u0308\u0301o\u0304x",
    "syllables": "\u1100\u1161\u11a8\uac01\n",
    "signs": "\0\t\r\n\x0b\x85\u2028\u2029 \"\\[]{}()<>|.*+?^$#%&~\u200d\ufeff",
    "far away": "a\n\U0001f600\U0001f3fd\u200d\U00020000\U0010ffff\ue000日本",
    "no newline": "ACGT",
}  # fmt: skip


class Peer:
    """The library, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input: IO[str] = process.stdin
        self._output: IO[str] = process.stdout
        self._folder = folder

    def load(self, charset: Charset) -> None:
        path = self._folder / "tokenizer.json"
        path.write_text(json.dumps(hugging_face.tokenizer(charset)))
        self._send({"path": str(path)})

    def read(self, text: str) -> Any:
        self._send({"text": text})
        return json.loads(self._output.readline())

    def _send(self, request: object) -> None:
        self._input.write(json.dumps(request) + "\n")
        self._input.flush()


@pytest.fixture(scope="module")
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    assert request.config.cache
    python = own_python(request.config.cache, PACKAGES, "--no-deps")
    with subprocess.Popen([python, str(PEER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Peer(process, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", CHARSETS)
def test_tokenizer__reads_and_writes_every_text_as_the_charset_does(peer: Peer, name: str) -> None:
    charset = Charset(CHARSETS[name])
    peer.load(charset)

    @settings(max_examples=60, suppress_health_check=list(HealthCheck), database=None)
    @given(st.text(alphabet=charset.characters, max_size=40))
    def check(text: str) -> None:
        ids = charset.encode(text).tolist()
        assert peer.read(text) == {"ids": ids, "text": charset.decode(ids)}

    check()
    assert peer.read(charset.characters)["text"] == charset.written(charset.characters)


@pytest.mark.parametrize("name", ["letters and marks", "syllables", "shipped"])
def test_tokenizer__leaves_out_what_the_charset_drops(peer: Peer, name: str) -> None:
    charset = Charset(CHARSETS[name])
    peer.load(charset)
    others = "éëêÅ\u212bạ\u0340ñǘṩ각가\u1100\u11a7日"

    @settings(max_examples=60, suppress_health_check=list(HealthCheck), database=None)
    @given(st.text(alphabet=charset.characters + others, max_size=8))
    def check(text: str) -> None:
        ids = charset.encode(text, "drop").tolist()
        assert peer.read(text) == {"ids": ids, "text": charset.decode(ids)}

    check()


def test_config__names_the_newline_where_the_charset_has_it() -> None:
    config = hugging_face.tokenizer_config(Charset(CHARSETS["shipped"]), 100)
    assert [config[f"{kind}_token"] for kind in ("bos", "eos", "pad")] == ["\n"] * 3
    assert config["model_max_length"] == 100
    config = hugging_face.tokenizer_config(Charset("ACGT"))
    assert [config[f"{kind}_token"] for kind in ("bos", "eos", "pad")] == [None] * 3
