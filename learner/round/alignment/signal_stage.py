"""The signal stage: do the votes say anything about the answers? If not, nothing is trained on them."""

import math
from dataclasses import replace

from torch import Tensor

from learner.reward.dataset import Dataset, of_groups, select, some_conversations
from learner.reward.evaluation import mean_accuracy
from learner.reward.sign_flips import signal_test
from learner.round.workspace import Workspace
from server.store.learning.records import Round
from server.store.learning.round_metrics import RoundMetrics, SignalTest


def test_signal(work: Workspace, dataset: Dataset, features: Tensor) -> SignalTest:
    """The test on the votes of shown answers; a resumed round has it already, unless an earlier version made it."""
    if (stored := work.round.metrics.signal) and not math.isnan(stored.level):
        return stored
    reward, error, generator = work.settings.reward, work.settings.gate.signal_p, work.generator(1)
    votes, conversations = dataset.shown
    there_are, some = len(votes), some_conversations(votes, reward.signal_votes, generator)
    votes, conversations = select(votes, some), of_groups(conversations, some)
    # Each model is tested with an error of its own: what another one could not see does not count against it.
    origins, ours = work.store.policies.origins(), work.round.reference_version
    alike = {reference for reference, origin in origins.items() if origin == origins[ours]}
    rounds = [one for one in work.store.rounds.page() if one.reference_version in alike and one.id != work.round.id]
    earlier = open_test(rounds)
    with work.stages.stage("signal", "testing the votes for a signal"):
        signal = signal_test(features, votes, conversations, work.spec, reward, error, earlier, there_are)
        signal = replace(signal, accuracy=mean_accuracy(features, votes, work.spec, reward, generator))
    work.record("snapshot", RoundMetrics(signal=signal))
    return signal


def open_test(rounds: list[Round]) -> SignalTest | None:
    """The newest test of these rounds, newest first, if it was not passed: the next one shares its error."""
    last = next((test for each in rounds if (test := each.metrics.signal)), None)
    return None if last is None or last.passed or math.isnan(last.level) else last
