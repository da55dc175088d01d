"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from flask import Response

from service.arrays import Float32, Ids
from service.engine.prefix_cache import CacheScope
from service.errors import InvalidValue, Overloaded, plural
from service.generation.embedding import embed
from service.generation.reader import ids_of
from service.registry.loaded_models import LoadedModel, LoadedModels
from service.shares import SharedBudget, current_client
from service.web.api.completions.routes import CompletionLimits
from service.web.api.embeddings import schemas
from service.web.api.embeddings.schemas import EmbeddingsBody
from service.web.api.json_pieces import dumps
from service.web.api.resource import Resource
from service.web.api.responses import json_response
from service.web.api.schemas import ERRORS
from service.web.api.sse import client_monitor
from service.web.gate.access import current_owner
from service.web.gate.admission import AdmissionLimit
from service.web.gate.route import Route


class EmbeddingRoutes(Resource):
    """The route of embeddings."""

    name = "embeddings"
    errors = ERRORS

    def __init__(
        self,
        models: LoadedModels,
        default_model: str,
        limits: CompletionLimits,
        admission: AdmissionLimit,
        number_budget: SharedBudget,
    ) -> None:
        """number_budget: of numbers that all answers together may have in memory."""
        self._models, self._default_model, self._limits, self._admission = models, default_model, limits, admission
        self._number_budget = number_budget

    @Route(
        "POST",
        "/v1/embeddings",
        "Return a vector for each text",
        {"200": schemas.EmbeddingsAnswer},
        starts_work=True,
        counts_as_start=True,
    )
    def create(self, body: EmbeddingsBody) -> Response:
        """Read each text, and return the state of the network's top layer after it as a vector of length 1.

        The vector of a text is the same to the bit whichever texts are sent with it.
        """
        texts = body.texts
        _check_lengths(texts, self._limits.max_prompt_chars)
        with ExitStack() as held:
            held.enter_context(self._admission.admit())
            model = self._models.get(body.model or self._default_model)
            if body.dimensions not in (None, model.state_shape[1]):
                raise InvalidValue(
                    f"dimensions: the vectors of this model have {model.state_shape[1]} numbers, and are not shortened",
                    param="dimensions",
                )
            ids = [_ids_of(model, text, path, body) for path, text in texts]
            _check_lengths(
                [(path, part) for (path, _), part in zip(texts, ids, strict=True)], self._limits.max_prompt_chars
            )
            self._reserve(len(ids) * model.state_shape[1], held)
            scope = CacheScope(current_owner(), body.cache_salt or "")
            vectors = embed(model, ids, body.pooling, scope, self._limits.max_texts, client_monitor())
            return json_response(_pieces(model, vectors, body.encoding_format, sum(map(len, ids))), held)

    def _reserve(self, num_numbers: int, held: ExitStack) -> None:
        budget, client = self._number_budget, current_client()
        if num_numbers > budget.max_per_client:
            raise InvalidValue(
                f"input: these texts have vectors with {num_numbers} numbers together, and one client may have "
                f"{budget.max_per_client}: send fewer texts at a time",
                param="input",
            )
        if not budget.take(client, num_numbers):
            raise Overloaded(
                "the server computes as many vectors as it can, or as it can for you: try again in a second"
            )
        held.callback(budget.give_back, client, num_numbers)


def _check_lengths(texts: Sequence[tuple[str, str | list[int] | Ids]], max_chars: int) -> None:
    for path, text in texts:
        if not len(text):
            raise InvalidValue(f"{path}: there is no character that the model knows, so there is no state", param=path)
        if len(text) > max_chars:
            raise InvalidValue(f"{path}: at most {plural(max_chars, 'character')}, not {len(text)}", param=path)


def _ids_of(model: LoadedModel, text: str | list[int], path: str, body: EmbeddingsBody) -> Ids:
    if isinstance(text, str):
        try:
            return model.charset.encode(text, body.unknown_chars)
        except InvalidValue as error:
            error.param = path
            raise
    try:
        return ids_of(model.charset, text, path)
    except InvalidValue as error:
        raise InvalidValue(
            f"{error.message}; if these are tokens of another model, send text (LangChain's OpenAIEmbeddings does with "
            "check_embedding_ctx_length=False)",
            param=error.param,
        ) from None


def _pieces(model: LoadedModel, vectors: Float32, encoding_format: str, num_chars: int) -> Iterator[str]:
    yield '{"object":"list","data":['
    for place, vector in enumerate(vectors):
        if encoding_format == "base64":
            written = f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"'
        else:  # nine digits are all that float32 has
            written = f"[{','.join(f'{number:.9g}' for number in vector.tolist())}]"
        yield f'{"," if place else ""}{{"object":"embedding","index":{place},"embedding":{written}}}'
    usage = {"prompt_tokens": num_chars, "total_tokens": num_chars}
    yield f'],"model":{dumps(model.version.ref)},"usage":{dumps(usage)}}}'
