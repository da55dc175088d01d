"""The wire format of protocol buffers: fields with numbers, read from and written to bytes.

ONNX files, SavedModels and the index of TensorFlow checkpoints have it. The `onnx` package (9 MB, with the `protobuf`
package below it) knows one of the three. These lines know all of them, and allocate nothing but what they return.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidModelFile

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class Message:
    """A message that is parsed when it is asked for something. Repeated fields are listed each time."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def fields(self) -> Iterator[tuple[int, int, int | memoryview]]:
        """Yield number, wire type and value of each field: an integer, or its bytes. Raises InvalidModelFile."""
        data, position = self._data, 0
        while position < len(data):
            # Most keys and lengths are one byte: not to call a function for these halves the time.
            key, position = (data[position], position + 1) if data[position] < 0x80 else read_varint(data, position)
            number, wire = key >> 3, key & 7
            if wire == VARINT:
                value, position = read_varint(data, position)
                yield number, wire, value
                continue
            if wire == BYTES:
                size, position = read_varint(data, position)
            elif wire in (FIXED32, FIXED64):
                size = 4 if wire == FIXED32 else 8
            else:
                raise InvalidModelFile("a message in the file has fields of an unknown kind: the file is damaged")
            if size > len(data) - position:
                raise InvalidModelFile("a message in the file is incomplete: the file is damaged")
            yield number, wire, data[position : position + size]
            position += size

    def all(self, number: int) -> Iterator[memoryview]:
        """Yield the bytes of each field with this number."""
        for found, wire, value in self.fields():
            if found == number and wire == BYTES and not isinstance(value, int):
                yield value

    def messages(self, number: int) -> Iterator[Message]:
        """Yield each message in the fields with this number."""
        return map(Message, self.all(number))

    def message(self, number: int) -> Message:
        """Return the last message in a field with this number; an empty one if there is none."""
        return Message(self.bytes(number))

    def bytes(self, number: int) -> memoryview:
        """Return the last bytes in a field with this number; empty ones if there are none."""
        last = memoryview(b"")
        for value in self.all(number):
            last = value
        return last

    def text(self, number: int) -> str:
        """Return the last text in a field with this number, at most 1 MiB of it."""
        return text_of(self.bytes(number))

    def integer(self, number: int, default: int = 0) -> int:
        """Return the last integer in a field with this number, as a signed one."""
        last = default
        for found, wire, value in self.fields():
            if found == number:
                if wire == VARINT and isinstance(value, int):
                    last = signed(value)
                elif wire in (FIXED32, FIXED64) and not isinstance(value, int):
                    last = int.from_bytes(value, "little")
        return last

    def integers(self, number: int, max_count: int) -> list[int]:
        """Return the integers of a repeated field, packed or not. Raises InvalidModelFile if they are too many."""
        found = []
        for one, wire, value in self.fields():
            if one != number:
                continue
            if wire == VARINT and isinstance(value, int):
                found.append(signed(value))
            elif wire == BYTES and not isinstance(value, int):
                position = 0
                while position < len(value) and len(found) <= max_count:
                    item, position = read_varint(value, position)
                    found.append(signed(item))
            if len(found) > max_count:
                raise InvalidModelFile("a list in the file is longer than in any model")
        return found

    def numbers(self, number: int, dtype: str) -> NDArray[Any]:
        """Return the numbers of a repeated field of fixed width, packed or not, as an array."""
        parts = [value for one, _, value in self.fields() if one == number and not isinstance(value, int)]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return np.frombuffer(data, dtype)


def read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return the unsigned integer at a position, and the position after it. Raises InvalidModelFile."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= len(data):
            break
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise InvalidModelFile("a message in the file is incomplete: the file is damaged")


def signed(value: int) -> int:
    """Return an int64 that was written as an unsigned integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def text_of(data: memoryview) -> str:
    """Return the first MiB of a text."""
    return bytes(data[: 1 << 20]).decode("utf-8", "replace")


def write_varint(value: int) -> bytes:
    """Return an integer in the wire format."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | str | bytes) -> bytes:
    """Return a field with an integer, a text, or bytes, such as another message."""
    if isinstance(value, int):
        return write_varint(number << 3 | VARINT) + write_varint(value)
    data = value.encode() if isinstance(value, str) else value
    return write_varint(number << 3 | BYTES) + write_varint(len(data)) + data
