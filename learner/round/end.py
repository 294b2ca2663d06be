"""The end of a round, of either kind."""

import json
from typing import Literal

from learner.round.report import Report
from learner.round.workspace import Workspace

Outcome = Literal["promoted", "canary", "rejected"]


def finish(work: Workspace, state: Outcome, sentence: str) -> Report:
    """Closes the round, in the store and in `report.json`."""
    work.clean()
    work.record("activate" if state == "promoted" else work.round.stage)
    # A canary's round is stored as rejected until it is promoted; whoever reads it sees that it waits.
    ended: Literal["promoted", "rejected"] = "promoted" if state == "promoted" else "rejected"
    work.round = work.store.rounds.finish(work.round.id, ended, reason=sentence, fence=work.lease)
    report = Report(
        state,
        sentence,
        work.round.id,
        work.round.policy_version,
        work.round.reward_model_version,
        work.round.incumbent_version,
        work.round.metrics,
    )
    (work.directory / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return report
