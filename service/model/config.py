"""The configuration of one model: everything that determines the names, shapes and dtypes of its weights."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from service.errors import InvalidCharset
from service.model.charset import MAX_CHARSET, Charset

Shape = tuple[int, ...]

_MAX_PARAMETERS = 2**28  # 1 GiB of float32


class ModelConfig(BaseModel):
    """A model's sizes and charset: the content of `config.json`.

    The limits bound the memory that a malicious file can make a loader allocate. They are far above any useful size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    architecture: Literal["embedding-gru-dense"] = "embedding-gru-dense"
    dtype: Literal["float32"] = "float32"
    charset: str = Field(min_length=1, max_length=MAX_CHARSET)  # the V characters; the index of each is its id
    embedding_dim: int = Field(ge=1, le=4096)  # E
    num_units: int = Field(ge=1, le=8192)  # H
    num_layers: int = Field(ge=1, le=8)  # L

    @field_validator("charset")
    @classmethod
    def _check_charset(cls, value: str) -> str:
        try:
            return Charset(value).characters
        except InvalidCharset as error:
            raise ValueError(error.message) from error

    @model_validator(mode="after")
    def _check_num_parameters(self) -> Self:
        if self.num_parameters > _MAX_PARAMETERS:
            raise ValueError(f"{self.num_parameters} parameters, at most {_MAX_PARAMETERS} are accepted")
        return self

    @property
    def vocab_size(self) -> int:
        """V: the number of characters that the model knows."""
        return len(self.charset)

    def tensor_shapes(self) -> dict[str, Shape]:
        """Return name -> shape of every weight. All are float32; gates are stacked r, z, n, as in torch."""
        vocab, units = self.vocab_size, self.num_units
        shapes: dict[str, Shape] = {"embedding.weight": (vocab, self.embedding_dim)}
        for layer in range(self.num_layers):
            inputs = self.embedding_dim if layer == 0 else units
            shapes[f"gru.weight_ih_l{layer}"] = (3 * units, inputs)
            shapes[f"gru.weight_hh_l{layer}"] = (3 * units, units)
            shapes[f"gru.bias_ih_l{layer}"] = (3 * units,)
            shapes[f"gru.bias_hh_l{layer}"] = (3 * units,)
        shapes["dense.weight"] = (vocab, units)
        shapes["dense.bias"] = (vocab,)
        return shapes

    @property
    def num_parameters(self) -> int:
        """The number of weights, counted as single numbers."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())
