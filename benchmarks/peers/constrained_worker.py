"""Libraries that constrain the texts of language models, with a small transformer in torch.

    python -m benchmarks.peers.constrained_worker LIBRARY SITE_PACKAGES

LIBRARY is one of `LIBRARIES`. SITE_PACKAGES is the folder of the development environment's packages: torch comes from
there. The tokens are the characters of `tests/harness/forms.py` and one that ends a text, so a token limit means the
same to every library. The transformer has random weights.

The worker reads a JSON document from each line of standard input and answers with a line on standard output:

    {"kind": "regex", "value": "[a-z]+", "limits": [1, 11], "num_texts": 16}
    {"compile_ms": 1.2, "texts": [["a", ...], ["kq", ...]], "ended": [[true, ...], ...], "num_tokens": 96,
     "mask_s": 0.001, "other_s": 0.1}

`mask_s` is the time of the library for all tokens: which may come next, and that one was chosen. `other_s` is the time
of everything else. All times are processor times. A form that the library refuses is answered with {"error": ...}.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from importlib.metadata import version
from typing import Any

sys.path.append(sys.argv[2])  # after the environment's own packages, which come first

import numpy as np
import torch
from numpy.typing import NDArray

from tests.harness.forms import CHARSET

END = len(CHARSET)  # the token that ends a text
VOCAB = END + 1
WORDS = (VOCAB + 31) // 32  # of 32 bits, in a mask of all tokens
_WIDTH, _HEADS, _LAYERS = 256, 4, 4

Mask = NDArray[np.int32]  # (B, WORDS): a bit for each token


class Transformer:
    """Four layers with random weights, which remember the keys and values of the tokens so far."""

    def __init__(self, longest: int) -> None:
        torch.manual_seed(0)
        self._embedding = torch.randn(VOCAB, _WIDTH)
        self._places = torch.randn(longest, _WIDTH)
        self._layers = [
            [torch.randn(_WIDTH, size * _WIDTH) * _WIDTH**-0.5 for size in (3, 1, 4)]
            + [torch.randn(4 * _WIDTH, _WIDTH) * (4 * _WIDTH) ** -0.5]
            for _ in range(_LAYERS)
        ]
        self._head = torch.randn(_WIDTH, VOCAB) * _WIDTH**-0.5
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin(self) -> None:
        """Forget all tokens."""
        self._cache = []

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read (B,) tokens, and return the (B, V) logits of the next ones."""
        place = self._cache[0][0].shape[2] if self._cache else 0
        x = self._embedding[tokens] + self._places[place]
        cache = []
        for layer, (qkv, out, up, down) in enumerate(self._layers):
            q, k, v = (
                part.view(len(tokens), _HEADS, 1, _WIDTH // _HEADS)
                for part in (torch.nn.functional.layer_norm(x, (_WIDTH,)) @ qkv).chunk(3, dim=1)
            )
            if self._cache:
                k, v = (torch.cat([before, now], dim=2) for before, now in zip(self._cache[layer], (k, v), strict=True))
            cache.append((k, v))
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + attended.reshape(len(tokens), _WIDTH) @ out
            x = x + torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (_WIDTH,)) @ up) @ down
        self._cache = cache
        logits: torch.Tensor = torch.nn.functional.layer_norm(x, (_WIDTH,)) @ self._head
        return logits


class Library(ABC):
    """A library with one form."""

    name: str  # of its package

    @abstractmethod
    def compile(self, kind: str, value: str) -> None:
        """Take the form of the next texts. Raises an error of any kind if it refuses it."""

    @abstractmethod
    def begin(self, num_texts: int) -> None:
        """Begin new texts."""

    @abstractmethod
    def fill(self, mask: Mask, text: int) -> None:
        """Set a text's row of the mask: the tokens that may come next."""

    @abstractmethod
    def advance(self, text: int, token: int) -> bool:
        """Add a token to a text, and return whether the text has ended by that."""


class LlGuidance(Library):
    """llguidance: matchers over bytes, in Rust."""

    name = "llguidance"

    def __init__(self) -> None:
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

        class Tokens:
            eos_token_id, bos_token_id = END, None
            tokens = [char.encode() for char in CHARSET] + [b"<|end|>"]
            special_token_ids = (END,)

            def __call__(self, text: str) -> list[int]:
                return [CHARSET.index(char) for char in text]

        self._matcher = LLMatcher
        self._tokenizer = LLTokenizer(TokenizerWrapper(Tokens()))

    def compile(self, kind: str, value: str) -> None:
        """See Library."""
        if kind == "regex":
            grammar = self._matcher.grammar_from_regex(value)
        else:
            grammar = self._matcher.grammar_from_json_schema(value, overrides={"whitespace_flexible": False})
        self._first = self._matcher(self._tokenizer, grammar, log_level=0)
        if self._first.is_error():
            raise ValueError(self._first.get_error())

    def begin(self, num_texts: int) -> None:
        """See Library."""
        self._matchers = [self._first.deep_copy() for _ in range(num_texts)]

    def fill(self, mask: Mask, text: int) -> None:
        """See Library."""
        self._matchers[text].unsafe_compute_mask_ptr(mask[text].ctypes.data, mask[text].nbytes)

    def advance(self, text: int, token: int) -> bool:
        """See Library."""
        self._matchers[text].consume_token(token)
        return bool(self._matchers[text].is_stopped())


class OutlinesCore(Library):
    """outlines-core: an index of tokens for each state of a regular expression, in Rust."""

    name = "outlines-core"

    def __init__(self) -> None:
        from outlines_core import Guide, Index, Vocabulary
        from outlines_core.json_schema import build_regex_from_schema

        self._guide, self._index, self._regex = Guide, Index, build_regex_from_schema
        self._vocabulary = Vocabulary(END, {char: [token] for token, char in enumerate(CHARSET)})

    def compile(self, kind: str, value: str) -> None:
        """See Library."""
        self._compiled = self._index(value if kind == "regex" else self._regex(value), self._vocabulary)

    def begin(self, num_texts: int) -> None:
        """See Library."""
        self._guides = [self._guide(self._compiled) for _ in range(num_texts)]

    def fill(self, mask: Mask, text: int) -> None:
        """See Library."""
        self._guides[text].write_mask_into(mask[text].ctypes.data, WORDS, 4)

    def advance(self, text: int, token: int) -> bool:
        """See Library."""
        if token != END:
            self._guides[text].advance(token, return_tokens=False)
        return token == END


class LmFormatEnforcer(Library):
    """lm-format-enforcer: a parser of characters, in Python."""

    name = "lm-format-enforcer"

    def __init__(self) -> None:
        import lmformatenforcer

        library = lmformatenforcer
        self._regex, self._schema, self._enforcer = library.RegexParser, library.JsonSchemaParser, library.TokenEnforcer
        tokens = [(token, char, False) for token, char in enumerate(CHARSET)]
        self._tokens = library.TokenEnforcerTokenizerData(
            tokens, lambda ids: "".join(CHARSET[one] for one in ids if one < END), END, True, VOCAB
        )

    def compile(self, kind: str, value: str) -> None:
        """See Library."""
        parser = self._regex(value) if kind == "regex" else self._schema(json.loads(value))
        self._one = self._enforcer(self._tokens, parser)
        self._one.get_allowed_tokens([])  # most is done when it is needed

    def begin(self, num_texts: int) -> None:
        """See Library."""
        self._texts: list[list[int]] = [[] for _ in range(num_texts)]

    def fill(self, mask: Mask, text: int) -> None:
        """See Library."""
        mask[text] = self._one.get_allowed_tokens(self._texts[text]).allowed_tokens.numpy()

    def advance(self, text: int, token: int) -> bool:
        """See Library."""
        self._texts[text].append(token)
        return token == END


class XGrammar(Library):
    """xgrammar: a pushdown automaton over bytes, in C++."""

    name = "xgrammar"

    def __init__(self) -> None:
        import xgrammar

        self._library = xgrammar
        vocabulary = [char.encode() for char in CHARSET] + [b"<|end|>"]
        tokens = xgrammar.TokenizerInfo(vocabulary, vocab_size=VOCAB, stop_token_ids=[END])
        self._compiler = xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False)

    def compile(self, kind: str, value: str) -> None:
        """See Library."""
        if kind == "regex":
            self._compiled = self._compiler.compile_regex(value)
        else:
            self._compiled = self._compiler.compile_json_schema(value, any_whitespace=False)

    def begin(self, num_texts: int) -> None:
        """See Library."""
        self._matchers = [self._library.GrammarMatcher(self._compiled) for _ in range(num_texts)]

    def fill(self, mask: Mask, text: int) -> None:
        """See Library."""
        self._matchers[text].fill_next_token_bitmask(torch.from_numpy(mask), text)

    def advance(self, text: int, token: int) -> bool:
        """See Library."""
        self._matchers[text].accept_token(token)
        return bool(self._matchers[text].is_terminated())


LIBRARIES: dict[str, type[Library]] = {one.name: one for one in (LlGuidance, OutlinesCore, LmFormatEnforcer, XGrammar)}


class Run:
    """Texts of one form, and how long they took."""

    def __init__(self, library: Library, model: Transformer) -> None:
        self._library, self._model = library, model
        self.num_tokens, self.mask_s, self.other_s = 0, 0.0, 0.0

    def texts(self, num_texts: int, limit: int) -> tuple[list[str], list[bool]]:
        """Generate texts of at most `limit` characters. Return them, and whether each was ended by the library."""
        self._library.begin(num_texts)
        self._model.begin()
        texts, ended = [""] * num_texts, [False] * num_texts
        tokens, mask = torch.zeros(num_texts, dtype=torch.int64), np.full((num_texts, WORDS), -1, np.int32)
        for _ in range(limit):
            if all(ended):
                break
            began = time.thread_time()
            logits = self._model.step(tokens)
            stepped = time.thread_time()
            open_texts = [text for text in range(num_texts) if not ended[text]]
            for text in open_texts:
                self._library.fill(mask, text)
            allowed = np.unpackbits(mask.view(np.uint8), axis=1, count=VOCAB, bitorder="little").astype(np.bool_)
            allowed[ended] = True
            logits[~torch.from_numpy(allowed)] = -torch.inf
            filled = time.thread_time()
            tokens = torch.multinomial(torch.softmax(logits, dim=1), 1)[:, 0]
            chosen = tokens.tolist()
            drawn = time.thread_time()
            for text in open_texts:
                token = chosen[text]
                ended[text] = self._library.advance(text, token)
                if token != END:
                    texts[text] += CHARSET[token]
            advanced = time.thread_time()
            self.num_tokens += len(open_texts)
            self.mask_s += filled - stepped + advanced - drawn
            self.other_s += stepped - began + drawn - filled
        return texts, ended


def answer(library: Library, model: Transformer, question: dict[str, Any]) -> dict[str, Any]:
    """Generate texts of a form."""
    began = time.process_time()
    try:
        library.compile(question["kind"], question["value"])
    except BaseException as error:  # noqa: BLE001 a panic of Rust is no Exception
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    compiled = time.process_time()
    run = Run(library, model)
    try:
        found = [run.texts(question["num_texts"], limit) for limit in question["limits"]]
    except BaseException as error:  # noqa: BLE001 as above
        return {"error": f"while it generates: {type(error).__name__}: {str(error)[:200]}"}
    return {
        "compile_ms": 1000 * (compiled - began),
        "texts": [texts for texts, _ in found],
        "ended": [ended for _, ended in found],
        "num_tokens": run.num_tokens,
        "mask_s": run.mask_s,
        "other_s": run.other_s,
    }


def main() -> None:
    """Answer the documents on standard input until it ends. The first line of output is the library's version."""
    torch.set_num_threads(1)
    library, model = LIBRARIES[sys.argv[1]](), Transformer(1024)
    print(json.dumps({"version": version(library.name)}), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps(answer(library, model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
