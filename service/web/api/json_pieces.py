"""JSON answers that are written in pieces, because they hold log-probabilities of up to millions of characters.

To write such an answer at once would hold the interpreter, and with it every other request, for seconds; and its
numbers would take ten times as much memory as the arrays from which they are written here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from service.arrays import Float32, Ids
from service.engine.scores import Scores
from service.model.charset import Charset

_DECIMALS = 7  # of a log-probability: float32 has no more
_PIECE_NUMBERS = 2048  # in one piece: about a millisecond of work


def dumps(value: Any) -> str:
    """Write a small value, such as a field of an answer."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def rounded(logprobs: Float32) -> list[float]:
    """Return log-probabilities as they are sent: the digits that float32 has and no others."""
    numbers: list[float] = np.round(logprobs.astype(np.float64), _DECIMALS).tolist()
    return numbers


def logprobs_pieces(
    text: str, scores: Scores | None, charset: Charset, offset: int, *, has_form: bool = False
) -> Iterator[str]:
    """Yield the log-probabilities of a text's characters in OpenAI's shape; `null` without scores.

    Args:
        text: The text.
        scores: Of its characters.
        charset: Of the model.
        offset: Position of the text's first character in the whole text.
        has_form: Also yield the log-probabilities among the characters that a form allowed.
    """
    if scores is None:
        yield "null"
        return
    size, num_top = len(text), scores.top_ids.shape[1]
    characters = charset.characters

    def chosen(part: slice) -> list[float | None]:
        return [None if value != value else value for value in rounded(scores.chosen[part])]

    def tops(part: slice) -> list[dict[str, float] | None]:
        likeliest = zip(scores.top_ids[part].tolist(), scores.top[part], strict=True)
        return [
            None
            if own is None
            else dict(zip(map(characters.__getitem__, ids), rounded(values), strict=True)) | {char: own}
            for char, own, (ids, values) in zip(text[part], chosen(part), likeliest, strict=True)
        ]

    yield '{"tokens":['
    yield from _list(size, _PIECE_NUMBERS, lambda part: list(text[part]))
    yield '],"token_logprobs":['
    yield from _list(size, _PIECE_NUMBERS, chosen)
    if num_top and size:
        yield '],"top_logprobs":['
        yield from _list(size, max(1, _PIECE_NUMBERS // (1 + num_top)), tops)
        yield '],"text_offset":['
    else:
        yield '],"top_logprobs":null,"text_offset":['
    yield from _list(size, _PIECE_NUMBERS, lambda part: list(range(offset + part.start, offset + part.stop)))
    if has_form:
        yield '],"allowed_logprobs":['
        yield from _list(size, _PIECE_NUMBERS, lambda part: _allowed(scores, part))
    yield "]}"


def chat_logprobs_pieces(
    text: str, scores: Scores | None, charset: Charset, *, has_form: bool = False
) -> Iterator[str]:
    """Yield the log-probabilities of a text's characters in the shape of OpenAI's chats; `null` without scores.

    has_form: Also yield the log-probability of each among the characters that a form allowed.
    """
    if scores is None:
        yield "null"
        return
    characters, num_top = charset.characters, scores.top_ids.shape[1]

    def token(char: str, logprob: float) -> dict[str, object]:
        return {"token": char, "logprob": logprob, "bytes": list(char.encode())}

    def tokens(part: slice) -> list[dict[str, object]]:
        likeliest = zip(scores.top_ids[part].tolist(), scores.top[part], strict=True)
        allowed = [{"allowed_logprob": one} for one in _allowed(scores, part)] if has_form else [{}] * len(text[part])
        return [
            token(char, own)
            | among
            | {"top_logprobs": list(map(token, map(characters.__getitem__, ids), rounded(values)))}
            for char, own, among, (ids, values) in zip(
                text[part], rounded(scores.chosen[part]), allowed, likeliest, strict=True
            )
        ]

    yield '{"content":['
    yield from _list(len(text), max(1, _PIECE_NUMBERS // (4 * (1 + num_top))), tokens)
    yield '],"refusal":null}'


def prompt_logprobs_pieces(prompt: Ids, scores: Scores, charset: Charset) -> Iterator[str]:
    """Yield the log-probabilities of a prompt's (n,) ids in vLLM's shape: for each place an object by ids."""
    characters, num_top = charset.characters, scores.top_ids.shape[1]

    def place(char_id: int, own: float, ids: list[int], values: Float32) -> dict[str, Any] | None:
        if own != own:
            return None
        found = {
            str(one): {"logprob": logprob, "rank": rank, "decoded_token": characters[one]}
            for rank, (one, logprob) in enumerate(zip(ids, rounded(values), strict=True), 1)
        }
        return {str(char_id): {"logprob": own, "rank": None, "decoded_token": characters[char_id]}} | found

    def places(part: slice) -> list[dict[str, Any] | None]:
        columns = prompt[part].tolist(), rounded(scores.chosen[part]), scores.top_ids[part].tolist(), scores.top[part]
        return [*map(place, *columns)]

    yield "["
    yield from _list(len(prompt), max(1, _PIECE_NUMBERS // (1 + num_top) // 4), places)
    yield "]"


def ids_pieces(ids: Ids) -> Iterator[str]:
    """Yield (n,) ids as a list."""
    yield "["
    yield from _list(len(ids), _PIECE_NUMBERS, lambda part: ids[part].tolist())
    yield "]"


def _allowed(scores: Scores, part: slice) -> list[float | None]:
    """Return the log-probabilities among the characters that a form allowed; None for those of a prompt."""
    if scores.allowed is None:
        return [None] * (part.stop - part.start)
    return [None if value != value else value for value in rounded(scores.allowed[part])]


def _list(size: int, step: int, values: Callable[[slice], list[Any]]) -> Iterator[str]:
    """Yield the elements of a list with `size` elements, without its brackets, `step` at a time."""
    for begin in range(0, size, step):
        part = dumps(values(slice(begin, min(begin + step, size))))[1:-1]
        yield part if begin == 0 else "," + part
