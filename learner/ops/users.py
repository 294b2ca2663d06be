"""How each user votes: what an operator reads before putting somebody in quarantine. Ids and numbers, no texts.

Three tests, each corrected for the number of users (Holm), each at 5 %:
- too fast: most votes within a minute, against a Poisson count. Its mean is the median user's fastest minute, or four
  if that is more: two answers can be read in a quarter of a minute.
- one slot: the share of A among choices that name a winner, against a fair coin (exact, two-sided).
- against the others: held-out verdicts (`learner.reward.voter_reliability`) that a model fitted without this user's
  votes gets right, against a fair coin (exact, one-sided). For a user whose taste
  differs it is right about half of the time.
The last two also reduce weights in a round's fit, which uses evidence from all users at once and so suspects sooner.
"""

from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median
from time import time
from typing import Any

import torch
from torch import Tensor

from learner.model.device import resolve_device
from learner.model.features import FeatureCache, feature_spec
from learner.reward.dataset import Dataset, to_dataset
from learner.reward.exact_tests import at_least, at_most, holm
from learner.reward.voter_reliability import LEVEL, Verdicts, one_sided, scaled, verdicts, weigh_voters
from learner.round.token_ids import TokenIds
from learner.round.workspace import cache_key
from learner.settings import LearnerSettings
from server.shared.model.dtype import resolve_dtype, torch_dtype
from server.shared.model.load import load_model
from server.shared.model.text import ChatText
from server.store.chats.records import Snapshot
from server.store.files.manifest import verify
from server.store.files.residue import cache_directory, sweep
from server.store.learning.records import QuarantineEvent
from server.store.store import Store

QUICK = 4.0
KINDS = ("choices", "thumbs", "corrections", "demonstrations")


@dataclass(frozen=True)
class UserFigures:
    """One user's votes. Shares are None if there are no votes to compute them from."""

    user: str
    votes: dict[str, int]
    # Most votes within any 60 seconds.
    fastest_minute: int
    share_of_a: float | None
    # How often a model fitted without this user's votes gets them right, and on how many.
    agreement: float | None
    verdicts: int
    # Of all votes' weight in a round that began now.
    weight_share: float
    suspicions: list[str] = field(default_factory=list)
    # The smallest corrected p-value of the three tests.
    p_value: float = 1.0
    quarantined: QuarantineEvent | None = None


def read_users(settings: LearnerSettings) -> list[UserFigures]:
    """All users with a current vote, suspicious ones first. Raises ServiceError if no server has started yet."""
    with closing(Store.open(settings.data_dir)) as store:
        reference = store.policies.active().reference_version
        quarantined = store.quarantine.current()
        token_ids = TokenIds(store, reference, settings)
        everything = token_ids.snapshot(store.snapshots.take(limit=settings.max_votes))
        counted = token_ids.snapshot(store.snapshots.take(everything.watermark, settings.max_votes, quarantined))
    if not len(everything):
        return []
    reader = VoterAnalysis(settings, reference, everything.deletions)
    dataset = reader.dataset(everything)
    # Users in quarantine are compared with the others, but not the others with them.
    heard = torch.tensor([float(user not in quarantined) for user in dataset.users])
    votes = scaled(dataset.votes, heard[dataset.voters])
    found = verdicts(
        reader.features(dataset), votes, dataset.voters, dataset.compared, len(dataset.users), reader.spec,
        settings.reward, torch.Generator().manual_seed(settings.seed),
    )  # fmt: skip
    return figures(everything, dataset, found, reader.weights(reader.dataset(counted)), quarantined)


class VoterAnalysis:
    """Reads voted answers with the reference, if no round has read them yet."""

    def __init__(self, settings: LearnerSettings, reference_version: str, deletions: int) -> None:
        directory = settings.data_dir / "policies" / reference_version
        verify(directory)
        self._dtype = resolve_dtype(settings.dtype).name
        self._model: Any = load_model(
            directory,
            settings.trust_remote_code,
            dtype=torch_dtype(self._dtype),
            device_map=resolve_device(settings.learner_device),
        )
        self._text = ChatText.load(directory, settings.trust_remote_code)
        self._cache_key, self._settings = cache_key(directory), settings
        self._cache = cache_directory(settings.data_dir, deletions)
        self.spec = feature_spec(self._model, self._text, settings.reward.layers)

    def dataset(self, snapshot: Snapshot) -> Dataset:
        settings = self._settings
        return to_dataset(
            snapshot, time(), settings.gate.judge_share, settings.reward, self._text.answer, settings.max_model_len,
            self._text.embeddings,
        )  # fmt: skip

    def features(self, dataset: Dataset) -> Tensor:
        """(N, F) of the dataset's answers."""
        if not dataset.answers:
            return torch.zeros(0, 0)
        budget = self._settings.policy.at(self._dtype).micro_batch_tokens
        with closing(FeatureCache.open(self._cache, self._cache_key, self.spec, self._dtype)) as cache:
            features = cache.get(dataset.answers, self._model, self.spec, budget, lambda n: None)
        # An answer may have been deleted in the meantime.
        sweep(self._settings.data_dir)
        return features

    def weights(self, dataset: Dataset) -> dict[str, float]:
        """Each user's share of the weight of all votes, as in a round."""
        reward, generator = self._settings.reward, torch.Generator().manual_seed(self._settings.seed)
        if reward.weigh_voters:
            dataset, _ = weigh_voters(dataset, self.features(dataset), self.spec, reward, generator)
        weight = torch.cat([dataset.votes.choice_weight, dataset.votes.thumb_weight])
        totals = torch.zeros(len(dataset.users)).scatter_add_(0, dataset.voters, weight)
        return dict(zip(dataset.users, (totals / totals.sum().clamp(min=1e-9)).tolist(), strict=True))


def figures(
    snapshot: Snapshot,
    dataset: Dataset,
    found: Verdicts,
    weights: dict[str, float],
    quarantined: dict[str, QuarantineEvent],
) -> list[UserFigures]:
    """All users' figures: users who fail a test first, by p-value, then those with the most votes."""
    counts, times = counts_and_times(snapshot)
    number = {user: row for row, user in enumerate(dataset.users)}
    users = list(counts)
    fastest = [fastest_minute(times[user]) for user in users]
    usual = max(median(fastest), QUICK)

    def column(values: Tensor) -> list[int]:
        return [int(values[number[user]]) if user in number else 0 for user in users]

    heard, right, sided, named_a = map(column, (found.heard, found.right, found.sided, found.named_a))
    slots = one_sided(found)
    p_values = {
        "too fast": holm([at_least(most, usual) for most in fastest]),
        "one slot": [slots[number[user]] if user in number else 1.0 for user in users],
        "against the others": holm([at_most(r, h) if h else None for r, h in zip(right, heard, strict=True)]),
    }

    def says(i: int) -> dict[str, str]:
        return {
            "too fast": f"too fast: {fastest[i]} votes in a minute",
            "one slot": f"one slot: A in {named_a[i]} of {sided[i]} choices",
            "against the others": f"against the others: they predict {right[i]} of {heard[i]}",
        }

    rows = [
        UserFigures(
            user=user,
            votes={kind: counts[user][kind] for kind in KINDS},
            fastest_minute=fastest[i],
            share_of_a=named_a[i] / sided[i] if sided[i] else None,
            agreement=right[i] / heard[i] if heard[i] else None,
            verdicts=heard[i],
            weight_share=weights.get(user, 0.0),
            suspicions=[f"{says(i)[name]} (p = {p[i]:.1g})" for name, p in p_values.items() if p[i] < LEVEL],
            p_value=min(p[i] for p in p_values.values()),
            quarantined=quarantined.get(user),
        )
        for i, user in enumerate(users)
    ]
    return sorted(rows, key=lambda one: (not one.suspicions, one.p_value, -sum(one.votes.values())))


def counts_and_times(snapshot: Snapshot) -> tuple[dict[str, Counter[str]], dict[str, list[float]]]:
    """For each user, the number of votes of each kind, and the times of all of them."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    times: dict[str, list[float]] = defaultdict(list)
    for kind in KINDS:
        for vote in getattr(snapshot, kind):
            counts[vote.user][kind] += 1
            times[vote.user].append(vote.create_time)
    return counts, times


def fastest_minute(times: list[float]) -> int:
    """The highest number of these times, in seconds, within any 60 seconds."""
    most, first, times = 0, 0, sorted(times)
    for last, time_ in enumerate(times):
        while time_ - times[first] >= 60:
            first += 1
        most = max(most, last - first + 1)
    return most
