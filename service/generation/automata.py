"""The automaton of what is generated: from the form that a request names, and the strings that end its text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from service.engine.automaton.automaton import Automaton
from service.engine.automaton.compiler import compile_form
from service.engine.automaton.form import Form
from service.engine.automaton.stops import with_stops
from service.engine.request import too_few_chars
from service.model.charset import Charset


def automaton_of(
    charset: Charset, form: Form | None, allowed: Collection[int] | None, stops: Sequence[str]
) -> Automaton | None:
    """Return the automaton that a text follows while it is generated; None if any text may be generated without end.

    Args:
        charset: of the model.
        form: of the text before a stop string; None: any.
        allowed: ids of the only characters that can be drawn; None: all.
        stops: strings that end the text, as `written_stops` returns them.

    Raises InvalidValue, UnknownCharacters: the form is not supported, or too large, or no text has it; and Overloaded:
    too many new ones wait to be compiled.
    """
    ids = [charset.exact(stop) for stop in stops]
    if form is None:
        return with_stops(None, ids, len(charset))
    if allowed is not None:  # where the text must be complete before a stop string, it must be possible to draw that
        drawable = frozenset(allowed)
        ids = [stop for stop in ids if drawable.issuperset(stop.tolist())]
    compiled = compile_form(form, charset.characters, tuple(sorted(set(allowed))) if allowed is not None else None)
    return with_stops(compiled, ids, len(charset))


def require_chars(automaton: Automaton | None, max_chars: int) -> None:
    """Raise InvalidValue if no text of an automaton has at most `max_chars` characters."""
    if automaton is not None and automaton.fewest[0] > max_chars:
        raise too_few_chars(automaton, max_chars)
