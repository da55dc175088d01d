"""What a text has to be: one of some strings, a match of a regular expression, or JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

FormKind = Literal["choice", "regex", "json", "json_object"]


@dataclass(frozen=True)
class Form:
    """The form of a text, as a request names it and a session stores it. `compile_form` makes an automaton of it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # for stored records

    kind: FormKind
    # choice: a JSON list of strings. regex: the pattern. json: a JSON schema as JSON text, whose properties are written
    # in its order. json_object: empty.
    value: str
