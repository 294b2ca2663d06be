"""Every test of the store that has a data directory runs on both databases."""

from pathlib import Path

import pytest

# For a test of what SQLite alone does.
on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    named = any(mark.args[0] == "database" for mark in metafunc.definition.iter_markers("parametrize"))
    here = metafunc.definition.path.parent == Path(__file__).parent
    if here and not named and {"tmp_path", "database"} < set(metafunc.fixturenames):
        metafunc.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture(autouse=True)
def _database(database: str) -> None:
    """Every test has one, whether it names it or not."""
