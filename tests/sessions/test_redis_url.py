"""URLs of Redis."""

from __future__ import annotations

import secrets
import traceback
from pathlib import Path

import pytest

from service.sessions.redis_url import Login, RedisUrl, Tls, parse
from tests.harness.certificates import Authority

LOGIN = Login("user", "p@ss/wo?rd")
ENCODED = "user:p%40ss%2Fwo%3Frd@"


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("redis://", RedisUrl("server", (("localhost", 6379),))),
        ("redis://host/3", RedisUrl("server", (("host", 6379),), db=3)),
        (f"redis://{ENCODED}[::1]:7/0", RedisUrl("server", (("::1", 7),), LOGIN)),
        ("redis://:only@host", RedisUrl("server", (("host", 6379),), Login(None, "only"))),
        ("rediss://host", RedisUrl("server", (("host", 6379),), tls=Tls())),
        (
            "rediss://host?ssl_check_hostname=False",
            RedisUrl("server", (("host", 6379),), tls=Tls(check_hostname=False)),
        ),
        ("unix:///run/my%20redis?db=2", RedisUrl("unix", (("/run/my redis", 0),), db=2)),
        (f"unix://{ENCODED}/socket", RedisUrl("unix", (("/socket", 0),), LOGIN)),
        (
            f"redis+sentinel://{ENCODED}a:1,b/main/5?sentinel_username=s&sentinel_password=%26",
            RedisUrl("sentinel", (("a", 1), ("b", 26379)), LOGIN, 5, None, "main", Login("s", "&")),
        ),
        ("rediss+sentinel://a/main", RedisUrl("sentinel", (("a", 26379),), tls=Tls(), service="main")),
        (f"redis+cluster://{ENCODED}a:1,[::2],c:3/0", RedisUrl("cluster", (("a", 1), ("::2", 6379), ("c", 3)), LOGIN)),
    ],
)
def test_parse__returns_every_part(url: str, parsed: RedisUrl) -> None:
    assert parse(url) == parsed
    assert "p@ss" not in repr(parsed)


@pytest.mark.parametrize(
    "url",
    [
        "{}",
        "http://user:{}@host",
        "redis://user:{}@host:port/0",
        "redis://user:{}@host:0/0",
        "redis://user:{}@host:65536/0",
        "redis://user:{}#@host/0",
        "redis://user:{}@host/one",
        "redis://user:{}@host/-1",
        "redis://user:{}@a,b/0",
        "redis://user:{}@ho st/0",
        "redis://user:{}@a..b/0",
        "redis://user:{}@host/0?nonsense=1",
        "redis://user:{}@host/0?ssl_ca_certs=ca.crt",
        "redis://user:{}@host/0?sentinel_username=a",
        "rediss://user:{}@host/0?ssl_check_hostname=perhaps",
        "rediss://user:{}@host/0?ssl_keyfile=without.crt",
        "unix://user:{}@host/socket",
        "unix://user:{}@",
        "unix://user:{}@/socket?db=x",
        "redis+sentinel://user:{}@a,b",
        "redis+sentinel://user:{}@a,b/main?sentinel_password=1&sentinel_password=2",
        "redis+sentinel://user:{}@a,,b:x/main",
        "redis+cluster://user:{}@a,b/1",
        "redis+cluster://user:{}@" + ",".join("a" * 102) + "/0",
        "redis://user:{}@" + "a" * 9000,
    ],
)
def test_parse__refuses_what_it_does_not_know_without_showing_it(url: str) -> None:
    password = secrets.token_hex()
    with pytest.raises(ValueError, match=r"must be redis://.*redis\+sentinel://.*redis\+cluster://") as caught:
        parse(url.format(password))
    assert password not in "".join(traceback.format_exception(caught.value))


def test_parse__refuses_files_that_cannot_be_used(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.sign("client")
    (tmp_path / "nothing").write_text("nothing")
    assert parse(f"rediss://host?ssl_ca_certs={authority.certificate}&ssl_certfile={certificate}&ssl_keyfile={key}").tls
    for name in ("nothing", "absent"):
        with pytest.raises(ValueError, match="ssl_ca_certs"):
            parse(f"rediss://host?ssl_ca_certs={tmp_path / name}")
        with pytest.raises(ValueError, match="ssl_certfile and ssl_keyfile"):
            parse(f"rediss://host?ssl_certfile={certificate}&ssl_keyfile={tmp_path / name}")
    with pytest.raises(ValueError, match="ssl_certfile and ssl_keyfile"):  # a key of another certificate
        parse(f"rediss://host?ssl_certfile={certificate}&ssl_keyfile={authority.sign('other')[1]}")
