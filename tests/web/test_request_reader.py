"""Requests from bytes that arrive in pieces of any size; which addresses count as one client."""

from __future__ import annotations

import random
from http import HTTPStatus
from typing import Any

import pytest
from gunicorn.config import Config

from service.web.gunicorn.connection import network_of
from service.web.gunicorn.request_reader import MAX_HEAD_BYTES, Refusal, RequestReader

HEAD = b"POST /a HTTP/1.1\r\nHost: a\r\n"
MAX_BODY_BYTES = 1000
WITHHELD = b"not waited for"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class Client:
    """Feeds a reader, and collects what it sends and hands out."""

    def __init__(self, may_send_body: bool = True) -> None:
        self.reader = RequestReader(Config(), ("127.0.0.1", 1), MAX_BODY_BYTES, lambda _: may_send_body)
        self.interim = b""
        self.requests: list[tuple[str, bytes]] = []

    def send(self, data: bytes) -> list[tuple[str, bytes]]:
        """Return the paths and bodies of all requests so far."""
        self.reader.add(data)
        while (request := self.reader.next_request(self._on_interim)) is not None:
            try:
                self.requests.append((request.uri, request.body.read()))
            except OSError:
                self.requests.append((request.uri, WITHHELD))
        return self.requests

    def _on_interim(self, data: bytes) -> None:
        self.interim += data


def refusal(data: bytes, **settings: Any) -> Refusal:
    """Return the refusal of what has arrived."""
    with pytest.raises(Refusal) as refused:
        Client(**settings).send(data)
    return refused.value


REQUESTS = {
    b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n": ("/a", b""),
    b"\r\nGET /b?c HTTP/1.0\r\n\r\n": ("/b?c", b""),
    HEAD + b"Content-Length: 5\r\n\r\nab\r\nc": ("/a", b"ab\r\nc"),
    HEAD + b"Content-Length: 0\r\n\r\n": ("/a", b""),
    CHUNKED + b"3\r\nabc\r\n0B \r\n0\r\n\r\n456789\r\n0\r\n\r\n": ("/a", b"abc0\r\n\r\n456789"),
    CHUNKED + b"1;name=value\r\na\r\n0\r\nX-Trailer: b\r\nY: c\r\n\r\n": ("/a", b"a"),
    CHUNKED + b"0\r\n\r\n": ("/a", b""),
}


@pytest.mark.parametrize("seed", range(20))
def test_requests__are_the_same_in_pieces_of_any_size(seed: int) -> None:
    chance = random.Random(seed)
    chosen = chance.choices(list(REQUESTS), k=8)
    data, client, largest = b"".join(chosen), Client(), chance.choice((1, 3, 40, 1000))
    while data:
        size = chance.randint(1, largest)
        client.send(data[:size])
        data = data[size:]
    assert client.requests == [REQUESTS[one] for one in chosen]
    assert not client.reader.has_begun
    assert client.reader.num_bytes == 0


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00" * 10 + b"\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET http://a/ HTTP/1.1\r\nX-Host: a\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /" + b"a" * 5000, None),
        (b"GET /" + b"a" * (MAX_HEAD_BYTES + 1), 414),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 9000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + (b"A: " + b"a" * 1000 + b"\r\n") * 40, 431),
        (HEAD + b"Content-Length: -5\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: brotli\r\n\r\n", 501),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (HEAD + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
        (HEAD + b"Expect: miracles\r\n\r\n", 417),
        (CHUNKED + b"ZZZ\r\n", 400),
        (CHUNKED + b"-1\r\n", 400),
        (CHUNKED + b"1_0\r\n", 400),
        (CHUNKED + b"\r\n", 400),
        (CHUNKED + b"0x1\r\n", 400),
        (CHUNKED + b"3\r\nabcd\r\n", 400),
        (CHUNKED + b"3\r\nabc\n0\r\n\r\n", 400),
        (CHUNKED + b"1" * 9000, 400),
        (CHUNKED + b"0\r\n" + b"A: b\r\n" * 30_000, 400),
        (CHUNKED + b"1\r\na\r\n" * 30_000, 400),
    ],
)
def test_malformed_requests__are_refused(data: bytes, status: int | None) -> None:
    if status is None:
        assert Client().send(data) == []
        return
    found = refusal(data)
    assert (found.status, found.code) == (HTTPStatus(status), "bad_request")
    assert found.message


@pytest.mark.parametrize(
    ("data", "status", "advice"),
    [
        # The beginning of a TLS connection: a client that was given https:// would wait for an answer.
        (bytes.fromhex("16030100c8010000c40303") + b"a" * 32, 400, "speaks HTTP, not HTTPS"),
        (b"\x80\x2e\x01", 400, "speaks HTTP, not HTTPS"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "speaks HTTP/1.1 and HTTP/1.0"),
        (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "capital letters"),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400, "end with CR LF"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", 400, "on one line"),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, "name of a header"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "only once"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n", 400, "only once"),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "Transfer-Encoding"),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "Transfer-Encoding"),
    ],
)
def test_malformed_requests__say_what_to_do_as_soon_as_that_is_known(data: bytes, status: int, advice: str) -> None:
    found = refusal(data)
    assert found.status == status
    assert advice in found.message


def test_requests__of_a_later_minor_version_are_answered_in_http_1_1() -> None:
    reader = Client().reader
    reader.add(b"GET / HTTP/1.2\r\nHost: a\r\n\r\n")
    assert reader.next_request(lambda _: None).version == (1, 1)


def test_too_long_bodies__are_handed_out_early_and_skipped() -> None:
    client = Client()
    client.send(HEAD + b"Content-Length: 5000\r\n\r\nab")
    assert client.requests == [("/a", WITHHELD)]
    assert client.reader.is_skipping
    assert not client.reader.has_begun
    client.send(b"c" * 4998 + b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n")
    assert client.requests[1:] == [("/next", b"")]
    client = Client()
    client.send(CHUNKED)
    chunk = b"190\r\n" + b"a" * 400 + b"\r\n"
    client.send(chunk * 2)
    assert client.requests == []
    client.send(chunk)
    assert [len(body) for _, body in client.requests] == [1200]  # more than allowed, so the application refuses it
    client.send(chunk * 10 + b"0\r\n\r\nGET /next HTTP/1.1\r\nHost: a\r\n\r\n")
    assert client.requests[1:] == [("/next", b"")]


def test_skipped_body__has_a_limit() -> None:
    client = Client()
    client.send(HEAD + b"Content-Length: 99999999999999\r\n\r\n")
    for _ in range(512):
        client.send(b"a" * 65_536)
    with pytest.raises(Refusal):
        client.send(b"a")


def test_unwanted_body__is_not_waited_for() -> None:
    client = Client(may_send_body=False)
    assert client.send(HEAD + b"Content-Length: 5\r\n\r\nab") == [("/a", WITHHELD)]
    assert client.send(b"cdeGET /next HTTP/1.1\r\nHost: a\r\n\r\n")[1:] == [("/next", b"")]
    assert client.send(HEAD + b"Content-Length: 0\r\n\r\n")[2:] == [("/a", b"")]


def test_expectation__gets_an_interim_answer_if_the_body_is_wanted() -> None:
    client = Client()
    assert client.send(HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n") == []
    assert client.interim == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert client.send(b"ab") == [("/a", b"ab")]
    for data, may_send_body in (
        (HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\nab", True),  # it did not wait
        (HEAD + b"Expect: 100-continue\r\nContent-Length: 5000\r\n\r\n", True),
        (HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n", False),
    ):
        client = Client(may_send_body)
        assert len(client.send(data)) == 1
        assert client.interim == b""


def test_network__of_an_address_is_what_one_client_may_have() -> None:
    def same(one: str, other: str) -> bool:
        return network_of((one, 1)) == network_of((other, 2))

    assert same("192.0.2.1", "192.0.2.1")
    assert not same("192.0.2.1", "192.0.2.2")
    assert same("2001:db8::1", "2001:db8::ffff:1")
    assert not same("2001:db8::1", "2001:db8:0:1::1")
    assert same("fe80::1%eth0", "fe80::2")
    assert not same("::ffff:192.0.2.1", "::ffff:192.0.2.2")
