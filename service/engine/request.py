"""A request to the engine: one text to advance. It never changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from service.arrays import MAX_POSITION, Float32, Ids, is_state
from service.engine.automaton.automaton import Automaton
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.errors import InvalidValue, plural
from service.shares import current_client

_COUNTED_CHARS = 8192
_FEW_IDS = 64  # for fewer, `min` of a list is faster than that of an array


@dataclass(frozen=True, eq=False)
class Request:
    """One text to advance: read a prompt, then generate."""

    # (n,) int64 ids to read before anything is generated.
    prompt: Ids
    # Number of characters to generate.
    max_chars: int
    # The random number of a character depends on seed and position alone.
    seed: int
    sampling: SamplingSettings = PLAIN
    # Which characters may be generated after those that were, and where the text ends. None: any, and nowhere.
    automaton: Automaton | None = None
    # Characters until the text has to be complete: at least `max_chars`, which is less if this request generates only a
    # part of what may follow. None: `max_chars`.
    num_left: int | None = None
    # None of the first `min_chars` characters of `generated` and what this request generates completes a stop string.
    min_chars: int = 0
    # Score each generated character and this many likeliest ones. None for no scores.
    num_logprobs: int | None = None
    # Score the prompt's characters too. Needs num_logprobs.
    score_prompt: bool = False
    # (L, H) float32, the state after `position` characters; None for the zero state. Copied, not modified.
    hidden: Float32 | None = None
    # `hidden` came from this engine, unchanged, or was checked in an earlier request: its numbers are not checked.
    has_known_state: bool = False
    # Characters consumed before this request.
    position: int = 0
    # The prompt as penalties count it; None if that is `prompt`.
    history_prompt: Ids | None = None
    # (n,) int64 ids before `position` that an interrupted run generated. Penalties and the automaton count them, so
    # that this request continues the run exactly. None if there was no such run.
    generated: Ids | None = None
    # Positions, in rising order and above `position`, after which the state is copied.
    checkpoint_positions: tuple[int, ...] = ()
    # Report this many likeliest next characters when the text is finished. None for no report.
    num_next: int | None = None
    # For whom the text is advanced; see `shares`. It has no effect on the text.
    client: str = field(default_factory=current_client)

    @cached_property
    def chars_left(self) -> int:
        """Characters until the text has to be complete, at the beginning of this request."""
        return self.max_chars if self.num_left is None else self.num_left

    @cached_property
    def initial_state(self) -> int:
        """The automaton's state at the beginning of this request; -1 if it doesn't allow what was generated."""
        if self.automaton is None or self.generated is None:
            return 0
        return self.automaton.walk(0, self.generated.tolist())

    @cached_property
    def num_before(self) -> int:
        """Characters that the run had generated before this request."""
        return 0 if self.generated is None else len(self.generated)

    @cached_property
    def first_stop(self) -> int:
        """How many characters are drawn before one may complete a stop string; below 0 if that was long ago."""
        return self.min_chars - self.num_before

    def num_bytes(self, state_bytes: int, vocab_size: int) -> int:
        """Return the approximate memory until its end, without prompt and automaton, which requests may share.

        Counts states, penalties and results; of the results, as many characters as a reader that waits for the end
        usually lets accumulate.
        """
        history = 9 * vocab_size if self.sampling.penalizes else 0
        return (
            state_bytes * (2 + len(self.checkpoint_positions))
            + history
            + 8 * min(self.max_chars, _COUNTED_CHARS)
            + 2000
        )

    def check(self, shape: tuple[int, ...], vocab_size: int) -> None:
        """Raise InvalidValue unless a stepper can advance this text to its end.

        Args:
            shape: (L, H) of the model's states.
            vocab_size: V, the characters of the model.
        """
        if self.hidden is not None:
            check_state(self.hidden, shape, is_known=self.has_known_state)
        end = self.position + len(self.prompt) + self.max_chars
        if not 0 <= self.position <= end <= MAX_POSITION or self.max_chars < 0:
            raise InvalidValue(
                f"position: a text of {plural(self.position, 'character')} can't get "
                f"{len(self.prompt) + self.max_chars} more, "
                f"because a text has at most {MAX_POSITION}",
                param="position",
            )
        for ids in (self.prompt, self.history_prompt, self.generated):
            if ids is not None:
                check_ids(ids, vocab_size, "prompt")
        if self.num_left is not None and not self.max_chars <= self.num_left <= MAX_POSITION:
            raise InvalidValue("a text can't have to be complete before this part of it ends")
        if self.min_chars < 0:
            raise InvalidValue("min_tokens: a number of characters can't be negative", param="min_tokens")
        if self.sampling is not PLAIN:
            try:
                self.sampling.check()
            except ValueError as error:
                raise InvalidValue("a sampling setting is outside its limits") from error
            if any(char >= vocab_size for char, _ in self.sampling.logit_bias):
                raise InvalidValue("logit_bias: a character that the model doesn't have", param="logit_bias")
            if any(char >= vocab_size for char in self.sampling.allowed or ()):
                raise InvalidValue(
                    "allowed_token_ids: a character that the model doesn't have", param="allowed_token_ids"
                )
        if any(count is not None and count < 0 for count in (self.num_logprobs, self.num_next)):
            raise InvalidValue("logprobs: a number of characters can't be negative", param="logprobs")
        if any(a >= b for a, b in pairwise((self.position, *self.checkpoint_positions))):
            raise InvalidValue("the positions of checkpoints must rise, and be after the text's position")
        if self.automaton is not None:
            self._check_automaton(self.automaton, vocab_size)

    def _check_automaton(self, automaton: Automaton, vocab_size: int) -> None:
        if automaton.classes.shape != (vocab_size,) or not automaton.is_sound:
            raise InvalidValue("the automaton of a text has other characters than the model, or tables that don't fit")
        if automaton.transitions.shape[1] > vocab_size:
            raise InvalidValue("the automaton of a text has more classes than the model has characters")
        if not automaton.restricts:
            return
        state = self.initial_state
        if state < 0:
            raise InvalidValue("what was generated is not the beginning of a text of this form")
        if automaton.fewest[state] > self.chars_left:
            raise too_few_chars(automaton, self.num_before + self.chars_left)
        if self.sampling.allowed is not None:
            forbidden = np.ones(vocab_size, np.bool_)
            forbidden[[*self.sampling.allowed]] = False
            if (automaton.transitions[:, np.unique(automaton.classes[forbidden])] >= 0).any():
                raise InvalidValue("an automaton must not ask for characters that are not allowed")


def too_few_chars(automaton: Automaton, max_chars: int) -> InvalidValue:
    """Return the error of a text that may have `max_chars` characters, and needs more to follow an automaton."""
    return InvalidValue(
        f"max_tokens: a text of this form has at least {plural(int(automaton.fewest[0]), 'character')}, more "
        f"than the {max_chars} "
        "that it may have",
        param="max_tokens",
    )


def check_state(hidden: Float32, shape: tuple[int, ...], *, is_known: bool = False) -> None:
    """Raise InvalidValue unless an array is an (L, H) float32 state of a GRU: all its numbers are within -1 to 1.

    With `is_known` they were looked at before.
    """
    if hidden.shape != shape or hidden.dtype != np.float32 or not hidden.flags.c_contiguous:
        raise InvalidValue(f"the state of a text must be {shape} float32", param="state")
    if not is_known and not is_state(hidden):
        raise InvalidValue("the state of a text has a number outside -1 to 1, or not a number", param="state")


def check_ids(ids: Ids, vocab_size: int, param: str) -> None:
    """Raise InvalidValue, naming `param`, unless an array is (n,) integers from 0 to V - 1."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidValue(f"{param}: ids of characters must be (n,) integers", param=param)
    few = ids.tolist() if len(ids) <= _FEW_IDS else [int(ids.min()), int(ids.max())]
    if few and not 0 <= min(few) <= max(few) < vocab_size:
        raise InvalidValue(f"{param}: a character that the model doesn't have", param=param)
