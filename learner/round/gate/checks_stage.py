"""An operator's checks of the candidate that the gate chose: what fails them is not promoted."""

from dataclasses import replace

from learner.gate.checks import Check, CheckedAnswer, CheckError, score_by
from learner.gate.rules import Verdict
from learner.improve.candidates import candidate
from learner.round.workspace import Workspace
from learner.settings import CheckSettings
from server.shared.model.text import UnknownTokenError
from server.store.learning.round_metrics import CheckMetrics, FailedCheck

# Answers are the most likely ones, so no draw decides about a version.
GREEDY, DRAW = 0.0, 0


def unusable_checks(work: Workspace) -> str | None:
    """Why the model cannot be asked these checks, in a sentence; None if it can."""
    try:
        _ = work.checks
    except (CheckError, UnknownTokenError, ValueError, OSError) as error:
        return f"The checks cannot be made: {error} Nothing was changed."
    return None


def checked(work: Workspace, verdict: Verdict) -> tuple[Verdict, CheckMetrics | None]:
    """The verdict with the checks that its candidate fails as reasons against it, and what they found; None if the
    operator has none."""
    settings = work.settings.checks
    if not settings.file:
        return verdict, None
    with work.stages.stage("gate", "checking answers", 2) as advance:
        work.push(work.round.incumbent_version)
        before = answers(work)
        advance(1)
        work.policy.load(candidate(work.directory, verdict.chosen.step))
        work.engine.push(work.policy.engine_weights())
        after = answers(work)
        advance(1)
    found = compare([check for check, _ in work.checks], before, after)
    reasons = [f"It fails {len(found.failed)} of {found.checks} checks: {_names(found)}."] if found.failed else []
    if settings.command:
        found, reason = scored(found, before, after, settings)
        reasons += [reason] if reason else []
    return replace(verdict, reasons=verdict.reasons + reasons, canary=verdict.canary and not reasons), found


def scored(
    found: CheckMetrics, before: list[CheckedAnswer], after: list[CheckedAnswer], settings: CheckSettings
) -> tuple[CheckMetrics, str]:
    """With the scores of the operator's command, and a reason against the candidate if its score is too low or could
    not be computed."""
    try:
        was, now = (score_by(settings.command, each, settings.timeout_seconds) for each in (before, after))
    except CheckError as error:
        return found, f"The check of its answers could not be made: {error}."
    found = replace(found, score=now, incumbent_score=was)
    least = was if settings.min_score is None else settings.min_score
    return found, f"Its answers score {now:g} in the check, less than {least:g}." if now < least else ""


def answers(work: Workspace) -> list[CheckedAnswer]:
    """The most likely answer of the engine's weights to each check's prompt."""
    samples = work.engine.sample([prompt for _, prompt in work.checks], DRAW, GREEDY)
    return [
        CheckedAnswer(check.name, check.conversation[-1]["content"], sample.text)
        for (check, _), sample in zip(work.checks, samples, strict=True)
    ]


def compare(checks: list[Check], before: list[CheckedAnswer], after: list[CheckedAnswer]) -> CheckMetrics:
    """What fails now, and how much the incumbent failed."""
    failed_before = [bool(check.broken_by(old.answer)) for check, old in zip(checks, before, strict=True)]
    failed = [
        FailedCheck(check.name, "; ".join(why), new.answer, old_failed)
        for check, new, old_failed in zip(checks, after, failed_before, strict=True)
        if (why := check.broken_by(new.answer))
    ]
    return CheckMetrics(len(checks), failed, sum(failed_before))


def _names(found: CheckMetrics) -> str:
    """The first few failed checks and why."""
    named = [f"{one.name} ({one.why})" for one in found.failed[:3]]
    more = len(found.failed) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
