"""The answer to a completion in OpenAI's shape: one JSON document, or a stream of events."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator

import structlog
from flask import Response

from service.engine.scores import Scores
from service.errors import GruServeError
from service.generation.completion import Completion, CompletionChunk
from service.model.charset import Charset
from service.registry.loaded_models import LoadedModel
from service.web.api.completions import schemas
from service.web.api.events import DoneEvent, ErrorEvent, Events, TextEvent, UsageEvent
from service.web.api.schemas import Logprobs, PromptTokensDetails, Usage
from service.web.api.sse import FLUSH_INTERVAL_S, IDLE_S
from service.web.gate.error_responses import error_response, stream_body_of

log = structlog.get_logger(__name__)


class CompletionAnswer:
    """The answer to one completion, in OpenAI's shape."""

    def __init__(self, model: LoadedModel, completion: Completion) -> None:
        self._charset, self._completion = model.charset, completion
        # The fields that are the same in every event of a stream.
        self._common_fields = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.version.ref,
            "system_fingerprint": model.fingerprint,
        }

    def whole(self, client_has_left: Callable[[], bool]) -> Response:
        """Wait until everything is generated, and return one JSON answer. Raises EngineFailed.

        If `client_has_left()` returns true meanwhile, the answer is the error `client_gone`, for logs and metrics.
        """
        completion = self._completion
        pieces: list[list[CompletionChunk]] = [[] for _ in completion.choices]
        for item in completion.chunks(None, IDLE_S):
            if item is not None:
                pieces[item[0].index].append(item[1])
            elif client_has_left():
                return error_response("the client has closed the connection", "client_gone")
        chosen = [choice for group in completion.chosen() for choice in group]
        choices = []
        for index, choice in enumerate(chosen):
            parts = pieces[choice.index]
            scores = [part.scores for part in parts if part.scores is not None]
            text = "".join(part.text for part in parts)
            logprobs = logprobs_of(text, Scores.join(scores), self._charset, 0) if scores else self._no_scores()
            choices.append(
                schemas.Choice(index=index, text=text, logprobs=logprobs, finish_reason=choice.finish_reason)
            )
        answer = schemas.CompletionAnswer(**self._common_fields, choices=choices, usage=self._usage())
        return Response(answer.model_dump_json(), mimetype="application/json")

    def events(self, client_has_left: Callable[[], bool], with_usage: bool) -> Events:
        """Yield the events of a stream, and None whenever there was nothing to send for `IDLE_S`.

        `with_usage` adds an event with the usage before the last one. An error becomes the last event.
        """
        completion, started = self._completion, time.perf_counter()
        ending = "left"
        try:
            for event in self._text_events(with_usage):
                if event is None and client_has_left():
                    return
                yield event
            if with_usage:
                yield UsageEvent(f'{self._head}, "choices": [], "usage": {self._usage().model_dump_json()}}}')
            yield DoneEvent("[DONE]")
            ending = "done"
        except GruServeError as error:
            ending = error.code
            yield ErrorEvent(stream_body_of(error))
        finally:
            log.info(
                "stream ended",
                ending=ending,
                num_generated=completion.num_generated,
                duration_ms=round((time.perf_counter() - started) * 1000, 2),
            )

    def _text_events(self, with_usage: bool) -> Iterator[TextEvent | None]:
        # The JSON is assembled by hand: to dump the common fields in every event took a fifth of a busy stream's time.
        head, tail = self._head, ', "usage": null}' if with_usage else "}"
        num_sent = [0] * len(self._completion.choices)  # characters, of each choice
        for item in self._completion.chunks(FLUSH_INTERVAL_S, IDLE_S):
            if item is None:
                yield None
                continue
            choice, piece = item
            index, text = choice.index, json.dumps(piece.text)
            logprobs = logprobs_of(piece.text, piece.scores, self._charset, num_sent[index])
            num_sent[index] += len(piece.text)
            reason = f'"{choice.finish_reason}"' if choice.is_over else "null"
            scores = logprobs.model_dump_json() if logprobs is not None else "null"
            yield TextEvent(
                f'{head}, "choices": [{{"index": {index}, "text": {text}, "logprobs": {scores}, '
                f'"finish_reason": {reason}}}]{tail}'
            )

    @property
    def _head(self) -> str:
        """The common fields as the beginning of a JSON object."""
        return json.dumps(self._common_fields)[:-1]

    def _usage(self) -> Usage:
        completion = self._completion
        return Usage(
            prompt_tokens=completion.num_prompt,
            completion_tokens=completion.num_generated,
            total_tokens=completion.num_prompt + completion.num_generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=completion.num_cached),
        )

    def _no_scores(self) -> Logprobs | None:
        """Return the log-probabilities of an empty text, or None if none were requested."""
        if self._completion.request.num_logprobs is None:
            return None
        return Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])


def logprobs_of(text: str, scores: Scores | None, charset: Charset, offset: int) -> Logprobs | None:
    """Return the log-probabilities of a text's characters in OpenAI's shape, or None without scores.

    `offset` is the position of the text's first character in the whole text.
    """
    if scores is None:
        return None
    chosen = [None if math.isnan(value) else value for value in scores.chosen.tolist()]
    tops: list[dict[str, float] | None] = []
    if scores.top_ids.shape[1]:
        for char, value, ids, values in zip(text, chosen, scores.top_ids.tolist(), scores.top.tolist(), strict=True):
            top = {charset.characters[char_id]: logprob for char_id, logprob in zip(ids, values, strict=True)}
            tops.append(None if value is None else top | {char: value})
    return Logprobs(
        tokens=list(text),
        token_logprobs=chosen,
        top_logprobs=tops or None,
        text_offset=list(range(offset, offset + len(text))),
    )
