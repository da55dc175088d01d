"""Trains on texts of different kinds, each with one line of docs/training.md, as a new user would.

    python -m benchmarks.corpora [names ...] [--epochs 4] [--seconds 300] [--requests 1000]

For each text it makes the files, runs the line, and prints the peak of resident memory, the seconds to the first line
and to the first update, those of the whole run, and the loss. Seconds in brackets are those of the processor, of all
threads, which a busy machine changes less. A run that lasts `--seconds` is stopped as with Ctrl-C, which publishes the
best model so far, and its row says so. Of the model of names it requests names over HTTP, and counts those that are
whole: at least one letter, then the end of the line, and no character but letters.

The texts are random and follow simple rules, except the source code, which is that of Python's library.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import random
import re
import select
import signal
import sys
import sysconfig
import tempfile
import termios
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from tests.harness.server import SERVE, Server, serving

TRAIN = [sys.executable, "-m", "service", "train"]
UPDATED = re.compile(rb"training: +\d+%\|[^|]*\|[^|\r]*, loss \d")  # the bar once characters were read
LIMIT_S = 7200.0
ROOT = Path(__file__).parent.parent

# What the texts are made of.
NAME_BEGINS = "a an be bra ca da de el fa ga ha ja jo ka la li ma mi na no o pe ra ro sa se ta to u va wi ye za"
NAME_MIDDLES = "be di la li lo ma na ni ra ri ro sa ta ti vi"
NAME_ENDS = "a an as ea el en ia ie in is na ne on or ra y"
ATOMS = "C C C N O S Cl"
WHO = "我 你 他 她 老师 学生 朋友 孩子 母亲 父亲 老人 医生 农民 诗人 邻居 客人"
WHEN = "今天 昨天 早上 晚上 春天 秋天 下雨的时候 天亮以前 很久以前"
WHERE = "在家里 在山上 在河边 在学校 在城里 在桥下 在树下 在海边"
WHAT = "看书 写字 喝茶 唱歌 种花 说话 等车 吃饭 画画 听风 想念故乡 看月亮 做梦 钓鱼"
THINGS = "sea wind moon stone river night rose bird hill rain star tree road fire snow"
VERBS = "sleeps sings falls turns waits burns calls shines fades returns"
VERSE_ENDS = ("and nobody knows", "as long ago", "over the town", "without a word", "till morning comes", "for you")
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo zy"


@dataclass(frozen=True)
class Task:
    """A text, and the line that trains on it."""

    words: list[str]  # of the line, without the model's name
    make: Callable[[Path, random.Random], object]  # writes the files into a folder
    is_long: bool = False  # stopped soon after its first updates
    asks: bool = False  # whether names are requested of the model


@dataclass(frozen=True)
class Row:
    """What was measured of one run."""

    megabytes: float = 0.0  # of the text
    peak_mb: float = 0.0  # resident memory
    first_line: str = ""  # its time
    first_update: str = ""
    whole: str = ""
    ended: str = ""
    facts: dict[str, Any] | None = None  # `training.json`; None if nothing was published

    def __str__(self) -> str:
        loss, held = "", ""
        if self.facts:
            loss = f"{self.facts['losses']['validation_nats_per_char']:.3f}"
            held = f"{self.facts['run']['num_epochs']:.1f} epochs of {self.facts['settings']['num_units']} units"
        return (
            f"| {self.megabytes:.3f} MB | {self.peak_mb:,.0f} MB | {self.first_line} | {self.first_update} "
            f"| {self.whole} | {loss} | {held or 'nothing published'}{self.ended} |"
        )


def main() -> None:
    """Print a row for each text."""
    parser = argparse.ArgumentParser(description="Train on texts of different kinds, each with one line.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(TASKS)}  [all]")
    parser.add_argument("--epochs", type=int, help="--epochs of every run  [chosen by the size of the text]")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help=f"of a run at most  [{LIMIT_S:.0f}]")
    parser.add_argument("--news-seconds", type=float, default=60, help="of the 200 MB text from its first update  [60]")
    parser.add_argument("--requests", type=int, default=1000, help="names that are requested  [1000]")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in TASKS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(TASKS)}")
    print("| text | size | peak memory | first line, s | first update, s | whole, s | loss | |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.names or TASKS:
        task = TASKS[name]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            task.make(folder, random.Random(1))
            words = [*task.words, *(["--epochs", str(options.epochs)] if options.epochs else [])]
            after_s = options.news_seconds if task.is_long else None
            print(f"| {name} {run(name, words, folder, options.seconds, after_s)}", flush=True)
            if task.asks:
                print(f"  {whole_names(folder, name, options.requests)}", flush=True)


def run(name: str, words: list[str], folder: Path, limit_s: float, after_s: float | None) -> Row:
    """Train in a terminal of its own, as a user sees it. Stop after `limit_s`, or `after_s` after the first update."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row, began, seen = Row(megabytes=size / 1e6), time.monotonic(), b""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        command = [*TRAIN, *words, "--name", name, "--model-store", "store"]
        os.execve(sys.executable, command, os.environ | {"PYTHONPATH": str(ROOT)})
    termios.tcsetwinsize(terminal, (24, 100))
    deadline = limit_s
    try:
        while True:
            now = time.monotonic() - began
            if now > deadline:
                os.kill(pid, signal.SIGINT)
                row, deadline = replace(row, ended=f", stopped after {now:.0f} s"), float("inf")
            if not select.select([terminal], [], [], 0.2)[0]:
                continue
            try:
                data = os.read(terminal, 2**16)
            except OSError:  # the end of a terminal
                break
            if not data:
                break
            seen = (seen + data)[-(2**20) :]
            now = time.monotonic() - began
            if not row.first_line and seen.strip():
                row = replace(row, first_line=f"{now:.1f} ({processor_time(pid):.1f})")
            if not row.first_update and UPDATED.search(seen):
                row = replace(row, first_update=f"{now:.1f} ({processor_time(pid):.1f})")
                if after_s is not None:
                    deadline = min(deadline, now + after_s)
    finally:
        os.close(terminal)
        _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 130):
        print(seen.decode(errors="replace")[-3000:], file=sys.stderr)
        row = replace(row, ended=f", exit code {code}")
    published = folder / "store" / name / "1" / "training.json"
    facts = json.loads(published.read_text()) if published.exists() else None
    whole = f"{time.monotonic() - began:.0f} ({usage.ru_utime + usage.ru_stime:.0f})"
    return replace(row, peak_mb=usage.ru_maxrss * 1024 / 1e6, whole=whole, facts=facts)


def processor_time(pid: int) -> float:
    """Return the seconds that a process has computed so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def whole_names(folder: Path, name: str, num_requests: int) -> str:
    """Request names of the model over HTTP, each with a seed of its own. Say how many are whole."""
    known = set((folder / "names.txt").read_text().splitlines())
    settings = {"GRU_SERVE_MODEL_STORE": str(folder / "store"), "GRU_SERVE_MODEL": name, "GRU_SERVE_LOG_LEVEL": "info"}

    def request(server: Server, seed: int) -> tuple[str, str]:
        body = {"model": name, "prompt": "", "stop": "\n", "max_tokens": 100, "seed": seed}
        status, answer = server.call("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]

    with serving(SERVE, settings) as server, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: request(server, seed), range(num_requests)))
    whole = [text for text, reason in answers if reason == "stop" and text.isalpha()]
    examples = ", ".join(whole[:8])
    return (
        f"{num_requests:,} requests: {len(whole):,} whole names, {len(set(whole)):,} of them different, "
        f"{sum(text in known for text in whole):,} as in the text; {examples}"
    )


def pick(chance: random.Random, words: str) -> str:
    """Return one of the words, which spaces separate."""
    return chance.choice(words.split())


def make_names(folder: Path, chance: random.Random) -> None:
    """Write 6,000 names, one a line, of two to four syllables."""
    names: set[str] = set()
    while len(names) < 6000:
        middle = "".join(pick(chance, NAME_MIDDLES) for _ in range(chance.choice((0, 1, 1, 2))))
        names.add((pick(chance, NAME_BEGINS) + middle + pick(chance, NAME_ENDS)).capitalize())
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in sorted(names)))


def make_molecules(folder: Path, chance: random.Random) -> None:
    """Write 3,000 strings like SMILES: chains of atoms with branches, bonds and rings that are closed."""

    def chain(length: int, depth: int) -> str:
        parts = []
        for _ in range(length):
            if depth < 2 and chance.random() < 0.15:
                parts.append(f"({chain(chance.randint(1, 3), depth + 1)})")
            elif chance.random() < 0.1:
                ring = chance.randint(1, 3)
                parts.append(f"c{ring}{''.join(chance.choices('ccccn', k=4))}c{ring}")
            else:
                parts.append(chance.choice(("", "", "", "=")) + pick(chance, ATOMS))
        return "C" + "".join(parts)

    (folder / "molecules.smi").write_text("".join(f"{chain(chance.randint(4, 16), 0)}\n" for _ in range(3000)))


def make_code(folder: Path, _: random.Random) -> None:
    """Write source files of Python's library, with lines that end with CR LF."""
    library, source = Path(sysconfig.get_paths()["stdlib"]), folder / "src"
    source.mkdir()
    for path in (*sorted((library / "json").glob("*.py")), library / "heapq.py", library / "textwrap.py"):
        (source / path.name).write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def make_chinese(folder: Path, chance: random.Random) -> None:
    """Write 4,000 characters of Chinese sentences."""
    text = ""
    while len(text) < 4000:
        text += "".join(pick(chance, words) for words in (WHEN, WHO, WHERE, WHAT))
        text += chance.choice(("，", "。", "。", "。\n"))
    (folder / "novel.txt").write_text(text[:4000], encoding="utf-8")


def make_poems(folder: Path, chance: random.Random) -> None:
    """Write two folders of 40 poems each, the second one with folders in it."""
    for number in range(80):
        place = folder / ("poems" if number < 40 else f"more/{number % 3}")
        place.mkdir(parents=True, exist_ok=True)
        verses = []
        for _ in range(16):
            verse = f"The {pick(chance, THINGS)} {pick(chance, VERBS)}, {chance.choice(VERSE_ENDS)}"
            verses.append(verse + chance.choice((".\n", ";\n", "!\n", ".\n\n")))
        (place / f"{number}.txt").write_text("".join(verses))


def make_news(folder: Path, chance: random.Random) -> None:
    """Write 200 MB of sentences whose words have the frequencies of Zipf's law, with some rare characters.

    Each line is written 20 times, because drawing all words anew would take minutes.
    """
    words = ["".join(pick(chance, SYLLABLES) for _ in range(chance.randint(1, 4))) for _ in range(20_000)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(words))))
    with (folder / "news.txt").open("w", encoding="utf-8") as file:
        size = 0
        while size < 200_000_000:
            drawn = iter(chance.choices(words, cum_weights=weights, k=96))
            line = " ".join(f"{' '.join(islice(drawn, 12)).capitalize()}." for _ in range(8)) + "\n"
            size += file.write(line * 20)
            if chance.random() < 0.1:
                size += file.write(chr(chance.randrange(0x4E00, 0x9FA5)) + "\n")


TASKS: dict[str, Task] = {
    "names": Task(["--corpus", "names.txt", "--lines"], make_names, asks=True),
    "molecules": Task(["--corpus", "molecules.smi", "--lines"], make_molecules),
    "code": Task(["--corpus", "src", "--keep-newlines"], make_code),
    "novel": Task(["--corpus", "novel.txt"], make_chinese),
    "poems": Task(["--corpus", "poems", "--corpus", "more/**/*.txt"], make_poems),
    "news": Task(["--corpus", "news.txt", "--min-count", "20"], make_news, is_long=True),
}


if __name__ == "__main__":
    main()
