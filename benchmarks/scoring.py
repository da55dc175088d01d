"""Measures scores of candidates and suggestions in a session, over HTTP.

    python -m benchmarks.scoring [--rounds 30] [--json FILE]

A session has a text of 1,000 characters. Its client has one connection, and the server nothing else to do.

- score: one call with 100 candidates of 12 characters, compared with 100 calls of one candidate each, in turns: texts
  that the model writes, which share beginnings, and random letters, which share few.
- suggest: one call for the 5 likeliest words, after each of 20 beginnings of a text.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.http import percentile
from benchmarks.pairs import in_turns
from benchmarks.table import machine, summary
from tests.harness.server import SERVE, serving

NUM_CANDIDATES, NUM_CHARS, NUM_PROMPT = 100, 12, 1000
NUM_PLACES = 20  # after which words are suggested
LETTERS = "abcdefghijklmnopqrstuvwxyz    "
ENVIRONMENT = {"GRU_SERVE_RATE_LIMIT": ""}


class Caller:
    """A client of one session, on one connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self.text = self._call("/v1/completions", prompt="ROMEO:", max_tokens=NUM_PROMPT - 6, seed=7, echo=True)
        self.text = self.text["choices"][0]["text"]
        self._path = f"/v1/sessions/{self._call('/v1/sessions', text=self.text)['id']}"

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def sampled(self) -> list[str]:
        """Return candidates that the model writes after the text."""
        found: set[str] = set()
        for seed in range(1000):
            answer = self._call("/v1/completions", prompt=self.text, max_tokens=NUM_CHARS, n=64, seed=seed)
            found |= {choice["text"] for choice in answer["choices"]}
            if len(found) >= NUM_CANDIDATES:
                break
        return sorted(found)[:NUM_CANDIDATES]

    def score_ms(self, candidates: list[str], size: int) -> float:
        """Score candidates, `size` in a call, and return the milliseconds that all of them took."""
        started = time.perf_counter()
        for start in range(0, len(candidates), size):
            self._call(f"{self._path}/score", candidates=candidates[start : start + size])
        return 1000 * (time.perf_counter() - started)

    def suggest_ms(self) -> list[float]:
        """Suggest words after beginnings of a line, and return the milliseconds of each call."""
        times = []
        for place in range(NUM_PLACES):
            started = time.perf_counter()
            answer = self._call(f"{self._path}/suggest", n=5, prompt=self.text[: 7 * place])
            times.append(1000 * (time.perf_counter() - started))
            if not answer["exact"]:
                print("a search ended early")
        return times

    def _call(self, path: str, **body: object) -> Any:
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        answer = json.load(response)
        if response.status >= 400:
            raise RuntimeError(f"{path}: {answer['error']['message']}")
        return answer


def main() -> None:
    """Measure, and print each figure with its target."""
    parser = argparse.ArgumentParser(description="Measure scores of candidates and suggestions.")
    parser.add_argument("--rounds", type=int, default=30, help="number of rounds  [30]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    figures: dict[str, object] = {"machine": machine()}
    chance = random.Random(1)
    with serving(SERVE, ENVIRONMENT) as server, closing(Caller(server.port)) as caller:
        letters = ["".join(chance.choices(LETTERS, k=NUM_CHARS)) for _ in range(NUM_CANDIDATES)]
        for name, candidates in (("written by the model", caller.sampled()), ("random letters", letters)):
            together, single = in_turns(
                [partial(caller.score_ms, candidates, NUM_CANDIDATES), partial(caller.score_ms, candidates, 1)],
                options.rounds,
            )
            ratios = [slow / fast for slow, fast in zip(single, together, strict=True)]
            print(
                f"score of {NUM_CANDIDATES} candidates, {name}: p50 {statistics.median(together):.1f} ms (target: "
                f"under 5), least {min(together):.1f} ms; {statistics.median(ratios):.1f} times as fast as single "
                "calls (target: at least 10)"
            )
            figures[name] = {"together_ms": summary(together), "single_ms": summary(single), "ratio": summary(ratios)}
        times = [time for round_ in in_turns([caller.suggest_ms], options.rounds)[0] for time in round_]
        print(
            f"suggest of 5 words: p50 {percentile(times, 50):.1f} ms (target: under 10), p90 "
            f"{percentile(times, 90):.1f} ms, least {min(times):.1f} ms"
        )
        figures["suggest_ms"] = summary(times) | {"p90": percentile(times, 90)}
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
