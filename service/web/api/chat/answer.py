"""The answer to a chat in OpenAI's shape: that of its completion, in other words."""

from __future__ import annotations

import json
from collections.abc import Iterator

from service.generation.completion import Completion, CompletionChunk
from service.model.chat_template import ChatTemplate
from service.registry.loaded_models import LoadedModel
from service.web.api.completions.answer import CompletionAnswer, answer_head
from service.web.api.completions.schemas import StreamOptions
from service.web.api.events import TextEvent
from service.web.api.json_pieces import chat_logprobs_pieces, dumps
from service.web.api.sse import FLUSH_INTERVAL_S, IDLE_S

_FINGERPRINT_CHARS = 8  # of the template's sum


class ChatAnswer(CompletionAnswer):
    """The answer to one chat."""

    def __init__(self, model: LoadedModel, completion: Completion, template: ChatTemplate) -> None:
        # The template decides what the model reads, so it belongs to what has to be equal for equal texts.
        fingerprint = f"{model.fingerprint}_{template.digest[:_FINGERPRINT_CHARS]}"
        super().__init__(model, completion, states=None, head=answer_head(model, "chatcmpl", fingerprint))

    def _pieces(self, pieces: list[list[CompletionChunk]]) -> Iterator[str]:
        completion = self._completion
        yield dumps(self._common_fields)[:-1] + ',"choices":['
        for choice in completion.choices:
            parts, pieces[choice.index] = pieces[choice.index], []
            text, scores = "".join(part.text for part in parts), self._scores_of(parts)
            parts.clear()
            message = dumps({"role": "assistant", "content": text, "refusal": None})
            yield f'{"," if choice.index else ""}{{"index":{choice.index},"message":{message},"logprobs":'
            yield from chat_logprobs_pieces(text, scores, self._charset, has_form=self._has_form)
            yield f',"finish_reason":"{choice.finish_reason}"}}'
        yield f'],"usage":{self._usage().model_dump_json()}}}'

    def _text_events(self, options: StreamOptions) -> Iterator[TextEvent | None]:
        head, tail = self._head, ', "usage": null}' if options.include_usage else "}"
        begun: set[int] = set()
        for item in self._completion.chunks(FLUSH_INTERVAL_S, IDLE_S):
            if item is None:
                yield None
                continue
            choice, piece = item
            role = "" if choice.index in begun else '"role": "assistant", '
            begun.add(choice.index)
            index, text = choice.index, json.dumps(piece.text)
            scores = "".join(chat_logprobs_pieces(piece.text, piece.scores, self._charset, has_form=self._has_form))
            if options.continuous_usage_stats:
                tail = f', "usage": {self._usage().model_dump_json()}}}'
            reason = f'"{choice.finish_reason}"' if choice.is_over else "null"
            yield TextEvent(
                f'{head}, "choices": [{{"index": {index}, "delta": {{{role}"content": {text}}}, "logprobs": {scores}, '
                f'"finish_reason": {reason}}}]{tail}'
            )

    @property
    def _head(self) -> str:
        return json.dumps(self._common_fields | {"object": "chat.completion.chunk"})[:-1]
