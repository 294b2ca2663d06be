"""Two tiers of tests: `make test` runs a sample of every kind, `make test-slow` runs all.

Long parameters, and long tests of a kind that others cover, are marked `slow`. Every file has a test in the sample
(`tests/conftest.py`).
"""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Parameters that only `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)
