"""How much tests of random cases try."""

from __future__ import annotations

import os

# Tests of random cases try several times as many, which CI does in a step of its own.
IS_THOROUGH = "TEST_THOROUGH" in os.environ
