"""Signals as requests to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from service.commands.stopping import Stopped, StopSignals


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which a test moves."""
    time = [100.0]
    monkeypatch.setattr("service.commands.stopping.time.monotonic", lambda: time[0])
    yield time
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_stop_signals__the_first_is_a_request_and_a_later_one_ends_at_once(
    now: list[float], number: int, status: int
) -> None:
    def send_three() -> None:
        with signals.says("what to do next"), signals.deferred():
            assert not signals.is_requested()
            os.kill(os.getpid(), number)
            assert signals.is_requested()
            now[0] += 0.5
            os.kill(os.getpid(), number)  # the same one, delivered twice
            now[0] += 1
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second signal did not end the block")

    with StopSignals() as signals, pytest.raises(Stopped, match="what to do next") as stopped:
        send_three()
    assert stopped.value.exit_code == status


@pytest.mark.usefixtures("now")
def test_stop_signals__outside_deferred_the_first_ends_the_block() -> None:
    with StopSignals() as signals:
        with pytest.raises(Stopped) as stopped, signals.says("stopped"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.exit_code == 143


@pytest.mark.usefixtures("now")
def test_stop_signals__ignored_ones_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.is_requested()
    finally:
        signal.signal(signal.SIGHUP, before)
