"""Every hyperparameter of a training run. With the corpus and the seed they fix the result."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.model.charset import UnknownChars


class Hyperparameters(BaseModel):
    """Defaults: the tutorial's sizes, and the regularisation that a GRU of this size needs on a small corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    embedding_dim: int = Field(256, ge=1, le=4096, description="numbers in the embedding of a character")
    num_units: int = Field(1024, ge=1, le=8192, description="GRU units: numbers in the hidden state of a layer")
    num_layers: int = Field(1, ge=1, le=8, description="GRU layers")
    batch_size: int = Field(64, ge=1, le=4096, description="streams of text read side by side")
    sequence_length: int = Field(100, ge=1, le=4096, description="characters between two updates (backpropagation)")
    epochs: int = Field(30, ge=1, le=10_000, description="passes over the training text")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="peak learning rate of AdamW")
    final_rate: float = Field(0.03, ge=0, le=1, description="learning rate at the end, as a fraction of the peak")
    warmup_steps: int = Field(100, ge=0, description="updates over which the learning rate rises to its peak")
    weight_decay: float = Field(1.0, ge=0, le=10, description="AdamW's decoupled weight decay, not on biases")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW's decay of the mean squared gradient")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    input_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the embedding of each character read")
    recurrent_dropout: float = Field(0.4, ge=0, lt=1, description="dropout on recurrent weights, one mask an update")
    output_dropout: float = Field(0.4, ge=0, lt=1, description="dropout on every layer's output")
    average_decay: float = Field(0.99, ge=0, lt=1, description="decay of the averaged weights; 0: no averaging")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of the text, from its end, held out")
    eval_interval: int = Field(0, ge=0, description="updates between evaluations; 0: once an epoch")
    patience: int = Field(0, ge=0, description="stop after this many evaluations without a better one; 0: never")
    seed: int = Field(1, ge=0, lt=2**63, description="fixes initial weights, dropout and the cutting of the text")
    threads: int = Field(0, ge=0, le=256, description="cores to use; 0: all. Another number rounds sums otherwise")
    charset: str = Field("", description="characters that the model shall know; empty: those of the text")
    unknown_chars: UnknownChars = Field(
        "error", description="what happens to characters of the text that the charset lacks"
    )
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="numbers inside large products; auto: bfloat16 where the processor has it"
    )
