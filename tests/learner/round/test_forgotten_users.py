"""A user is deleted while a round runs: the round ends, and nothing that it writes later has their data."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import learner.round.gate.gate_stage as judging
import learner.round.run as rounds
import learner.round.workspace as workspace
from learner.model.features import FeatureCache
from learner.ops.report_page.report_page import write_report
from learner.ops.trace import trace_version, trace_vote
from learner.progress import Stages
from learner.reward.linear_reward_model import LinearRewardModel
from server.store.files.residue import erase
from server.store.store import Store
from tests.learner.rounds import TinyEngine, passing, settings


@pytest.mark.parametrize("forgets_later", [False, True])
def test_a_round_writes_nothing_of_a_user_deleted_meanwhile(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, forgets_later: bool
) -> None:
    monkeypatch.setattr(workspace, "RolloutEngine", TinyEngine)
    monkeypatch.setattr(judging, "decide", passing)
    opening, get, seen = FeatureCache.open, FeatureCache.get, []

    def forget(last: bool) -> None:
        store = Store.open(data_dir)
        seen.append(store.feedback.page("ann", 1)[0].id)
        while store.deletion.step("ann") and last:
            pass
        store.close()
        assert erase(data_dir)

    # All votes are this user's. The learner has read them, and creates its cache after some are deleted. The rest are
    # deleted while the cache is open, and the cache with them.
    def forget_and_open(*arguments: Any) -> FeatureCache:
        forget(last=False)
        return opening(*arguments)

    def forget_and_get(cache: FeatureCache, *arguments: Any) -> Any:
        if forgets_later:
            forget(last=True)
        return get(cache, *arguments)

    def look_and_fit(*arguments: Any) -> Any:
        assert list((data_dir / "cache").iterdir()) == []
        return fit(*arguments)

    fit = LinearRewardModel.fit
    monkeypatch.setattr(FeatureCache, "open", forget_and_open)
    monkeypatch.setattr(FeatureCache, "get", forget_and_get)
    monkeypatch.setattr(LinearRewardModel, "fit", look_and_fit)
    report = rounds.run_once(settings(data_dir), Stages(Console(quiet=True)))
    assert report.state == "promoted"
    directory = data_dir / "rounds" / str(report.round_id)
    asked = [json.loads(line)["conversation_id"] for line in (directory / "answers.jsonl").read_text().splitlines()]
    there = Store.open(data_dir)
    left = {conversation.id for conversation in there.conversations.page("ann", 99)}
    there.close()
    # Of the twelve held-out prompts only the remaining ones are left, and the built-in ones.
    assert len(left) == (0 if forgets_later else 60)
    assert set(asked) <= {"", *left}
    assert len(asked) < 12 or not forgets_later
    write_report(data_dir)
    quoted = re.search('<meta name="conversations" content="(.*)">', (directory / "report.html").read_text())
    assert quoted
    # The page shows the first twelve.
    assert quoted[1].split() == [name for name in asked[:12] if name]
    # It still records what the version was made from.
    [made] = trace_version(data_dir, str(report.policy_version)).record["made_by"]
    assert made["since"] == {"changed": 0, "retracted": 0, "deleted": 80 if forgets_later else 20}
    assert seen[0] in made["votes"]["train"] + made["votes"]["judge"]
    assert (
        trace_vote(data_dir, seen[0])
        .lines[0]
        .startswith(f"{seen[0]}  choice of {'a deleted user' if forgets_later else 'ann'} on cmp_")
    )
