"""The header `traceparent` of W3C Trace Context: which trace of its client a request belongs to."""

from __future__ import annotations

import re

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def trace_id_of(traceparent: str) -> str | None:
    """Return the trace id, 32 hexadecimal digits; None if the header is missing or invalid.

    Later versions of the header may have more fields, which are ignored as the standard wants it.
    """
    found = _TRACEPARENT.fullmatch(traceparent.strip()) if len(traceparent) <= 512 else None
    if found is None:
        return None
    version, trace_id, parent_id, _, rest = found.groups()
    if version == "ff" or (version == "00" and rest) or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    return trace_id
