"""Fixtures for every test: the repository's root, and the environment that no test may leave to chance."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parent.parent
