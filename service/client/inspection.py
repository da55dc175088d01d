"""The states of the network, as `Client.inspect` and `Session.inspect` return them."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Float16Array:
    """An array that `numpy.asarray` can read. This module itself does not need numpy."""

    shape: tuple[int, ...]
    data: bytes  # little-endian float16; the last axis varies fastest

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"shape": self.shape, "typestr": "<f2", "data": self.data, "version": 3}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Float16Array:
        """Read an array of the API's response."""
        return cls(tuple(document["shape"]), base64.b64decode(document["data"]))


@dataclass(frozen=True)
class Inspection:
    """What the network computed for n characters of a text, with a model of L layers of H units."""

    model: str  # name@version
    start: int  # position of the first of the characters
    text: str  # the characters
    before: Float16Array  # (L, H), the state before the first character
    states: Float16Array  # (n, L, H), the state after each character
    reset: Float16Array | None  # (n, L, H), this gate and the next two are None unless gates were requested
    update: Float16Array | None  # (n, L, H)
    candidate: Float16Array | None  # (n, L, H)
    embedding: Float16Array | None  # (n, E), the embeddings of the characters; None unless they were requested
    logprobs: list[float]  # of each character; empty unless logprobs were requested
    top_logprobs: list[dict[str, float]]  # of each character and of the likeliest ones at its position
    next: list[tuple[str, float]]  # the likeliest characters after the last, with their log-probabilities
    state: str | None  # the portable state after the last character; None unless it was requested

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Inspection:
        """Read the API's response."""
        gates = document["gates"] or {}
        scores = document["logprobs"] or {}
        return cls(
            model=document["model"],
            start=document["from"],
            text=document["text"],
            before=Float16Array.from_json(document["before"]),
            states=Float16Array.from_json(document["states"]),
            **{
                name: Float16Array.from_json(gates[name]) if gates else None
                for name in ("reset", "update", "candidate")
            },
            embedding=Float16Array.from_json(document["embedding"]) if document["embedding"] is not None else None,
            logprobs=scores.get("token_logprobs", []),
            top_logprobs=scores.get("top_logprobs") or [],
            next=[(entry["char"], entry["logprob"]) for entry in document["next"] or []],
            state=document["state"],
        )
