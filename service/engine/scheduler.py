"""Which texts a tick advances. Plain Python: no arrays, no threads, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Generic, Protocol, TypeVar

_AHEAD_S = 0.005  # how much more time than another client a client may have used and still take part: one tick


class ClientText(Protocol):
    """A text that belongs to a client."""

    @property
    def client(self) -> str: ...


Text = TypeVar("Text", bound=ClientText)


class Scheduler(Generic[Text]):
    """Shares the engine's time between clients that have texts. Texts may join and leave at any character.

    The time of a tick is charged to the clients by the number of their texts in it. A client that has used more time
    than another one sits out until that one has caught up, so one with hundreds of texts gets as much time as one with
    a single text. A client that comes back, or is new, begins level with the one that has used least. These are the
    virtual counters of Sheng et al., "Fairness in Serving Large Language Models" (2024), in seconds and not in tokens.

    The texts of one client are admitted in the order in which they were added, and take turns if they don't all fit.
    """

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running  # texts in a tick at most, and running texts of one client at most
        self._shares: dict[str, _Share[Text]] = {}  # by client; only clients that have texts
        self._all: list[Text] | None = None  # the last choice, if it had all running texts, and of one client
        self._advancing: list[tuple[_Share[Text], int]] = []  # how many texts of each share the last choice has

    @property
    def has_work(self) -> bool:
        """Whether a text is running or waiting."""
        return bool(self._shares)

    @property
    def num_clients(self) -> int:
        """Number of clients that have texts."""
        return len(self._shares)

    @property
    def running(self) -> list[Text]:
        """The texts that have been advanced, or will be in the next ticks."""
        return list(chain.from_iterable(share.running for share in self._shares.values()))

    @property
    def waiting(self) -> list[Text]:
        """The texts that wait until other texts of their client end."""
        return list(chain.from_iterable(share.waiting for share in self._shares.values()))

    @property
    def num_running(self) -> int:
        """Number of running texts. Any thread may read it."""
        return sum(len(share.running) for share in list(self._shares.values()))

    def add(self, texts: Iterable[Text]) -> None:
        """Append texts to their clients' queues, in their order."""
        self._all = None
        for text in texts:
            share = self._shares.get(text.client)
            if share is None:
                used_s = min((other.used_s for other in self._shares.values()), default=0.0)
                share = self._shares[text.client] = _Share(used_s)
            share.waiting.append(text)

    def choose(self, num_texts: int) -> list[Text]:
        """Return the texts to advance in the next tick, in a list that must not be changed.

        These are about `num_texts`, and more only if there are so many clients; never more than `max_running`.
        """
        if self._all is not None and len(self._all) <= num_texts:
            return self._all
        for share in self._shares.values():
            share.admit(self.max_running)
        least = min((share.used_s for share in self._shares.values()), default=0.0)
        shares = [share for share in self._shares.values() if share.used_s <= least + _AHEAD_S]
        left = min(self.max_running, max(num_texts, len(shares)))
        if len(shares) > 1:
            # The one that has used least is served for certain; among equals, few texts leave their rest to the others.
            shares.sort(key=_used_s)
            shares = shares[:left]
            shares.sort(key=_num_running)
        self._advancing = []
        chosen: list[Text] = []
        for place, share in enumerate(shares):
            count = min(len(share.running), left // (len(shares) - place))
            chosen += share.next_texts(count)
            self._advancing.append((share, count))
            left -= count
        self._all = chosen if len(self._shares) == 1 and len(chosen) == self.num_running else None
        return chosen

    def charge(self, duration_s: float) -> None:
        """Charge the time that a tick with the texts chosen last has taken."""
        num_texts = sum([count for _, count in self._advancing])
        for share, count in self._advancing:
            share.used_s += duration_s * count / num_texts

    def replace(self, text: Text, others: Sequence[Text]) -> None:
        """Let texts of the same client, at least one, take the place of a running one: their turn is before others'."""
        self._all = None
        share = self._shares[text.client]
        share.running.remove(text)
        share.waiting.extendleft(reversed(others))

    def remove(self, texts: Iterable[Text]) -> None:
        """Remove running or waiting texts. The others keep their order."""
        self._all = None
        removed = set(map(id, texts))
        for client in {text.client for text in texts}:
            share = self._shares.get(client)
            if share is not None:
                share.running = deque(text for text in share.running if id(text) not in removed)
                share.waiting = deque(text for text in share.waiting if id(text) not in removed)
                if not share.running and not share.waiting:
                    del self._shares[client]


class _Share(Generic[Text]):
    """The texts of one client."""

    def __init__(self, used_s: float) -> None:
        self.used_s = used_s  # seconds of the engine that the client has used, compared with other clients
        self.running: deque[Text] = deque()  # those whose turn is next first
        self.waiting: deque[Text] = deque()

    def admit(self, max_running: int) -> None:
        while self.waiting and len(self.running) < max_running:
            self.running.append(self.waiting.popleft())

    def next_texts(self, count: int) -> list[Text]:
        """Return this many running texts, and let the others have the next turn."""
        texts = list(islice(self.running, count))
        if count < len(self.running):
            self.running.rotate(-count)
        return texts


def _used_s(share: _Share[Text]) -> float:
    return share.used_s


def _num_running(share: _Share[Text]) -> int:
    return len(share.running)
