"""Texts as ids and back, in vLLM's shapes, and the files with which other programs do the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flask import Response

from service.arrays import Ids
from service.errors import InvalidValue, plural
from service.model import hugging_face
from service.model.charset import Charset
from service.model.chat_template import ChatTemplate
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.store.model_store import Description
from service.web.api.chat.prompts import encode_chat, ending_of, find_template, read_messages
from service.web.api.chat.schemas import DEFAULT_UNKNOWN_CHARS, Message
from service.web.api.json_pieces import dumps
from service.web.api.resource import Resource, blaming
from service.web.api.schemas import ERRORS
from service.web.api.tokens import schemas
from service.web.gate.admission import AdmissionLimit
from service.web.gate.route import Route


class TokenRoutes(Resource):
    """The routes of tokens. A token is a character, and its id is its place in the charset."""

    name = "tokens"
    errors = ERRORS

    def __init__(
        self,
        models: LoadedModels,
        default_model: str,
        default_template: ChatTemplate | None,
        max_prompt_chars: int,
        max_tokens: int,
        admission: AdmissionLimit,
    ) -> None:
        """See ChatRoutes. max_prompt_chars, max_tokens: characters that one completion can read, and write."""
        self._models, self._default_model, self._admission = models, default_model, admission
        self._default_template = default_template
        self._max_prompt_chars, self._max_chars = max_prompt_chars, max_prompt_chars + max_tokens

    @Route(
        "POST",
        "/tokenize",
        "Encode a text or a chat as ids",
        {"200": schemas.TokenizeAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def tokenize(self, body: schemas.TokenizeBody) -> Response:
        """Return the ids of a text's characters, as the model reads the text: in Unicode's normal form C.

        Those of a chat are what POST /v1/chat/completions reads of it, as the version's chat template writes it.
        """
        if body.messages is not None:
            charset, ids = self._encoded_chat(body, body.messages)
        else:
            charset, ids = self._encoded_text(body, body.prompt or "")
        answer = {
            "count": len(ids),
            "max_model_len": self._max_chars,
            "tokens": ids.tolist(),
            "token_strs": list(charset.decode(ids)) if body.return_token_strs else None,
        }
        return _json(answer)

    @Route(
        "POST",
        "/detokenize",
        "Decode ids to a text",
        {"200": schemas.DetokenizeAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def detokenize(self, body: schemas.DetokenizeBody) -> Response:
        """Return the text of these ids. The inverse of `/tokenize`."""
        if len(body.tokens) > self._max_prompt_chars:
            raise InvalidValue(
                f"tokens: at most {plural(self._max_prompt_chars, 'id')}, not {len(body.tokens)}", param="tokens"
            )
        charset = self._model(body.model).charset
        return _json({"prompt": charset.decode(_checked(body.tokens, charset))})

    @Route("GET", "/tokenizer_info", "Describe a model's tokenizer", {"200": schemas.TokenizerInfo})
    def info(self, query: schemas.TokenizerQuery) -> Response:
        """Describe the tokenizer as `tokenizer_config.json` does, for clients such as lm-evaluation-harness."""
        return _json(self._config(self._models.describe(query.model or self._default_model)))

    @Route(
        "GET",
        "/v1/models/<id>/tokenizer.json",
        "Return a model's tokenizer for Hugging Face's libraries",
        {"200": schemas.TokenizerFile},
    )
    def tokenizer(self, path: schemas.TokenizerPath) -> Response:
        """Return a file that `tokenizers` loads, and `transformers` with `tokenizer_config.json` beside it.

        It encodes and decodes texts as `/tokenize` and `/detokenize` do.
        """
        return _json(hugging_face.tokenizer(Charset(self._models.describe(path.id, param="id").config.charset)))

    @Route(
        "GET",
        "/v1/models/<id>/tokenizer_config.json",
        "Return the file that belongs beside tokenizer.json",
        {"200": schemas.TokenizerInfo},
    )
    def tokenizer_config(self, path: schemas.TokenizerPath) -> Response:
        """Return what `transformers` reads beside `tokenizer.json`: the same as `/tokenizer_info`."""
        return _json(self._config(self._models.describe(path.id, param="id")))

    def _encoded_text(self, body: schemas.TokenizeBody, text: str) -> tuple[Charset, Ids]:
        if len(text) > self._max_prompt_chars:
            raise InvalidValue(
                f"prompt: at most {plural(self._max_prompt_chars, 'character')}, not {len(text)}", param="prompt"
            )
        charset = self._model(body.model).charset
        with blaming("prompt"):
            return charset, charset.encode(text, body.unknown_chars or "error")

    def _encoded_chat(self, body: schemas.TokenizeBody, sent: Sequence[Message]) -> tuple[Charset, Ids]:
        messages = read_messages(sent, self._max_prompt_chars)
        ending = ending_of(
            messages, begins_answer=body.add_generation_prompt, continues_last=body.continue_final_message
        )
        model = self._model(body.model)
        template, unknown = find_template(model, self._default_template), body.unknown_chars or DEFAULT_UNKNOWN_CHARS
        ids = encode_chat(model.charset, template, messages, ending, unknown, self._max_prompt_chars)
        return model.charset, ids

    def _model(self, ref: str | None) -> LoadedModel:
        with self._admission.admit():  # the thread may wait for the model
            return self._models.get(ref or self._default_model)

    def _config(self, description: Description) -> dict[str, Any]:
        return hugging_face.tokenizer_config(Charset(description.config.charset), self._max_chars)


def _checked(tokens: list[int], charset: Charset) -> Ids:
    """Return (n,) int64 ids. Raises InvalidValue for the first that the charset doesn't have."""
    for place, token in enumerate(tokens):
        if not 0 <= token < len(charset):
            raise InvalidValue(
                f"tokens[{place}]: no character has the id {token}: ids are 0 to {len(charset) - 1}",
                param=f"tokens[{place}]",
            )
    return np.array(tokens, np.int64)


def _json(answer: dict[str, Any]) -> Response:
    return Response(dumps(answer), mimetype="application/json")
