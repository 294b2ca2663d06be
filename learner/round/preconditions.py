"""Why a round does not start, or ends without a version: a sentence for each reason, with what may help."""

import math

from learner.gate.checks import CheckError, read_checks
from learner.reward.dataset import count_sides
from learner.round.prompts import Prompts
from learner.round.review.canary import waits
from learner.round.review.pool import pool
from learner.settings import LearnerSettings
from server.shared.errors import ConflictError, NotFoundError
from server.store.chats.records import Snapshot
from server.store.learning.canaries import decide
from server.store.learning.records import Canary, Round
from server.store.learning.round_metrics import Improvement, SignalTest
from server.store.store import Store

# With fewer votes or prompts on either side, nothing can be fitted or judged.
MIN_SIDE = 10


def blocked(store: Store, settings: LearnerSettings) -> str | None:
    """Why no round of any kind can start now, in a sentence; None if one can."""
    try:
        store.policies.active()
    except NotFoundError:
        return "There is no policy yet: start `server serve` once, so that it prepares the reference."
    if canary := store.canaries.waiting():
        if not store.canaries.expired(canary):
            return f"{waits(canary)} Nothing was changed."
        end_expired(store, canary)
    try:
        pool(settings.review.prompt_files)
    except (OSError, UnicodeDecodeError) as error:
        return f"A file of review.prompt_files cannot be read: {error}. Nothing was changed."
    try:
        if settings.checks.file:
            read_checks(settings.checks.file)
    except (CheckError, OSError, UnicodeDecodeError) as error:
        return f"checks.file cannot be read: {error}. Nothing was changed."
    return None


def end_expired(store: Store, canary: Canary) -> None:
    """Decide about a canary whose time is over, as a server would have, had one run."""
    outcome, reason = decide(canary, store.canaries.result(canary), expired=True)
    try:
        if outcome == "promoted":
            store.policies.activate(
                canary.version, actor="learner", reason=reason, expected_active_version=canary.opponent_version
            )
            return
    except ConflictError as error:
        reason = str(error)
    store.canaries.end(canary.version, "rejected", reason)


def too_little_new(store: Store, snapshot: Snapshot, quarantined: list[str], settings: LearnerSettings) -> str | None:
    """Why there is nothing to learn from these votes, in a sentence; None if there is. A changed quarantine counts as
    new votes."""
    votes = len(snapshot.choices) + len(snapshot.thumbs) + len(snapshot.corrections)
    if votes == 0:
        return "There are no votes yet; nothing was changed."
    last = store.rounds.last_learned()
    new = last is None or store.snapshots.votes_changed(after=last.watermark) or last.quarantined != quarantined
    if last and not new and not judged(snapshot, last):
        return f"There are no new votes since {last.id} ({last.state}); nothing was changed."
    if votes < settings.min_votes:
        return f"There are {votes} votes, fewer than the {settings.min_votes} a round needs; nothing was changed."
    return too_few_votes(*count_sides(snapshot, settings.gate.judge_share))


def judged(snapshot: Snapshot, last: Round) -> bool:
    """Whether a machine judge said something since the last round, or there is another judge."""
    new = (snapshot.judge, snapshot.machine_watermark) != (last.judge, last.machine_watermark)
    return bool(snapshot.machine) and new


def too_few_votes(train: int, judge: int) -> str | None:
    """Why these votes are too few to train on or to judge by; None if there are enough."""
    for name, votes in (("train on", train), ("judge by", judge)):
        if votes < MIN_SIDE:
            return (
                f"There are {votes} votes to {name}, and {MIN_SIDE} are needed: gather votes in more "
                "conversations. Nothing was changed."
            )
    return None


def too_few_prompts(prompts: Prompts) -> str | None:
    """Why these prompts are too few to train on or to hold out; None if there are enough."""
    if min(len(prompts.train), len(prompts.held_out)) >= MIN_SIDE:
        return None
    return (
        f"There are {len(prompts.train)} prompts to train on and {len(prompts.held_out)} held out, and {MIN_SIDE} of "
        "each are needed: a judge_share closer to a half, or a longer max_model_len, may help. Nothing was changed."
    )


def too_little(signal: SignalTest) -> str:
    """Why a round ends if its votes may say nothing about the answers."""
    if math.isnan(signal.accuracy):
        return "No vote says which answer is better: all are ties, both-bad or corrections. Nothing was changed."
    return (
        f"The votes carry too little signal to learn from: p = {_p(signal.p_value)}, and at most {_p(signal.level)} is "
        f"needed (cross-validated accuracy {signal.accuracy:.2f}). {more_votes(signal)} Nothing was changed."
    )


def more_votes(signal: SignalTest) -> str:
    """What may help votes that did not pass the test."""
    if 2 ** (1 - signal.conversations) > signal.level:
        return f"They are in {signal.conversations} conversations, too few for any test: vote in more of them."
    if enough := signal.estimate:
        return f"About {enough} such votes would probably suffice; there are {signal.votes}."
    return f"It cannot be estimated how many votes would suffice; there are {signal.votes}."


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def no_candidate(improvement: Improvement) -> str:
    """Why a round ends if its training saved no weights."""
    why = {
        "kl_budget": "the KL exceeded its budget; a lower learning rate or a higher kl_coef may help"
        if improvement.steps
        else "the active version, which it starts from, is beyond the KL budget; let rounds start from the reference",
        "uncertainty": "the score's uncertainty outgrew its gain; more votes may help",
        "steps": "all steps were done, but save_every is larger than their number",
    }
    return (
        f"Training ended at step {len(improvement.steps)} without a candidate: {why[improvement.ended_by]}. "
        "Nothing was changed."
    )
