"""Two tiers of tests: `make test` takes a sample of every kind, `make test-slow` the whole.

`slow` stands on parameters only, so that something of every test is in the sample.
"""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Parameters that are left to `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)
