"""Compiles forms to automata, and remembers what it compiled."""

from __future__ import annotations

from service.engine.automaton.automaton import Automaton
from service.engine.automaton.form import Form
from service.errors import InvalidValue


def compile_form(form: Form, charset: str, allowed: tuple[int, ...] | None = None) -> Automaton:
    """Return the automaton of the texts that have a form and consist of a model's characters.

    Any thread may call it. It takes at most some 200 ms; forms that were used lately take no time.

    Args:
        form: the form.
        charset: the model's characters, in the order of their ids.
        allowed: the ids of the characters that may occur; None: all.

    Raises:
        InvalidValue: the form is malformed, is not supported, is too large, or no text of it can be written with these
            characters. The message names the position in the pattern, or the place in the schema as a JSON pointer.
    """
    raise InvalidValue(f"forms of the kind {form.kind} can't be compiled yet")
