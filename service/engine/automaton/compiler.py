"""Compiles forms to automata, and remembers what it compiled."""

from __future__ import annotations

import threading
from collections import OrderedDict

from service.engine.automaton.alphabet import Alphabet
from service.engine.automaton.automaton import Automaton
from service.engine.automaton.budget import Budget
from service.engine.automaton.choice import choice_dfa, read_choices
from service.engine.automaton.dfa import Dfa
from service.engine.automaton.form import Form
from service.engine.automaton.json_schema import any_object_dfa, schema_dfa
from service.engine.automaton.regex import regex_dfa
from service.errors import InvalidValue

_CACHE_BYTES = 32 * 2**20
_ENTRY_BYTES = 1024  # of an entry besides its form and its tables, about

_Key = tuple[Form, str, tuple[int, ...] | None]


class FormCache:
    """Compiled forms, and the errors of those that can't be compiled. The one that was unused longest makes room.

    Any thread may use it. One form is compiled at a time, so that a burst of new forms takes at most one core from the
    engine, and the same form from many requests is compiled once.
    """

    def __init__(self, max_bytes: int = _CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[_Key, tuple[Automaton | InvalidValue, int]] = OrderedDict()
        self._entries_lock = threading.Lock()
        self._compiling = threading.Lock()

    def get(self, form: Form, charset: str, allowed: tuple[int, ...] | None = None) -> Automaton:
        """Return the automaton of a form, see `compile_form`."""
        key = (form, charset, allowed)
        found = self._find(key)
        if found is None:
            with self._compiling:
                found = self._find(key)
                if found is None:
                    found = _compiled(form, charset, allowed)
                    self._add(key, found)
        if isinstance(found, Automaton):
            return found
        raise new_error(found)

    @property
    def num_bytes(self) -> int:
        """The memory of all entries, about."""
        return self._num_bytes

    def _find(self, key: _Key) -> Automaton | InvalidValue | None:
        with self._entries_lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def _add(self, key: _Key, found: Automaton | InvalidValue) -> None:
        form, _, allowed = key  # a charset is shared with its model
        num_bytes = _ENTRY_BYTES + 4 * len(form.value) + 40 * len(allowed or ())
        num_bytes += found.num_bytes if isinstance(found, Automaton) else 4 * len(found.message)
        with self._entries_lock:
            self._entries[key] = (found, num_bytes)
            self._num_bytes += num_bytes
            while self._num_bytes > self._max_bytes and len(self._entries) > 1:
                self._num_bytes -= self._entries.popitem(last=False)[1][1]


def new_error(error: InvalidValue) -> InvalidValue:
    """Return a new error with the same message: one that is raised twice would collect the tracebacks of both."""
    copy = InvalidValue.__new__(type(error))
    copy.__dict__ |= error.__dict__
    copy.args = error.args
    return copy


def _compiled(form: Form, charset: str, allowed: tuple[int, ...] | None) -> Automaton | InvalidValue:
    alphabet = Alphabet(charset, allowed, Budget())
    try:
        dfa = _dfa(form, alphabet)
    except InvalidValue as error:
        return new_error(error)
    if len(dfa.accepting):
        return dfa.automaton()
    return alphabet.nothing_left() if _would_help(alphabet, form) else InvalidValue("no text has this form")


def _dfa(form: Form, alphabet: Alphabet) -> Dfa:
    match form.kind:
        case "choice":
            return choice_dfa(read_choices(form.value), alphabet)
        case "regex":
            return regex_dfa(form.value, alphabet)
        case "json":
            return schema_dfa(form.value, alphabet)
        case "json_object":
            return any_object_dfa(alphabet)


def _would_help(alphabet: Alphabet, form: Form) -> bool:
    """Whether a form has texts with the characters that are missing; true if the budget doesn't suffice to tell."""
    # Halves of surrogate pairs are in no text, but a pattern can name them.
    chars = "".join(char for char in alphabet.missing if not "\ud800" <= char <= "\udfff")
    if not chars:
        return bool(alphabet.missing)
    try:
        return len(_dfa(form, Alphabet(alphabet.text + chars, None, alphabet.budget)).accepting) > 0
    except InvalidValue:
        return True


_cache = FormCache()


def compile_form(form: Form, charset: str, allowed: tuple[int, ...] | None = None) -> Automaton:
    """Return the automaton of the texts that have a form and consist of a model's characters.

    Any thread may call it. It takes at most some 200 ms of processor time; forms that were used lately take no time.

    Args:
        form: the form.
        charset: the model's characters, in the order of their ids.
        allowed: the ids of the characters that may occur; None: all.

    Raises:
        InvalidValue: the form is malformed, is not supported, is too large, or no text of it can be written with these
            characters (UnknownCharacters). The message names the position in the pattern, or the place in the schema as
            a JSON pointer.
    """
    return _cache.get(form, charset, allowed)
