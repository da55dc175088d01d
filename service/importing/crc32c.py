"""CRC32C, the checksum of TensorFlow's checkpoints, of many stripes of the data side by side in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # reflected
_MASK = 0xA282EAD8
_FEW = 4096  # bytes up to which one byte follows the other


def _byte_table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


_TABLE = _byte_table()
_LIST: list[int] = _TABLE.tolist()


def crc32c(data: bytes | memoryview) -> int:
    """Return the CRC32C of some bytes."""
    view = memoryview(data)
    crc = 0xFFFFFFFF
    if len(view) > _FEW:
        # Each stripe's remainder is computed from zero, all at the same time. The remainder of a text is that of its
        # beginning, moved over the zeros of the next stripe, plus that of this stripe.
        num_stripes = 1 << (len(view).bit_length() // 2)
        length = len(view) // num_stripes
        stripes = np.frombuffer(view[: num_stripes * length], np.uint8).reshape(num_stripes, length)
        remainders = np.zeros(num_stripes, np.uint32)
        for column in range(length):
            remainders = _TABLE[(remainders ^ stripes[:, column]) & 0xFF] ^ (remainders >> 8)
        moved = _mover(length)
        for remainder in remainders.tolist():
            crc = moved[0][crc & 0xFF] ^ moved[1][crc >> 8 & 0xFF] ^ moved[2][crc >> 16 & 0xFF] ^ moved[3][crc >> 24]
            crc ^= remainder
        view = view[num_stripes * length :]
    for byte in view:
        crc = _LIST[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """Return the CRC32C as TensorFlow stores it: a checksum of data that has checksums in it is weaker unmasked."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def _mover(length: int) -> list[list[int]]:
    """Return, for each byte of a remainder, a table of what it becomes after `length` zero bytes."""
    columns = [1 << bit for bit in range(32)]  # a linear map over bits, as what each bit becomes
    power = [_LIST[column & 0xFF] ^ (column >> 8) for column in columns]  # one zero byte
    while length:
        if length & 1:
            columns = [_apply(power, column) for column in columns]
        power = [_apply(power, column) for column in power]
        length >>= 1
    return [[_apply(columns, value << shift) for value in range(256)] for shift in (0, 8, 16, 24)]


def _apply(columns: list[int], value: int) -> int:
    out = 0
    for bit, column in enumerate(columns):
        if value >> bit & 1:
            out ^= column
    return out
