"""The start of a round's training."""

from pathlib import Path

from learner.model.engine_check import check_engine
from learner.round.workspace import Workspace
from server.store.files.manifest import verify


def compare_engine(work: Workspace) -> None:
    """Before anything is spent: is what will be trained what is served?"""
    if not work.done("reward_model"):
        policy, engine = work.policy, work.engine
        with work.stages.stage("start", "comparing the engine with the trainer"):
            check_engine(policy, engine, work.prompts.train, work.settings)


def load_start(work: Workspace) -> None:
    """Gives the policy the weights that the round starts from. Raises ValueError if it cannot train them."""
    if directory := start_directory(work):
        work.policy.load(directory)


def start_directory(work: Workspace) -> Path | None:
    """The version that the round starts from, if it is not the reference. Raises ValueError if its kind cannot be
    trained."""
    policy = work.settings.policy
    if policy.start_from == "reference" or work.round.incumbent_version == work.round.reference_version:
        return None
    directory = work.policy_directory(work.round.incumbent_version)
    manifest = verify(directory)
    if (manifest.kind == "adapter") != (policy.train == "lora"):
        raise ValueError(
            f"The active {directory.name} is of the kind {manifest.kind}, but policy.train is {policy.train}. A round "
            "that starts from it must train the same kind: start from the reference, or change policy.train."
        )
    return directory
