"""The answer to a completion in OpenAI's shape: one JSON document, or a stream of events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Literal, TypeAlias

import structlog
from flask import Response

from service.engine.scores import Scores
from service.errors import ClientGone, GruServeError
from service.generation.completion import Choice, Completion, CompletionChunk
from service.generation.portable_states import PortableStates
from service.registry.loaded_models import LoadedModel
from service.web.api.completions.schemas import StreamOptions
from service.web.api.events import DoneEvent, ErrorEvent, Events, TextEvent, UsageEvent
from service.web.api.json_pieces import dumps, ids_pieces, logprobs_pieces, prompt_logprobs_pieces
from service.web.api.responses import json_response
from service.web.api.schemas import Usage
from service.web.api.sse import FLUSH_INTERVAL_S, IDLE_S
from service.web.gate.error_responses import body_of

log = structlog.get_logger(__name__)

Head: TypeAlias = dict[str, str | int]


_OBJECTS = {"cmpl": "text_completion", "chatcmpl": "chat.completion"}


def answer_head(model: LoadedModel, kind: Literal["cmpl", "chatcmpl"], fingerprint: str | None = None) -> Head:
    """Return the fields that are the same in every event of an answer, under a new id.

    fingerprint: identifies what has to be equal for equal texts; None: the model alone.
    """
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "object": _OBJECTS[kind],
        "created": int(time.time()),
        "model": model.version.ref,
        "system_fingerprint": fingerprint or model.fingerprint,
    }


class CompletionAnswer:
    """The answer to one completion, in OpenAI's shape."""

    def __init__(
        self,
        model: LoadedModel,
        completion: Completion,
        states: PortableStates | None,
        *,
        with_ids: bool = False,
        head: Head | None = None,
    ) -> None:
        """Prepare the answer.

        Args:
            model: The model that generates it.
            completion: The continuations.
            states: Seals the states that the request wants; None if it can't want any.
            with_ids: Return the ids of prompts and texts too.
            head: The fields of `answer_head`, if they are not those of a completion.
        """
        self._model, self._states = model, states
        self._charset, self._completion, self._with_ids = model.charset, completion, with_ids
        self._has_form = completion.request.form is not None
        self._common_fields = head or answer_head(model, "cmpl")

    def whole(self, client_has_left: Callable[[], bool], held: ExitStack) -> Response:
        """Wait until everything is generated, and return one JSON answer.

        `held`: see `json_response`. Raises EngineFailed, and ClientGone if `client_has_left()` returns true
        meanwhile.
        """
        completion = self._completion
        pieces: list[list[CompletionChunk]] = [[] for _ in completion.choices]
        for item in completion.wholes(IDLE_S):
            if item is not None:
                pieces[item[0].index].append(item[1])
            elif client_has_left():
                raise ClientGone("the client has closed the connection")
        return json_response(self._pieces(pieces), held)

    def _pieces(self, pieces: list[list[CompletionChunk]]) -> Iterator[str]:
        """Yield one JSON document from the parts of each choice, which are dropped when they were written."""
        completion = self._completion
        yield dumps(self._common_fields)[:-1] + ',"choices":['
        chosen = [choice for group in completion.chosen() for choice in group]
        for index, choice in enumerate(chosen):
            parts, pieces[choice.index] = pieces[choice.index], []
            text, scores = "".join(part.text for part in parts), self._scores_of(parts)
            num_echoed = sum(part.num_echoed for part in parts)
            parts.clear()
            yield f'{"," if index else ""}{{"index":{index},"text":{dumps(text)},"logprobs":'
            yield from logprobs_pieces(text, scores, self._charset, 0, has_form=self._has_form)
            yield f',"finish_reason":"{choice.finish_reason}"'
            if completion.request.num_prompt_logprobs is not None:
                yield ',"prompt_logprobs":'
                yield from prompt_logprobs_pieces(
                    choice.prompt, Scores.join(choice.prompt_scores or [Scores.none()]), self._charset
                )
                choice.prompt_scores.clear()
            if self._with_ids:
                yield ',"prompt_token_ids":'
                yield from ids_pieces(choice.prompt)
                yield ',"token_ids":'
                yield from ids_pieces(self._charset.exact(text[num_echoed:]))
            yield f"{self._state_of(choice)}}}"
        yield f'],"usage":{self._usage().model_dump_json()}}}'

    def _scores_of(self, parts: list[CompletionChunk]) -> Scores | None:
        scores = [part.scores for part in parts if part.scores is not None]
        return Scores.join(scores) if scores else None

    def events(self, client_has_left: Callable[[], bool], options: StreamOptions) -> Events:
        """Yield the events of a stream, and None whenever there was nothing to send for `IDLE_S`.

        An error becomes the last event.
        """
        completion, started = self._completion, time.perf_counter()
        ending = "left"
        try:
            for event in self._text_events(options):
                if event is None and client_has_left():
                    return
                yield event
            if options.include_usage:
                yield UsageEvent(f'{self._head}, "choices": [], "usage": {self._usage().model_dump_json()}}}')
            yield DoneEvent("[DONE]")
            ending = "done"
        except GruServeError as error:
            ending = error.code
            yield ErrorEvent(body_of(error))
        finally:
            log.info(
                "stream ended",
                ending=ending,
                num_generated=completion.num_generated,
                duration_ms=round((time.perf_counter() - started) * 1000, 2),
            )

    def _text_events(self, options: StreamOptions) -> Iterator[TextEvent | None]:
        # The JSON is assembled by hand: to dump the common fields in every event took a fifth of a busy stream's time.
        head, tail = self._head, ', "usage": null}' if options.include_usage else "}"
        num_sent = [0] * len(self._completion.choices)  # characters, of each choice
        begun: set[int] = set()
        for item in self._completion.chunks(FLUSH_INTERVAL_S, IDLE_S):
            if item is None:
                yield None
                continue
            choice, piece = item
            index, text = choice.index, json.dumps(piece.text)
            scores = "".join(
                logprobs_pieces(piece.text, piece.scores, self._charset, num_sent[index], has_form=self._has_form)
            )
            ids = "".join(self._ids_of_event(choice, piece, is_first=index not in begun)) if self._with_ids else ""
            begun.add(index)
            num_sent[index] += len(piece.text)
            if options.continuous_usage_stats:
                tail = f', "usage": {self._usage().model_dump_json()}}}'
            reason = f'"{choice.finish_reason}"' if choice.is_over else "null"
            yield TextEvent(
                f'{head}, "choices": [{{"index": {index}, "text": {text}, "logprobs": {scores}, '
                f'"finish_reason": {reason}{ids}{self._state_of(choice)}}}]{tail}'
            )

    def _state_of(self, choice: Choice) -> str:
        """Return the field with the state after a choice's text; nothing before it is over, or if none is requested."""
        if choice.state is None or self._states is None:
            return ""
        sealed = self._states.seal(self._model, *choice.state, choice.handle.request.seed)
        return f', "state": "{sealed}"'

    def _ids_of_event(self, choice: Choice, piece: CompletionChunk, *, is_first: bool) -> Iterator[str]:
        if is_first:
            yield ', "prompt_token_ids": '
            yield from ids_pieces(choice.prompt)
        yield ', "token_ids": '
        yield from ids_pieces(self._charset.exact(piece.text[piece.num_echoed :]))

    @property
    def _head(self) -> str:
        """The common fields as the beginning of a JSON object."""
        return json.dumps(self._common_fields)[:-1]

    def _usage(self) -> Usage:
        completion = self._completion
        return Usage.of(completion.num_prompt, completion.num_generated, completion.num_cached)
