"""A candidate that waits as a canary: people compare its answers with the incumbent's, and a server decides by their
choices (`server.versions.canary`).
"""

from typing import Literal

from learner.round.review.offered import sample_answers, to_review
from learner.round.review.prompts import review_prompts
from learner.round.workspace import Workspace
from learner.settings import LearnerSettings
from server.store.chats.records import OfferedReview
from server.store.learning.records import Canary, CanaryTerms
from server.store.store import Store

# Numbers of the random draws of the candidate's and the incumbent's answers; the gate's are above.
CANDIDATE_DRAW, INCUMBENT_DRAW = 990, 991
RECENT_DAYS = 7
# Who voted within thirty days is one of those who may decide.
VOTER_SECONDS = 30 * 86_400
# Fewer pairs could not decide even if all choices agree.
MIN_PAIRS = 6
# The part of a canary's errors that may be made before its end (docs/decisions/0054-last-look.md).
EARLY = 0.4


def why_no_canary(store: Store, settings: LearnerSettings) -> str:
    """Why people cannot decide between a candidate and the incumbent, in a sentence; empty if they can."""
    gate = settings.gate
    if gate.canary == "off":
        return "Canaries are off (gate.canary)."
    return too_quiet(store, settings) if gate.canary == "auto" else ""


def too_quiet(store: Store, settings: LearnerSettings) -> str:
    """Why people here would hardly compare the answers that they are offered, in a sentence; empty if they might."""
    counts = store.feedback.count_by_day(RECENT_DAYS)
    votes = sum(count.votes for count in counts if count.kind != "demonstration")
    if votes >= settings.gate.canary_recent_votes:
        return ""
    return (
        f"There were {votes} votes in the last {RECENT_DAYS} days, fewer than the "
        f"{settings.gate.canary_recent_votes} that people need to decide on a canary (gate.canary)."
    )


def begin_canary(work: Workspace, version: str) -> tuple[Literal["promoted", "canary", "rejected"], str]:
    """Offers pairs of the version's answers and the incumbent's, and lets the version wait. Returns the round's state
    and a sentence about it."""
    store, incumbent = work.store, work.round.incumbent_version
    if begun := store.canaries.find(version):
        return _state(store, begun)
    if moved := _moved(store, version, incumbent):
        return "rejected", moved
    pairs = sample_pairs(work, version)
    if len(pairs) < MIN_PAIRS:
        return "rejected", f"{version} does not wait as a canary: its answers are the same as those of {incumbent}."
    terms = canary_terms(store, work.settings, work.round.create_time, len(pairs))
    with store.transaction():
        # Sampling takes minutes, in which an operator may have moved the pointer.
        if moved := _moved(store, version, incumbent):
            return "rejected", moved
        store.reviews.offer(work.round.id, "canary", pairs, fence=work.lease)
        store.canaries.begin(version, incumbent, work.round.id, terms, fence=work.lease)
    begun = store.canaries.find(version)
    assert begun
    return _state(store, begun)


def canary_terms(store: Store, settings: LearnerSettings, now: float, pairs: int) -> CanaryTerms:
    """The terms for those who vote here: what counts of each must not change while votes come in. Where few vote, the
    wait ends once they have said all that counts."""
    gate = settings.gate
    voters = store.lineage.count_voters(gate.canary_voters, now - VOTER_SECONDS)
    if voters >= gate.canary_voters:
        unit, most, said = gate.canary_user_votes, gate.canary_user_votes, gate.canary_votes
    elif voters > 1:
        unit, most, said = 1, settings.ab_test_user_votes, voters * min(settings.ab_test_user_votes, pairs)
    else:
        unit, most, said = 1, gate.canary_votes, pairs
    return CanaryTerms(
        # Chance promotes once in `canary_evidence` times: so often on the way, and so often at the end.
        evidence=gate.canary_evidence / EARLY,
        max_votes=min(gate.canary_votes, said),
        days=gate.canary_days,
        unit=unit,
        user_votes=most,
        last_level=(1 - EARLY) / gate.canary_evidence,
    )


def _moved(store: Store, version: str, incumbent: str) -> str:
    """Why there is nothing to decide between the two; empty if there is."""
    active = store.policies.active().version
    if active == incumbent:
        return ""
    return f"{version} does not wait as a canary: {active} is active instead of {incumbent}."


def waits(canary: Canary) -> str:
    """What a waiting canary waits for, in a sentence."""
    return (
        f"{canary.version} waits as a canary until people have chosen between its answers and those of "
        f"{canary.opponent_version}: on the page under Compare, or with /review in the terminal. At most "
        f"{canary.max_votes} choices; then all together decide."
    )


def sample_pairs(work: Workspace, version: str) -> list[OfferedReview]:
    """An answer of the version and one of the incumbent to each prompt, without those that are the same."""
    prompts, incumbent = review_prompts(work), work.round.incumbent_version
    with work.stages.stage("review", "sampling answers to compare", 2) as advance:
        ours = sample_answers(work, version, prompts, CANDIDATE_DRAW)
        advance(1)
        theirs = sample_answers(work, incumbent, prompts, INCUMBENT_DRAW)
        advance(1)
    return [
        to_review(work, prompt, (version, one), (incumbent, other))
        for prompt, one, other in zip(prompts, ours, theirs, strict=True)
        if one.token_ids != other.token_ids
    ]


def _state(store: Store, canary: Canary) -> tuple[Literal["promoted", "canary", "rejected"], str]:
    if canary.end_time is None:
        return "canary", waits(canary)
    promoted = store.policies.active().version == canary.version
    return ("promoted" if promoted else "rejected"), canary.outcome
