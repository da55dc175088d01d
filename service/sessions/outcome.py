"""What is said of a change of which the store doesn't say whether it was done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import OutcomeUnknown, StoreUnavailable


@contextmanager
def repeatable(is_so: bool = True) -> Iterator[None]:
    """For a change that can be asked for again whether it was done or not: one that changes no text, or that says where
    its text belongs. Raises StoreUnavailable in place of OutcomeUnknown.
    """
    try:
        yield
    except OutcomeUnknown as error:
        if not is_so:
            raise
        raise StoreUnavailable("the session store didn't answer: try again, which is harmless") from error
