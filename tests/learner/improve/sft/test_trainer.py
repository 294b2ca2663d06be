"""The loss of supervised fine-tuning against literals, and its training on a bandit and on a tiny model."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learner.improve.adam import Adam
from learner.improve.sft.examples import Example, Examples, Split
from learner.improve.sft.trainer import FineTuning, best, fall_low, weighted_nll
from learner.improve_settings import PolicySettings, SFTSettings
from learner.model.policy import TrainablePolicy
from server.store.learning.fine_tuned import Epoch


def test_the_loss_is_a_weighted_mean_over_tokens() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    losses = [weighted_nll(logits.log_softmax(0)[target].view(1, 1), torch.ones(1), 1.0) for target in range(3)]
    assert [loss.item() for loss in losses] == pytest.approx([2.407606, 1.407606, 0.407606], abs=1e-6)

    def rows() -> torch.Tensor:
        """Targets [2, 0], and [2] with padding."""
        logprobs = logits.log_softmax(0)
        return torch.stack([logprobs[[2, 0]], torch.stack([logprobs[2], logprobs[2] * 0])])

    loss = weighted_nll(rows(), torch.ones(2), 3.0)
    assert loss.item() == pytest.approx(1.074273, abs=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-0.243303, 0.244728, -0.001426], abs=1e-6)
    weights = torch.tensor([1.0, 0.5])
    assert weighted_nll(rows(), weights, 2.5).item() == pytest.approx(1.207606, abs=1e-6)
    # Micro-batches of any split add up to the same.
    parts = [weighted_nll(rows()[[row]], weights[[row]], 2.5).item() for row in range(2)]
    assert sum(parts) == pytest.approx(1.207606, abs=1e-6)


def test_it_reaches_the_shares_of_a_bandit() -> None:
    logits = nn.Parameter(torch.zeros(3))
    optimizer = Adam([([logits], 0.05)], 1e-8)
    shown, losses = torch.tensor([0] * 6 + [1] * 3 + [2]), []
    for _ in range(400):
        loss = weighted_nll(logits.log_softmax(0)[shown][:, None], torch.ones(10), 10.0)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(100.0)
        losses.append(loss.item())
    assert (losses[0], losses[-1]) == pytest.approx((1.098612, 0.897946), abs=1e-5)
    assert logits.detach().softmax(0).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=1e-3)


def test_the_best_pass_has_the_lowest_loss_on_what_was_held_out() -> None:
    epochs = [Epoch(number, math.nan, loss, [], 1.0) for number, loss in enumerate([3.0, 2.75, 3.0])]
    assert best(epochs) == 1
    assert best([epochs[0], epochs[2]]) == 0


def examples(answers: list[list[int]]) -> Examples:
    found = [
        Example(str(number), "ann", str(number), str(number), ([4, 5 + number % 7], answer))
        for number, answer in enumerate(answers)
    ]
    return Examples(found, torch.ones(len(found)))


@pytest.fixture
def policy(model_directory: Path) -> TrainablePolicy:
    settings = PolicySettings(lora_rank=4).at("float32")
    return TrainablePolicy.create(model_directory, settings, torch.float32, torch.device("cpu"))


def tuning(policy: TrainablePolicy, directory: Path, split: Split, **settings: Any) -> FineTuning:
    return FineTuning(
        policy, split, SFTSettings(**{"learning_rate": 1e-2, **settings}), 1024, 1.0, 0, directory, lambda _: None
    )


def test_what_is_shown_carries_over_to_what_was_held_out(policy: TrainablePolicy, tmp_path: Path) -> None:
    split = Split(examples([[7, 8, 9, 2]] * 8), examples([[7, 8, 9, 2]] * 2), ["a", "b"])
    epochs = tuning(policy, tmp_path, split, epochs=5).run()
    assert [epoch.number for epoch in epochs] == [0, 1, 2, 3, 4, 5]
    chosen = best(epochs)
    assert epochs[chosen].held_out < 0.5 * epochs[0].held_out
    # Only the best weights are kept, and they are those.
    assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{chosen:03d}"]
    policy.load(tmp_path / f"step-{chosen:03d}")
    losses = tuning(policy, tmp_path, split).held_out_losses()
    assert losses.tolist() == pytest.approx([4 * loss for loss in epochs[chosen].each], rel=1e-5)


@torch.no_grad()
def favourite(policy: TrainablePolicy, prompt: list[int]) -> int:
    """The most likely next token."""
    return int(policy.model(torch.tensor([prompt])).logits[0, -1].argmax())


def test_it_stops_when_what_was_held_out_gets_worse(policy: TrainablePolicy, tmp_path: Path) -> None:
    favourites = [favourite(policy, prompt) for prompt in ([4, 5], [4, 6])]
    split = Split(examples([[7, 8, 9, 2]] * 8), examples([[word] for word in favourites]), ["a", "b"])
    epochs = tuning(policy, tmp_path, split, epochs=9, patience=2).run()
    assert (best(epochs), len(epochs)) == (0, 3)
    assert list(tmp_path.glob("step-*")) == []


def test_an_example_that_counts_nothing_changes_nothing(policy: TrainablePolicy, tmp_path: Path) -> None:
    shown, held_out = examples([[7, 8, 9, 2]] * 4 + [[30, 31, 32, 33]] * 4), examples([[7, 8, 9, 2]] * 2)
    ignored = Examples(shown.examples, torch.tensor([1.0] * 4 + [0.0] * 4))
    found = []
    for name, train in (("ignored", ignored), ("absent", ignored[torch.arange(4)])):
        (tmp_path / name).mkdir()
        policy.reset()
        found.append(tuning(policy, tmp_path / name, Split(train, held_out, ["a", "b"]), epochs=1).run()[1])
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
    assert found[0].held_out == pytest.approx(found[1].held_out, rel=1e-4)


def test_micro_batches_make_the_same_step(policy: TrainablePolicy, tmp_path: Path) -> None:
    split = Split(examples([[7, 8], [9, 10, 11, 2], [12], [13, 2]]), examples([[7, 8, 9, 2]] * 2), ["a", "b"])
    found = []
    for budget in (1, 1024):
        (tmp_path / str(budget)).mkdir()
        policy.reset()
        found.append(replace(tuning(policy, tmp_path / str(budget), split, epochs=1), budget=budget).run()[1])
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
    assert found[0].grad_norm == pytest.approx(found[1].grad_norm, rel=1e-5)
    assert found[0].held_out == pytest.approx(found[1].held_out, rel=1e-4)


def test_the_loss_on_what_was_held_out_is_weighted_as_the_training_is(policy: TrainablePolicy, tmp_path: Path) -> None:
    held_out = Examples(examples([[7, 8], [9, 10, 11, 2]]).examples, torch.tensor([1.0, 0.5]))
    [epoch] = tuning(policy, tmp_path, Split(examples([[7]]), held_out, ["a", "b"]), epochs=1).run()[:1]
    # Two tokens of weight 1 and four of weight a half.
    assert epoch.held_out == pytest.approx((2 * epoch.each[0] + 0.5 * 4 * epoch.each[1]) / 4, rel=1e-5)


def test_a_fall_is_sure_only_if_every_topic_of_few_shows_it() -> None:
    held_out = examples([[1, 1]] * 4)

    def bound(after: list[float], topics: list[str]) -> float:
        before = Epoch(0, 0.0, 2.0, [2.0] * 4, 0.0)
        split = Split(examples([[1]]), held_out, topics)
        return fall_low(split, before, Epoch(1, 0.0, 0.0, after, 0.0), torch.Generator().manual_seed(0))

    assert bound([1.5, 1.5, 1.0, 1.0], list("aabb")) == pytest.approx(0.5, abs=1e-6)
    # One of two topics got worse, if less than the other got better: on other topics it may be the other way round.
    assert bound([1.0, 1.0, 2.1, 2.1], list("aabb")) == pytest.approx(-0.1, abs=1e-6)
    assert bound([1.0, 1.0, 2.1, 1.0], list("abcd")) > 0
