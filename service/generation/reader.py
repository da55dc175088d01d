"""Steps the network over characters: what completions, sessions and the inspector have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from service.arrays import Float32, Ids
from service.engine.automaton.automaton import Automaton
from service.engine.automaton.stops import MAX_STOP_CHARS
from service.engine.handle import End, Handle, Snapshot
from service.engine.request import Request
from service.engine.sampling_settings import SamplingSettings
from service.engine.scores import Distribution, Scores
from service.engine.stepper import StepResult
from service.errors import ClientGone, InvalidValue, UnknownCharacters, plural
from service.generation.automata import automaton_of
from service.model.charset import Charset, UnknownChars
from service.registry.loaded_models import LoadedModel
from service.sessions.session import Run
from service.sessions.text import Retention, Text

_POLL_S = 0.25  # between two checks whether the client is still connected
_NOTHING = np.empty(0, np.int64)
_DIGITS = "0123456789"


@dataclass(frozen=True)
class Reading:
    """What came of reading characters into a text."""

    text: Text  # with these characters, and the state after them
    scores: Scores | None  # of the characters; None if not requested
    next: Distribution | None  # the characters that are likeliest to follow; None if not requested


class Reader:
    """Makes texts longer and shorter. Nothing else does, so a text always comes with the state after it.

    Any number of threads may call. Every method that steps the network may raise Overloaded and EngineFailed.
    """

    def __init__(self, retention: Retention) -> None:
        self._retention = retention

    def empty(self, model: LoadedModel) -> Text:
        """Return a text without characters, with the zero state."""
        return Text(model.engine.initial_hidden())

    def read(
        self,
        model: LoadedModel,
        text: Text,
        ids: Ids,
        num_logprobs: int | None = None,
        num_next: int | None = None,
        client_has_left: Callable[[], bool] | None = None,
    ) -> Reading:
        """Step the network over (n,) ids after a text. num_logprobs, num_next, client_has_left: see `step`."""
        if not len(ids) and num_next is None:
            return Reading(text, None, None)
        start = text.position
        positions = self._retention.checkpoint_positions(start, start + len(ids))
        end, scores = step(
            model, ids, text.hidden, start, positions, num_logprobs, num_next, client_has_left=client_has_left
        )
        if len(ids):
            text = text.extended(model.charset.decode(ids), end.hidden, end.checkpoints, self._retention)
        return Reading(text, scores, end.next)

    def reread(self, model: LoadedModel, text: Text, client_has_left: Callable[[], bool] | None = None) -> Text:
        """Return the retained characters of a text of another model, read into this model from the zero state.

        client_has_left: see `step`. Raises UnknownCharacters: positions stay the same, so none is folded or dropped.
        """
        characters = text.slice(text.start, text.position)
        beginning = Text(model.engine.initial_hidden(), text.start)
        try:
            ids = model.charset.exact(characters)
        except UnknownCharacters as error:
            advice = "the session's text has them: start a new session with that text, where `unknown_chars` applies"
            raise UnknownCharacters(f"{error.fault}, and {advice}", param="rebase") from None
        return self.read(model, beginning, ids, client_has_left=client_has_left).text

    def score(
        self,
        model: LoadedModel,
        text: Text,
        start: int,
        end: int,
        num_logprobs: int | None,
        num_next: int | None,
        client_has_left: Callable[[], bool] | None = None,
    ) -> tuple[Scores | None, Distribution | None]:
        """Return the scores of characters that a text has already, and the distribution after them.

        client_has_left: see `step`. Raises PositionGone.
        """
        begin, hidden = text.nearest_checkpoint(start if num_logprobs is not None else end)
        is_between = num_logprobs is not None and begin < start
        if is_between:  # only what is returned gets scores
            begin, hidden = start, state_at(model, text, start)
        ids = model.charset.exact(text.slice(begin, end))
        after, scores = step(
            model,
            ids,
            hidden,
            begin,
            num_logprobs=num_logprobs,
            num_next=num_next,
            already_admitted=is_between,
            client_has_left=client_has_left,
        )
        return scores, after.next

    def truncate(self, model: LoadedModel, text: Text, position: int) -> Text:
        """Return the text up to a retained position, with the state there. Raises PositionGone."""
        if position == text.position:
            return text
        return text.truncated(position, state_at(model, text, position))

    def remaining_request(self, model: LoadedModel, text: Text, run: Run, end: int) -> Request:
        """Return what the engine has to do to continue a run from the end of a text up to the position `end`."""
        return Request(
            prompt=_NOTHING,
            max_chars=end - text.position,
            seed=run.seed,
            sampling=run.sampling,
            automaton=_automaton_of(model, run),
            num_left=run.start + run.max_chars - text.position,
            min_chars=run.min_chars,
            hidden=text.hidden,
            position=text.position,
            history_prompt=model.charset.exact(run.context),
            generated=model.charset.exact(text.slice(run.start, text.position)),
            checkpoint_positions=self._retention.checkpoint_positions(text.position, end),
        )

    def replay(self, model: LoadedModel, text: Text, run: Run, position: int) -> Text:
        """Generate again what an unfinished run had sent up to a position, for instance before its server died.

        The same model, state, settings and seed give the same characters anywhere. Returns `text` itself if the run
        doesn't reach that position.
        """
        if not text.position < position <= run.start + run.max_chars:
            return text
        handle = model.engine.submit([self.remaining_request(model, text, run, position)])[0]
        generated, end = self._generated(model, handle, None)
        if end.position < position or (end.num_stop_chars and not run.includes_stop):
            return text
        return text.extended(generated, end.hidden, end.checkpoints, self._retention)

    def generate(
        self, model: LoadedModel, text: Text, run: Run, client_has_left: Callable[[], bool] | None = None
    ) -> tuple[Text, Run, Handle]:
        """Generate the rest of a run. Return the text with it, the run as it ended, and what the engine did for it.

        client_has_left: see `step`.
        """
        handle = model.engine.submit([self.remaining_request(model, text, run, run.start + run.max_chars)])[0]
        generated, end = self._generated(model, handle, client_has_left)
        if end.reason == "cancelled":
            raise AssertionError("only a client that has left cancels the run")
        text = self.finish(model, text, run, generated, end)
        return text, run.ended(end.reason, text.position), handle

    def extend(self, text: Text, run: Run, generated: str, snapshot: Snapshot) -> Text | None:
        """Return the text as far as a run has come: from there, the run can be continued.

        None if it could not, because it has generated more than is retained. generated: the characters from the end of
        `text` to the snapshot.
        """
        if snapshot.position - run.start > self._retention.max_chars:
            return None
        new = {position: state for position, state in snapshot.checkpoints.items() if position > text.position}
        return text.extended(generated, snapshot.hidden, new, self._retention)

    def finish(self, model: LoadedModel, text: Text, run: Run, generated: str, end: End) -> Text:
        """Return the text after the engine has ended a run: it ends before the stop string, if one was completed.

        If the run includes its stop string, it ends after it. generated: the characters that were generated after
        `text`. The stop string may have begun before them.
        """
        if not end.num_stop_chars or run.includes_stop:
            return text.extended(generated, end.hidden, end.checkpoints, self._retention)
        num_left = len(generated) - end.num_stop_chars
        if num_left >= 0:
            text = text.extended(generated[:num_left], end.hidden, end.checkpoints, self._retention)
        else:
            text = text.truncated(text.position + num_left, end.hidden)
        # The engine's state is the one after the stop string.
        return replace(text, hidden=state_at(model, text, text.position, already_admitted=True))

    def _generated(
        self, model: LoadedModel, handle: Handle, client_has_left: Callable[[], bool] | None
    ) -> tuple[str, End]:
        """Wait for the end of a text; return what was generated, and the end. Raises ClientGone."""
        result, end = whole(handle, client_has_left)
        return model.charset.decode(result.chars), end


def step(
    model: LoadedModel,
    ids: Ids,
    hidden: Float32 | None = None,
    position: int = 0,
    checkpoint_positions: tuple[int, ...] = (),
    num_logprobs: int | None = None,
    num_next: int | None = None,
    *,
    already_admitted: bool = False,
    client_has_left: Callable[[], bool] | None = None,
) -> tuple[End, Scores | None]:
    """Step the network over (n,) ids from a state; return the end of it, and the scores of the ids if requested.

    The arguments have the meaning that they have in `Request` and `Engine.submit`. If `client_has_left()` returns true
    meanwhile, the engine is told to stop. Raises Overloaded, EngineFailed, ClientGone.
    """
    request = Request(
        ids,
        max_chars=0,
        seed=0,
        hidden=hidden,
        position=position,
        checkpoint_positions=checkpoint_positions,
        num_logprobs=num_logprobs,
        score_prompt=num_logprobs is not None,
        num_next=num_next,
    )
    handle = model.engine.submit([request], already_admitted=already_admitted)[0]
    result, end = whole(handle, client_has_left)
    return end, result.prompt_scores


def whole(handle: Handle, client_has_left: Callable[[], bool] | None) -> tuple[StepResult, End]:
    """Wait until a text has ended; return all its results, and its end. Raises EngineFailed, ClientGone."""
    while True:
        result, end = handle.read_whole(_POLL_S if client_has_left is not None else None)
        if end is not None:
            return result, end
        if client_has_left is not None and client_has_left():
            handle.cancel()
            raise ClientGone("the client has closed the connection")


def state_at(model: LoadedModel, text: Text, position: int, *, already_admitted: bool = False) -> Float32:
    """Return the (L, H) state at a retained position, stepped from the nearest checkpoint before it.

    Raises PositionGone, Overloaded, EngineFailed.
    """
    start, hidden = text.nearest_checkpoint(position)
    if hidden is not None and start == position:
        return hidden
    ids = model.charset.exact(text.slice(start, position))
    return step(model, ids, hidden, start, already_admitted=already_admitted)[0].hidden


def _automaton_of(model: LoadedModel, run: Run) -> Automaton | None:
    return automaton_of(model.charset, run.form, run.sampling.allowed, run.stops)


def ids_of(charset: Charset, ids: Sequence[int], param: str) -> Ids:
    """Return (n,) int64 ids that a client has sent. Raises InvalidValue, naming the first that no character has."""
    for place, char_id in enumerate(ids):
        if not 0 <= char_id < len(charset):
            raise InvalidValue(
                f"{param}[{place}]: no character has the id {char_id}: this model has the ids 0 to {len(charset) - 1}",
                param=f"{param}[{place}]",
            )
    return np.array(ids, np.int64)


def written_stops(
    charset: Charset, stops: Sequence[str], unknown: UnknownChars = "error", ids: Sequence[int] = ()
) -> tuple[str, ...]:
    """Return stop strings in the characters in which the model writes them, each once.

    `ids` are those of characters that end a text too: each is a stop string of one character.

    A stop string with unknown characters is refused (`error`) or folded, as a prompt is. With `drop` it is left out,
    and with `fold_drop` if it can't be folded: the model can't write it, and without these characters it would end
    other texts.

    Raises UnknownCharacters, InvalidValue.
    """
    written = []
    for place, stop in enumerate(stops):
        name = "stop" if len(stops) == 1 else f"stop[{place}]"
        try:
            text = charset.written(stop, "fold" if unknown in ("fold", "fold_drop") else "error")
        except UnknownCharacters as error:
            if unknown in ("drop", "fold_drop"):
                continue
            error.param = name
            raise
        if not text and unknown == "fold_drop":
            continue
        if not text:
            raise InvalidValue(f"{name}: folding leaves none of its characters: leave this stop string out", param=name)
        if len(text) > MAX_STOP_CHARS:
            raise InvalidValue(
                f"{name}: the model writes it with {plural(len(text), 'character')}, and it may have at most "
                f"{MAX_STOP_CHARS}",
                param=name,
            )
        written.append(text)
    return tuple(dict.fromkeys([*written, *charset.decode(ids_of(charset, ids, "stop_token_ids"))]))


def with_biases(
    sampling: SamplingSettings,
    charset: Charset,
    biases: Mapping[str, float],
    unknown: UnknownChars = "error",
    allowed: Sequence[int] | None = None,
) -> SamplingSettings:
    """Return sampling settings with a `logit_bias` and the `allowed` ids, for a model with this charset.

    A key of `biases` is a character or, if it has two digits or more, the id of one: `12`, `05`.

    Raises UnknownCharacters for a character that the model doesn't know, unless `unknown` folds or drops it, and
    InvalidValue for what is neither one character nor an id, for two biases of one character, or for a key that may be
    either, because others are ids.
    """
    by_id: dict[int, float] = {}
    has_ids = any(map(_is_id, biases))
    for char, bias in biases.items():
        if has_ids and len(char) == 1 and char in _DIGITS:
            raise InvalidValue(
                f"logit_bias: {char!r} may be a character or an id, because other keys are ids: write the id as "
                f"'0{char}', or send no ids",
                param="logit_bias",
            )
        if _is_id(char):
            ids = _ids_in_key(charset, char)
        elif len(char) > 1 and char.isascii():
            raise InvalidValue(
                f"logit_bias: {char!r} is not one character: the keys are characters, or ids of two digits or more",
                param="logit_bias",
            )
        else:
            ids = _ids_of_character(charset, char, unknown)
        if not len(ids) and unknown in ("drop", "fold_drop"):
            continue
        if len(ids) != 1:
            raise InvalidValue(f"logit_bias: {char!r} is not one character to this model", param="logit_bias")
        if by_id.setdefault(int(ids[0]), bias) != bias:
            raise InvalidValue(
                f"logit_bias: {char!r} has another bias in a second spelling, and is one character to this model",
                param="logit_bias",
            )
    used = tuple(sorted((char, bias) for char, bias in by_id.items() if bias != 0))
    sampling = replace(sampling, logit_bias=used)
    if allowed is None:
        return sampling
    return replace(sampling, allowed=tuple(sorted(set(ids_of(charset, allowed, "allowed_token_ids").tolist()))))


def _is_id(key: str) -> bool:
    return len(key) > 1 and all(char in _DIGITS for char in key)


def _ids_in_key(charset: Charset, key: str) -> Ids:
    try:
        return ids_of(charset, [int(key)], "logit_bias")
    except InvalidValue:
        raise InvalidValue(
            f"logit_bias: no character has the id {key}: this model has the ids 0 to {len(charset) - 1}",
            param="logit_bias",
        ) from None


def _ids_of_character(charset: Charset, char: str, unknown: UnknownChars) -> Ids:
    try:
        return charset.encode(char, unknown)
    except InvalidValue as error:
        error.param = "logit_bias"
        raise
