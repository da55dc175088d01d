"""Compiles forms with another library, for `benchmarks.form_compilation`.

python benchmarks/peers/forms_worker.py LIBRARY < forms.json

Reads an object with `charset` and `forms`: lists of a kind (`regex` or `json`), a value, and texts of the form. Writes
a line of JSON for each form: the milliseconds of processor time that compiling took and the number of texts that the
result accepts, or why there are none. Each form is compiled in a process of its own with limits of time and memory,
because a library may take more than the machine has.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

_SECONDS = 20
_BYTES = 4 * 2**30

Accepts = Callable[[str], bool]


def interegular_compiler(charset: str) -> Callable[[str, str], Accepts]:
    """Return what compiles a form with interegular, which knows patterns alone."""
    import interegular  # type: ignore[import-not-found,import-untyped,unused-ignore]

    del charset  # its automata have all characters

    def compiled(kind: str, value: str) -> Accepts:
        if kind != "regex":
            raise ValueError("it has no JSON schemas")
        accepts: Accepts = interegular.parse_pattern(value).to_fsm().reduce().accepts
        return accepts

    return compiled


def outlines_core_compiler(charset: str) -> Callable[[str, str], Accepts]:
    """Return what compiles a form with outlines-core, for a vocabulary of the charset's characters."""
    import outlines_core  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from outlines_core import json_schema

    ids = {char: id_ for id_, char in enumerate(charset)}
    vocabulary = outlines_core.Vocabulary(len(charset), {char: [id_] for char, id_ in ids.items()})

    def compiled(kind: str, value: str) -> Accepts:
        index = outlines_core.Index(
            value if kind == "regex" else json_schema.build_regex_from_schema(value), vocabulary
        )

        def accepts(text: str) -> bool:
            state = index.get_initial_state()
            for char in text:
                state = index.get_next_state(state, ids[char])
                if state is None:
                    return False
            return bool(index.is_final_state(state))

        return accepts

    return compiled


COMPILERS = {"interegular": interegular_compiler, "outlines-core": outlines_core_compiler}


def main() -> None:
    """Compile the forms of standard input."""
    task = json.load(sys.stdin)
    compiled = COMPILERS[sys.argv[1]](task["charset"])
    for kind, value, texts in task["forms"]:
        print(json.dumps(in_own_process(lambda: measured(compiled, kind, value, texts))), flush=True)  # noqa: B023


def measured(compiled: Callable[[str, str], Accepts], kind: str, value: str, texts: list[str]) -> dict[str, Any]:
    """Compile one form."""
    began = time.process_time()
    accepts = compiled(kind, value)
    ms = 1000 * (time.process_time() - began)
    return {"ms": ms, "accepted": sum(map(accepts, texts))}


def in_own_process(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call a function in a child process, and return what it returns, or how it failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
        signal.alarm(_SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            answer = measure()
        except BaseException as error:  # noqa: BLE001 - a library may raise anything, panics of Rust too
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer_text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if answer_text:
        found: dict[str, Any] = json.loads(answer_text)
        return found
    ended = os.waitstatus_to_exitcode(status)
    why = f"more than {_SECONDS} s" if ended == -signal.SIGALRM else f"more than {_BYTES // 2**30} GiB, or a crash"
    return {"error": why}


if __name__ == "__main__":
    main()
