"""The stage that fine-tunes the policy."""

from learner.improve.sft.examples import Split
from learner.improve.sft.trainer import FineTuning, best, fall_low
from learner.round.sft.examples_stage import usable
from learner.round.start import load_start
from learner.round.workspace import Workspace
from server.store.learning.fine_tuned import Epoch, FineTuned
from server.store.learning.round_metrics import RoundMetrics


def fine_tune(work: Workspace, split: Split) -> FineTuned:
    """Fine-tunes the policy and leaves the best weights in the round's directory; a resumed round may have done it
    already."""
    if work.done("improve") and work.round.metrics.sft:
        return work.round.metrics.sft
    settings = work.settings
    load_start(work)
    # It samples nothing, and the engine's memory may be needed.
    work.engine.sleep()
    with (
        work.stages.stage("improve", "fine-tuning", settings.sft.epochs) as advance,
        work.tensorboard() as writer,
    ):

        def on_epoch(epoch: Epoch) -> None:
            writer.add_scalar("sft/loss", epoch.loss, epoch.number)
            writer.add_scalar("sft/held_out", epoch.held_out, epoch.number)
            advance(1)

        epochs = FineTuning(
            work.policy,
            split,
            settings.sft,
            settings.policy.micro_batch_tokens,
            settings.service_temperature,
            settings.seed,
            work.directory,
            on_epoch,
        ).run()
    chosen = best(epochs)
    examples = split.train.examples + split.held_out.examples
    shown = {one.feedback_id for one in work.snapshot.demonstrations}
    demonstrations = sum(one.feedback_id in shown for one in examples)
    found = FineTuned(
        demonstrations=demonstrations,
        corrections=len(examples) - demonstrations,
        left_out=len(usable(work.snapshot, settings)) - len(examples),
        users=len({one.user for one in examples}),
        length=split.train.weight / float(split.train.weights.sum()),
        epochs=epochs,
        chosen=chosen,
        fall_low=fall_low(split, epochs[0], epochs[chosen], work.generator(1)),
    )
    work.record("improve", RoundMetrics(sft=found))
    return found
