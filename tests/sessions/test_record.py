"""The record of a session: a run is stored whole, and older servers read what doesn't use new fields."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from service.engine.automaton.form import Form
from service.engine.sampling_settings import PLAIN, SamplingSettings
from service.errors import SessionLost
from service.sessions import record
from service.sessions.record import Record
from service.sessions.session import Run, Session, SessionKey
from service.sessions.text import Text

# What the first version with records of this format knows.
OLD_RUN = {"start", "max_chars", "seed", "sampling", "stops", "context", "finish_reason", "end"}
OLD_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
OLD_SAMPLING |= {"logit_bias"}
RUN = Run(2, 50, 7, PLAIN, ("ab",), "abc")
FORM = Form("json", '{"type":"object","title":"\u00e9"}')
DIFFICULT = SamplingSettings(0.5, 3, 0.9, 0.1, 1.2, 0.5, 0.25, ((3, 2.0),), (1, 3, 40))


def session(run: Run | None) -> Session:
    """A session whose text is "abcd"."""
    text = Text(np.full((1, 4), 0.5, np.float32), 0, (), "abcd")
    return Session("a", "me", "tiny@1", "identity", 7, 60.0, 1.0, 2.0, text, run, b"origin", 3)


def header_of(stored: Record) -> dict[str, object]:
    (length,) = struct.unpack_from("<I", stored.data, 1)
    header: dict[str, object] = json.loads(stored.data[5 : 5 + length])
    return header


def decoded(stored: Record, header: dict[str, object] | None = None) -> Session:
    """The session of a record, with another header if one is given."""
    (length,) = struct.unpack_from("<I", stored.data, 1)
    head = json.dumps(header if header is not None else header_of(stored)).encode()
    data = stored.data[:1] + struct.pack("<I", len(head)) + head + stored.data[5 + length :]
    return record.decode(Record(data, stored.settled), lambda _: [], SessionKey("me", "a"), 3, 2.0)


@pytest.mark.parametrize(
    "run",
    [
        None,
        RUN,
        replace(RUN, sampling=DIFFICULT, min_chars=9, includes_stop=True),
        replace(RUN, finish_reason="stop", end=4, includes_stop=True),
        replace(RUN, form=FORM),
        replace(RUN, form=FORM).ended("stop", 4),
    ],
    ids=["none", "plain", "all settings", "finished", "form", "finished form"],
)
def test_record__brings_a_run_back_whole(run: Run | None) -> None:
    assert decoded(record.encode(session(run), 16)).run == run


def test_record__of_a_run_without_new_fields_is_one_that_older_servers_read() -> None:
    """They refuse a field that they don't know, because they would generate another text."""
    header = header_of(record.encode(session(replace(RUN, sampling=replace(DIFFICULT, allowed=None))), 16))
    run = header["run"]
    assert isinstance(run, dict)
    assert set(run) <= OLD_RUN
    assert set(run["sampling"]) <= OLD_SAMPLING
    assert {"start", "max_chars", "seed", "sampling"} <= set(run)  # those that have no default


def test_record__of_an_older_server_has_every_field_it_knows() -> None:
    stored = record.encode(session(RUN), 16)
    sampling = {name: value for name, value in asdict(PLAIN).items() if name in OLD_SAMPLING}
    run = {name: value for name, value in asdict(RUN).items() if name in OLD_RUN} | {"sampling": sampling}
    assert decoded(stored, header_of(stored) | {"run": run}).run == RUN
    assert {field.name for field in fields(Run)} > OLD_RUN


def test_record__with_a_field_of_a_newer_server_is_refused() -> None:
    stored = record.encode(session(RUN), 16)
    with pytest.raises(SessionLost):
        decoded(stored, header_of(stored) | {"run": {**asdict(RUN), "tomorrow": 1}})


def test_record__of_a_finished_run_names_its_form_without_having_it() -> None:
    """Every save writes the record again, and a form may be much longer than the text."""
    run = replace(RUN, form=Form("regex", "a" * 100_000))
    ended = run.ended("length", 4)
    assert len(record.encode(session(ended), 16).data) < 1_000
    assert ended.form_digest == run.form_digest == replace(ended).form_digest
    others = [None, Form("json", "a" * 100_000), Form("regex", "a" * 100_001)]
    assert len({ended.form_digest, *(replace(RUN, form=form).form_digest for form in others)}) == 4
    assert (RUN.ended("stop", 3).form_digest, RUN.form_digest) == ("", "")
    assert run.num_bytes > 100_000 > ended.num_bytes


def test_record__with_a_form_that_does_not_exist_is_refused() -> None:
    stored = record.encode(session(replace(RUN, form=FORM)), 16)
    run = header_of(stored)["run"]
    assert isinstance(run, dict)
    for form in ({"kind": "poem", "value": ""}, {"kind": "regex"}, {"kind": "regex", "value": "", "more": 1}, "x"):
        with pytest.raises(SessionLost):
            decoded(stored, header_of(stored) | {"run": run | {"form": form}})
