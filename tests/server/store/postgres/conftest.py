"""Tests of PostgreSQL alone."""

from collections.abc import Callable, Iterator

import pytest

from server.store.postgres.database import PostgresDatabase
from tests.postgres import PostgresServer

Connect = Callable[[], PostgresDatabase]


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    """An empty store."""
    url = postgres.create()
    yield url
    postgres.drop(url)


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    """Makes connections to one store."""
    made: list[PostgresDatabase] = []

    def connect() -> PostgresDatabase:
        made.append(PostgresDatabase(url))
        return made[-1]

    yield connect
    for database in made:
        database.close()
