"""What a round that was stopped resumes with: its record, its settings, and the dtype of the machine."""

from typing import Any

from pydantic import ValidationError

from learner.improve.candidates import drop_candidates
from learner.improve.state import drop_states
from learner.progress import Stages
from learner.settings import LearnerSettings
from server.shared.errors import FailedPreconditionError
from server.store.learning.records import Lease, Round
from server.store.store import Store


def resumable(store: Store, lease: Lease, max_resumes: int, stages: Stages) -> Round | None:
    """The round to resume, if any. A round that was killed too often, or whose model is no longer
    served, is marked as failed, so that others can run."""
    current = store.rounds.running()
    if current is None:
        return None
    served, reason = store.policies.active(), ""
    # A round that made a new reference may have moved the pointer to it.
    if served.reference_version != current.reference_version and served.version != current.policy_version:
        reason = f"It trains on {current.reference_version}, and {served.version} of another reference is active since."
    elif current.attempts > max_resumes:
        reason = f"It was killed {current.attempts} times, last after its stage {current.stage}."
    if reason:
        store.rounds.finish(current.id, "failed", reason=reason, fence=lease)
        stages.console.print(f"{current.id} is given up: {reason}", highlight=False)
        return None
    return store.rounds.resume(current.id, fence=lease)


def began_with(current: Round, here: dict[str, Any]) -> LearnerSettings:
    """The settings that the round began with, except for `here`. Current variables and prefloop.toml are ignored."""
    try:
        return LearnerSettings.from_values({**current.settings, **here})
    except ValidationError as error:
        names = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
        raise FailedPreconditionError(
            "OTHER_VERSION",
            f"{current.id} was started by another version of prefloop with settings that this one cannot use "
            f"({names}): finish it with that version.",
        ) from error


def change_dtype(store: Store, lease: Lease, current: Round, settings: LearnerSettings, stages: Stages) -> Round:
    """Switches the round to another dtype than it began in. Steps in the old dtype are dropped, since no step may
    follow one with different rounding. Finished stages are kept."""
    directory = settings.data_dir / "rounds" / current.id
    starts_over = current.stage in ("snapshot", "reward_model") and any(directory.glob("state-*"))
    if starts_over:
        drop_states(directory)
        drop_candidates(directory, after=0)
    stages.console.print(
        f"it began in {current.settings['dtype']} and continues in {settings.dtype}"
        + ("; training starts over" if starts_over else ""),
        highlight=False,
    )
    stored = settings.model_dump(mode="json", exclude={"data_dir", "store_url", "policy_url"})
    return store.rounds.update(current.id, settings=stored, fence=lease)
