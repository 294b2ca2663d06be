"""The stages of a round that learns from demonstrations: fine-tuning -> gate -> publish -> activate.

It starts from the version that serves. Its own is a reference: the next rounds start from it, and measure KL from it.
"""

from learner.improve.sft.examples import MIN_HELD_OUT, MIN_TRAIN, Split
from learner.round.end import finish
from learner.round.gate.checks_stage import unusable_checks
from learner.round.preconditions import too_few_prompts
from learner.round.publish import activate, publish
from learner.round.report import Report
from learner.round.sft.examples_stage import load_examples
from learner.round.sft.gate_stage import judge_fine_tuned
from learner.round.sft.train_stage import fine_tune
from learner.round.start import compare_engine
from learner.round.workspace import Workspace
from server.store.learning.fine_tuned import FineTuned


def run(work: Workspace) -> Report:
    """Runs the stages in order."""
    split = load_examples(work)
    if reason := unusable(work, split):
        return finish(work, "rejected", reason)
    compare_engine(work)
    tuned = fine_tune(work, split)
    if not tuned.carries_over:
        return finish(work, "rejected", f"{does_not_carry_over(tuned)} Nothing was changed.")
    verdict = judge_fine_tuned(work, tuned)
    return finish(work, *activate(work, publish(work, verdict), verdict))


def unusable(work: Workspace, split: Split) -> str | None:
    """Why these examples, prompts or checks cannot be used, in a sentence; None if they can, or were."""
    if work.done("improve"):
        return None
    if split.too_few:
        return (
            f"There are {len(split.train)} demonstrations and corrections to train on and {len(split.held_out)} held "
            f"out, and at least {MIN_TRAIN} and {MIN_HELD_OUT} of different topics are needed. Nothing was changed."
        )
    return too_few_prompts(work.prompts) or unusable_checks(work)


def does_not_carry_over(tuned: FineTuned) -> str:
    """Why a version that imitates well is none, in a sentence."""
    examples = f"the {len(tuned.epochs[0].each)} demonstrations and corrections held out"
    if not tuned.chosen:
        return f"The loss on {examples} did not fall: what the others show does not carry over to them."
    return f"The loss on {examples} may have fallen by chance: {tuned}."
