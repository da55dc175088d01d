"""The body of POST /v1/embeddings, and of its answer.

Class docstrings and field descriptions are part of `/openapi.json`: they are written for users of the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from service.generation.embedding import Pooling
from service.model.charset import UnknownChars
from service.web.api.completions.schemas import kind_of_prompt
from service.web.api.known_fields import Anyway, Name, Only
from service.web.api.schemas import UNKNOWN_CHARS, Body, ModelRef

MAX_INPUTS = 2048
_Several = Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
_Ids = Annotated[list[int], Field(fail_fast=True)]  # the route checks them, and says more than a bound would
Input = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], _Several, Tag("texts")]
    | Annotated[list[int], Field(min_length=1, fail_fast=True), Tag("ids")]
    | Annotated[list[_Ids], _Several, Tag("texts of ids")],
    Discriminator(
        kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="must be a text, the ids of its characters, or a list of texts or of ids",
    ),
]
_TELLS_NOTHING = "it describes the request to other services"


class EmbeddingsBody(Body):
    """Body of POST /v1/embeddings."""

    other_names: ClassVar[Mapping[str, str]] = {"prompt": "input", "inputs": "input", "text": "input"}

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "shakespeare", "input": ["To be, or not to be", "Good morrow."]}}
    )

    input: Input = Field(description="a text, a list of up to 2,048 texts, or the same as ids of characters")
    model: ModelRef = Field(None, description="name, name@version or name@alias; default: the server's default model")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="how a vector is written: as a list of numbers, or its float32 numbers (little-endian)"
    )
    dimensions: int | None = Field(
        None, ge=1, description="accepted if it is the model's number of units, because no vector is shortened"
    )
    pooling: Pooling = Field(
        "last",
        description="the state after the text (`last`), or the mean of the states after each of its characters "
        "(`mean`); of the top layer",
    )
    unknown_chars: UnknownChars = Field("fold_drop", description=UNKNOWN_CHARS)
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="only texts with the same salt, of the same API key, share cached hidden states",
    )
    user: Annotated[Name | None, Anyway(_TELLS_NOTHING)] = None
    metadata: Annotated[dict[str, Any] | None, Anyway(_TELLS_NOTHING)] = None
    priority: Annotated[int | None, Anyway("clients share the engine equally")] = None
    add_special_tokens: Annotated[bool | None, Anyway("every token is a character of the text")] = None
    truncate_prompt_tokens: Annotated[
        int | None, Only("a text of any accepted length is read whole: send the part that counts", -1)
    ] = None

    def num_chars(self, _max_tokens: int, /) -> int:
        """See Body."""
        return sum(len(text) for _, text in self.texts)

    @property
    def texts(self) -> list[tuple[str, str | list[int]]]:
        """Each text, or its ids, after its path in the body."""
        sent = self.input
        if isinstance(sent, str) or isinstance(sent[0], int):
            return [("input", sent)]
        texts = cast("list[str | list[int]]", sent)
        return [(f"input[{place}]", text) for place, text in enumerate(texts)]


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(description="place of the text in `input`")
    embedding: list[float] | str = Field(description="numbers, or in base64; the length of the vector is 1")


class EmbeddingsUsage(BaseModel):
    """Number of characters that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """Answer of POST /v1/embeddings, in OpenAI's shape."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str = Field(description="name@version of the model that read the texts")
    usage: EmbeddingsUsage
