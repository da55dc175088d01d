"""The most that a core of this processor multiplies: `peak.cpp`, in characters/s of a model's recurrent products."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.environment import Skipped

# The instruction with which a variant of the kernel multiplies. The portable variant has none of its own.
INSTRUCTIONS = {
    "amx_int8": "tiles",
    "avx512vnni": "vnni512",
    "avxvnni": "vnni256",
    "avx2": "maddubs256",
    "sse4": "maddubs128",
    "i8mm": "smmla",
    "dotprod": "sdot",
}
# The share of the peak that the kernel should reach with many texts, by the processor's best instruction. Gates take as
# long as the products in tiles, and weights come from the second cache at best.
SHARES = {"tiles": 0.2, "vnni512": 0.5, "smmla": 0.3}
_SHARE = 0.4  # of any other


class Peaks:
    """The compiled program, in a folder that the caller removes. Raises Skipped without a C++17 compiler."""

    def __init__(self, folder: Path) -> None:
        compiler, self._program = os.environ.get("CXX", "c++"), folder / "peak"
        source = Path(__file__).with_name("peak.cpp")
        if shutil.which(compiler) is None:
            raise Skipped(f"there is no {compiler}")
        command = [compiler, "-std=c++17", "-O2", str(source), "-o", str(self._program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Skipped(f"{compiler} does not compile {source.name}: {done.stderr.strip()[:200]}")
        self.instructions = self._run().split()  # that this processor has, best first

    def turn(self, instruction: str, products_per_char: int) -> Callable[[float], float]:
        """Return a turn that only multiplies, on one core."""
        return lambda seconds: float(self._run(instruction, str(seconds))) / products_per_char

    def _run(self, *words: str) -> str:
        return subprocess.run([self._program, *words], capture_output=True, text=True, check=True).stdout


def share_of(instruction: str) -> float:
    """Return the share of the instruction's peak that the kernel should reach."""
    return SHARES.get(instruction, _SHARE)
