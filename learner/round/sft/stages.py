"""The stages of a round that learns from demonstrations: fine-tuning -> gate -> publish -> activate.

It starts from the version that serves. Its own is a reference: the next rounds start from it, and measure KL from it.
"""

from learner.improve.sft.examples import MIN_HELD_OUT, MIN_TRAIN
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


def run(work: Workspace) -> Report:
    """Runs the stages in order."""
    split = load_examples(work)
    if split.too_few:
        return finish(
            work,
            "rejected",
            f"There are {len(split.train)} demonstrations and corrections to train on and {len(split.held_out)} held "
            f"out, and at least {MIN_TRAIN} and {MIN_HELD_OUT}, to questions of their own, are needed. Nothing was "
            "changed.",
        )
    if reason := too_few_prompts(work.prompts) or unusable_checks(work):
        return finish(work, "rejected", reason)
    compare_engine(work)
    tuned = fine_tune(work, split)
    if not tuned.chosen:
        return finish(
            work,
            "rejected",
            f"The loss on the {len(split.held_out)} demonstrations and corrections held out did not fall: what the "
            "others show does not carry over to them. Nothing was changed.",
        )
    verdict = judge_fine_tuned(work, tuned)
    return finish(work, *activate(work, publish(work, verdict), verdict))
