"""The hyperparameters of a training run. Together with the corpus they determine the result."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.config import JsonDict

from service.model.charset import UnknownChars

# Marks a field that `recipe` chooses by the size of the text if it is not given. The default suits a million
# characters.
_CHOSEN: JsonDict = {"shown_default": "chosen by the size of the text"}


class Hyperparameters(BaseModel):
    """Everything that can be set for a training run; each field is an option of `gru-serve train`.

    The defaults are the sizes of the TensorFlow tutorial "Text generation with an RNN", with the regularisation that a
    GRU of this size needs on a text of a million characters. `gru-serve train` replaces some of them by what suits the
    size of the text, see `recipe.choose`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    embedding_dim: int = Field(256, ge=1, le=4096, description="Size of the embedding of a character.")
    num_units: int = Field(
        1024,
        ge=1,
        le=8192,
        description="GRU units, which is the size of a layer's hidden state.",
        json_schema_extra=_CHOSEN,
    )
    num_layers: int = Field(1, ge=1, le=8, description="GRU layers.")
    batch_size: int = Field(
        64,
        ge=1,
        le=4096,
        description="Streams of text that are read side by side.",
        json_schema_extra=_CHOSEN,
    )
    sequence_length: int = Field(
        100,
        ge=1,
        le=4096,
        description="Characters that each stream reads, and backpropagates through, in an update.",
        json_schema_extra=_CHOSEN,
    )
    restart_interval: int = Field(
        500,
        ge=0,
        description="Mean number of characters between random places at which a stream's state becomes zero, so that "
        "the model learns to begin with a short prompt; 0 for no such places.",
        json_schema_extra=_CHOSEN,
    )
    epochs: int = Field(30, ge=1, le=10_000, description="Passes over the training text.", json_schema_extra=_CHOSEN)
    max_chars: int = Field(
        0,
        ge=0,
        description="Characters that are read in training at most, by whose end the learning rate has fallen; 0 for no "
        "limit but --epochs.",
    )
    learning_rate: float = Field(2e-3, gt=0, le=1, description="Peak learning rate of AdamW.")
    final_rate: float = Field(0.03, ge=0, le=1, description="Learning rate at the end, as a fraction of the peak.")
    warmup_steps: int = Field(
        100,
        ge=0,
        description="Updates in which the learning rate rises to its peak.",
        json_schema_extra=_CHOSEN,
    )
    weight_decay: float = Field(
        1.0,
        ge=0,
        le=10,
        description="AdamW's decoupled weight decay. It does not apply to biases.",
        json_schema_extra=_CHOSEN,
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient.")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW's decay of the mean squared gradient.")
    clip_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm if theirs is larger.")
    input_dropout: float = Field(
        0.1, ge=0, lt=1, description="Dropout rate of the input embeddings.", json_schema_extra=_CHOSEN
    )
    recurrent_dropout: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="Dropout rate of the recurrent weights, with one mask for a whole update.",
        json_schema_extra=_CHOSEN,
    )
    output_dropout: float = Field(
        0.4, ge=0, lt=1, description="Dropout rate of every layer's output.", json_schema_extra=_CHOSEN
    )
    average_decay: float = Field(
        0.99, ge=0, lt=1, description="Decay of the moving average of the weights; 0 turns averaging off."
    )
    validation_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Fraction of the text that is held out for validation: the end of each document, or with --lines "
        "lines from everywhere.",
    )
    validation_chars: int = Field(
        200_000, ge=2, description="Most characters that are held out, because reading them takes time."
    )
    eval_interval: int = Field(
        0,
        ge=0,
        description="Updates between two evaluations; 0 evaluates once an epoch.",
        json_schema_extra=_CHOSEN,
    )
    patience: int = Field(
        0,
        ge=0,
        description="Stop after this many evaluations without an improvement; 0 never stops early.",
        json_schema_extra=_CHOSEN,
    )
    seed: int = Field(
        1, ge=0, lt=2**63, description="Determines initial weights, dropout and where each epoch starts in the text."
    )
    threads: int = Field(
        0, ge=0, le=256, description="CPU threads; 0 uses one for each core. Results depend slightly on the number."
    )
    lines: bool = Field(
        False,
        description="Each line is a text of its own, such as a name: the state starts from zero at each. Empty lines "
        "are left out.",
    )
    keep_newlines: bool = Field(False, description="Leave line ends of CR LF and CR as they are.")
    charset: str = Field("", description="The characters that the model knows; empty takes those of the text.")
    unknown_chars: UnknownChars = Field(
        "error", description="What happens to characters of the text that are not in the charset."
    )
    min_count: int = Field(
        0,
        ge=0,
        description="Leave characters that occur fewer times out of the charset. They are folded to similar characters "
        "where there are some, and otherwise, or with --unknown-chars drop, left out.",
    )
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Number format of large matrix products; auto takes bfloat16 if it is clearly faster here, which "
        "is measured at the start.",
    )

    def num_updates(self, num_chars: int) -> int:
        """Return the updates of a whole run on this number of training characters, unless it stops early."""
        num_updates = self.epochs * windows_per_epoch(num_chars, self.batch_size, self.sequence_length)
        if self.max_chars:
            num_updates = min(num_updates, windows_per_epoch(self.max_chars, self.batch_size, self.sequence_length))
        return num_updates

    @field_validator("restart_interval")
    @classmethod
    def _leaves_something_to_predict(cls, value: int) -> int:
        if value == 1:
            raise ValueError("must be 0, or 2 or more, because nothing is predicted at a restart")
        return value


# The fields that `recipe.choose` chooses if they are not given.
CHOSEN = tuple(name for name, field in Hyperparameters.model_fields.items() if field.json_schema_extra is _CHOSEN)


def windows_per_epoch(num_chars: int, batch: int, steps: int) -> int:
    """Return the number of updates in which `batch` streams read a text, `steps` characters each in an update."""
    return -(-num_chars // (batch * steps))
