"""Compiles forms to automata, and remembers what it compiled."""

from __future__ import annotations

from service.engine.automaton.alphabet import Alphabet
from service.engine.automaton.automaton import Automaton
from service.engine.automaton.automaton_cache import AutomatonCache
from service.engine.automaton.budget import Budget
from service.engine.automaton.choice import choice_dfa, read_choices
from service.engine.automaton.dfa import Dfa
from service.engine.automaton.form import Form
from service.engine.automaton.json_schema import any_object_dfa, schema_dfa
from service.engine.automaton.regex import regex_dfa
from service.errors import InvalidValue, UnknownCharacters

_CACHE_BYTES = 32 * 2**20


class FormCache:
    """Compiles forms, and remembers what it compiled. Any thread may use it."""

    def __init__(self, max_bytes: int = _CACHE_BYTES) -> None:
        self._automata = AutomatonCache(max_bytes)

    def get(self, form: Form, charset: str, allowed: tuple[int, ...] | None = None) -> Automaton:
        """Return the automaton of a form, see `compile_form`."""
        key_bytes = 4 * len(form.value) + 40 * len(allowed or ())  # a charset is shared with its model
        return self._automata.get((form, charset, allowed), key_bytes, lambda: _compiled(form, charset, allowed))

    @property
    def num_bytes(self) -> int:
        """The memory of what it remembers, about."""
        return self._automata.num_bytes


def _compiled(form: Form, charset: str, allowed: tuple[int, ...] | None) -> Automaton:
    alphabet = Alphabet(charset, allowed, Budget())
    dfa = _dfa(form, alphabet)
    if len(dfa.accepting):
        return dfa.automaton()
    if allowed is not None and _has_texts(form, Alphabet(charset, None, alphabet.budget)):
        lacking = f": they lack {alphabet.named_missing}" if alphabet.missing else ""
        raise InvalidValue(
            f"allowed_token_ids: no text of the form consists of these characters alone{lacking}",
            param="allowed_token_ids",
        )
    if _would_help(alphabet, form):
        raise UnknownCharacters(
            f"no text of this form can be written, because the model lacks {alphabet.named_missing}"
        )
    raise InvalidValue("no text has this form")


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
    """Whether a form has texts with the characters that are missing."""
    # Halves of surrogate pairs are in no text, but a pattern can name them.
    chars = "".join(char for char in alphabet.missing if not "\ud800" <= char <= "\udfff")
    if not chars:
        return bool(alphabet.missing)
    return _has_texts(form, Alphabet(alphabet.text + chars, None, alphabet.budget))


def _has_texts(form: Form, alphabet: Alphabet) -> bool:
    """Whether a form has texts with these characters; true if the budget doesn't suffice to tell."""
    try:
        return len(_dfa(form, alphabet).accepting) > 0
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
        InvalidValue: the form is malformed, is not supported, is too large, or the model can't write any text of it
            (UnknownCharacters), or not with the allowed characters; then `param` is `allowed_token_ids`. The message
            names the position in the pattern, or the place in the schema as a JSON pointer.
        Overloaded: too many new forms wait to be compiled.
    """
    return _cache.get(form, charset, allowed)
