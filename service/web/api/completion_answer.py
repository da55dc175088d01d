"""The answer to a completion in OpenAI's shape: one JSON document, or a stream of events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator

import structlog
from flask import Response

from service.engine.scores import Scores
from service.errors import ClientGone, GruServeError
from service.generation.completion import Completion, CompletionChunk
from service.registry.loaded_models import LoadedModel
from service.web.api import schemas
from service.web.api.json_pieces import dumps, json_response, logprobs_pieces
from service.web.api.sse import FLUSH_INTERVAL_S, IDLE_S, event
from service.web.gate.error_responses import body_of

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

    def whole(self, client_has_left: Callable[[], bool], on_close: Callable[[], None]) -> Response:
        """Wait until everything is generated, and return one JSON answer.

        `on_close`: see `json_response`. Raises EngineFailed, and ClientGone if `client_has_left()` returns true
        meanwhile.
        """
        completion = self._completion
        pieces: list[list[CompletionChunk]] = [[] for _ in completion.choices]
        for item in completion.chunks(None, IDLE_S):
            if item is not None:
                pieces[item[0].index].append(item[1])
            elif client_has_left():
                raise ClientGone("the client has closed the connection")
        return json_response(self._pieces(pieces), on_close)

    def _pieces(self, pieces: list[list[CompletionChunk]]) -> Iterator[str]:
        """Yield one JSON document from the parts of each choice, which are dropped when they were written."""
        completion = self._completion
        yield dumps(self._common_fields)[:-1] + ',"choices":['
        chosen = [choice for group in completion.chosen() for choice in group]
        for index, choice in enumerate(chosen):
            parts, pieces[choice.index] = pieces[choice.index], []
            text, scores = "".join(part.text for part in parts), self._scores_of(parts)
            parts.clear()
            yield f'{"," if index else ""}{{"index":{index},"text":{dumps(text)},"logprobs":'
            yield from logprobs_pieces(text, scores, self._charset, 0)
            yield f',"finish_reason":"{choice.finish_reason}"}}'
        yield f'],"usage":{self._usage().model_dump_json()}}}'

    def _scores_of(self, parts: list[CompletionChunk]) -> Scores | None:
        scores = [part.scores for part in parts if part.scores is not None]
        if not scores and self._completion.request.num_logprobs is not None:
            return Scores.none()
        return Scores.join(scores) if scores else None

    def events(self, client_has_left: Callable[[], bool], with_usage: bool) -> Iterator[bytes | None]:
        """Yield server-sent events, and None whenever there was nothing to send for `IDLE_S`.

        `with_usage` adds an event with the usage before `[DONE]`. An error becomes the last event.
        """
        # The JSON is assembled by hand: to dump the common fields in every event took a fifth of a busy stream's time.
        head = json.dumps(self._common_fields)[:-1]
        tail = ', "usage": null}' if with_usage else "}"
        completion, started = self._completion, time.perf_counter()
        num_sent = [0] * len(completion.choices)  # characters, of each choice
        ending = "left"
        try:
            for item in completion.chunks(FLUSH_INTERVAL_S, IDLE_S):
                if item is None:
                    if client_has_left():
                        return
                    yield None
                    continue
                choice, piece = item
                index, text = choice.index, json.dumps(piece.text)
                scores = "".join(logprobs_pieces(piece.text, piece.scores, self._charset, num_sent[index]))
                num_sent[index] += len(piece.text)
                reason = f'"{choice.finish_reason}"' if choice.is_over else "null"
                yield event(
                    f'{head}, "choices": [{{"index": {index}, "text": {text}, "logprobs": {scores}, '
                    f'"finish_reason": {reason}}}]{tail}'
                )
            if with_usage:
                yield event(f'{head}, "choices": [], "usage": {self._usage().model_dump_json()}}}')
            yield event("[DONE]")
            ending = "done"
        except GruServeError as error:
            ending = error.code
            yield event(json.dumps(body_of(error)), "error")
        finally:
            completion.cancel()
            log.info(
                "stream ended",
                ending=ending,
                num_generated=completion.num_generated,
                duration_ms=round((time.perf_counter() - started) * 1000, 2),
            )

    def _usage(self) -> schemas.Usage:
        completion = self._completion
        return schemas.Usage(
            prompt_tokens=completion.num_prompt,
            completion_tokens=completion.num_generated,
            total_tokens=completion.num_prompt + completion.num_generated,
            prompt_tokens_details=schemas.PromptTokensDetails(cached_tokens=completion.num_cached),
        )
