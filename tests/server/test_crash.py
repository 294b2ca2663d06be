"""An acknowledged vote is on disk, wherever the server is killed."""

from contextlib import closing
from pathlib import Path

import pysqlite3.dbapi2 as sqlite3
import pytest

from server.shared.failpoints import FAILPOINTS, failpoint
from server.store.store import Store
from tests.server.crash import vote_until_killed


@pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize("where", ["commit:2", "commit:9", "committed:9", "commit:16"])
def test_every_acknowledged_vote_survives_a_kill(tmp_path: Path, where: str, database: str) -> None:
    acknowledged, killed = vote_until_killed(tmp_path, where, turns=4)
    assert killed
    if database == "sqlite":
        with closing(sqlite3.connect(tmp_path / "prefloop.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with closing(Store.open(tmp_path)) as store:
        kept = {vote.id: vote.value for vote in store.feedback.page("ann", 100)}
    # The last vote may be on disk without its response having been sent; no acknowledged one is missing.
    assert acknowledged.keys() <= kept.keys()
    unanswered = [vote for vote, value in kept.items() if acknowledged.get(vote) != value]
    assert len(unanswered) <= 1


def test_a_server_without_a_failpoint_does_not_kill_itself(tmp_path: Path) -> None:
    acknowledged, killed = vote_until_killed(tmp_path, "", turns=2)
    assert (len(acknowledged), killed) == (2, False)


def test_failpoints_are_off_by_default() -> None:
    for name in FAILPOINTS:
        failpoint(name)  # type: ignore[arg-type]
