"""Two tiers of tests: `make test` takes a sample of every kind, `make test-slow` the whole.

What takes long is marked `slow`: parameters of a test, or a test whose kind others show. Something of every file is in
the sample (`tests/conftest.py`).
"""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Parameters that are left to `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)
