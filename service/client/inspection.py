"""What the network held while it read, as `Client.inspect` and `Session.inspect` answer it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Numbers:
    """float16 numbers, little-endian, the last axis varying fastest: `numpy.asarray` makes an array of them."""

    shape: tuple[int, ...]
    data: bytes

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"shape": self.shape, "typestr": "<f2", "data": self.data, "version": 3}

    @classmethod
    def read(cls, answer: dict[str, Any]) -> Numbers:
        """From the API's answer."""
        return cls(tuple(answer["shape"]), base64.b64decode(answer["data"]))


@dataclass(frozen=True)
class Inspection:
    """n characters from position start on, of a model with L layers of H units.

    states: (n, L, H), after each character; before: (L, H), before the first. reset, update, candidate: (n, L, H), the
    gates, if they were asked for. embedding: (n, E), the same. logprobs: of each character; top_logprobs: of the
    likeliest in its place, and of it; next: (character, log-probability) of what may follow the last.
    """

    model: str
    start: int
    text: str
    before: Numbers
    states: Numbers
    reset: Numbers | None
    update: Numbers | None
    candidate: Numbers | None
    embedding: Numbers | None
    logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    next: list[tuple[str, float]]
    state: str | None

    @classmethod
    def read(cls, answer: dict[str, Any]) -> Inspection:
        """From the API's answer."""
        gates = answer["gates"] or {}
        scores = answer["logprobs"] or {}
        return cls(
            model=answer["model"],
            start=answer["from"],
            text=answer["text"],
            before=Numbers.read(answer["before"]),
            states=Numbers.read(answer["states"]),
            **{name: Numbers.read(gates[name]) if gates else None for name in ("reset", "update", "candidate")},
            embedding=Numbers.read(answer["embedding"]) if answer["embedding"] is not None else None,
            logprobs=scores.get("token_logprobs", []),
            top_logprobs=scores.get("top_logprobs") or [],
            next=[(entry["char"], entry["logprob"]) for entry in answer["next"] or []],
            state=answer["state"],
        )
