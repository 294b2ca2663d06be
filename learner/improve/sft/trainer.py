"""Fine-tunes a policy on examples, as long as the loss on those held out falls.

The loss is that of the served policy, at the temperature of the service: the negative log-likelihood of an answer's
tokens, as a weighted mean over tokens. A pass's order depends only on the seed and its number, so a killed training
resumes from its last state (`learner.improve.state`) as if it had not been killed.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from learner.improve.adam import Adam
from learner.improve.candidates import candidate, drop_candidates
from learner.improve.sft.examples import Examples, Split, numbered
from learner.improve.state import load_state, save_state, start_over_unless
from learner.improve_settings import SFTSettings
from learner.model.forward import answer_logprobs, micro_batches, shares_prefix
from learner.model.passes import policy_logprobs
from learner.model.policy import TrainablePolicy
from learner.model.rollout import draw_generator
from server.store.learning.fine_tuned import Epoch

# Draws of the bootstrap over topics.
RESAMPLES = 2000


@dataclass(frozen=True)
class FineTuning:
    """What to fine-tune: a policy on examples. The best weights are left in `directory`, and `on_epoch` hears of each
    pass."""

    policy: TrainablePolicy
    split: Split
    settings: SFTSettings
    # Tokens in one forward pass, including padding.
    budget: int
    temperature: float
    seed: int
    directory: Path
    on_epoch: Callable[[Epoch], None]

    def run(self) -> list[Epoch]:
        """Trains until the loss has not fallen for some passes; resumes after the last one saved. Returns all passes,
        before them the policy as it began. `best` is the one whose weights were kept."""
        settings, directory = self.settings, self.directory
        optimizer = Adam([(self.policy.parameters, settings.learning_rate)], settings.adam_epsilon)
        start_over_unless(self.split.train.digest + self.split.held_out.digest, directory)
        epochs = [Epoch(**epoch) for epoch in load_state(directory, optimizer)]
        drop_candidates(directory, after=len(epochs) - 1)
        epochs = epochs or [self._epoch(0, math.nan, math.nan)]
        for epoch in epochs[1:]:
            self.on_epoch(epoch)
        while len(epochs) <= settings.epochs and len(epochs) - best(epochs) <= settings.patience:
            epochs.append(self._pass(optimizer, len(epochs)))
            self._keep(optimizer, epochs)
            self.on_epoch(epochs[-1])
        return epochs

    def held_out_losses(self) -> Tensor:
        """(N,) the loss of each example held out, in nats, under the policy as it is."""
        tokens = self.split.held_out.tokens.to(self.policy.model.device)
        return -policy_logprobs(self.policy, tokens, self.temperature, self.budget).sum(dim=1).cpu()

    def _epoch(self, number: int, loss: float, grad_norm: float) -> Epoch:
        """The figures after a pass."""
        held_out, losses = self.split.held_out, self.held_out_losses()
        mean = float((losses * held_out.weights).sum()) / held_out.weight
        return Epoch(number, loss, mean, (losses / held_out.lengths).tolist(), grad_norm)

    def _pass(self, optimizer: Adam, number: int) -> Epoch:
        """One pass over the examples in a new order."""
        train, batch = self.split.train, self.settings.batch
        order = torch.randperm(len(train), generator=draw_generator(self.seed, number))
        made = [self._step(optimizer, train[some.sort().values]) for some in order.split(batch)]
        loss, norm = (sum(values) / len(made) for values in zip(*made, strict=True))
        return self._epoch(number, loss, norm)

    def _step(self, optimizer: Adam, examples: Examples) -> tuple[float, float]:
        """One optimiser step; returns its loss and the gradient's norm."""
        model, total = self.policy.model, 0.0
        tokens = examples.tokens.to(model.device)
        # The weight of as many examples on average, so that a batch of those that count little makes a small step.
        weight = self.split.train.weight * len(examples) / len(self.split.train)
        for rows in micro_batches(tokens, self.budget, sharing=shares_prefix(model)):
            logprobs = answer_logprobs(model, tokens[rows], self.temperature)
            loss = weighted_nll(logprobs, examples.weights.to(model.device)[rows], weight)
            loss.backward()
            optimizer.gather()
            total += float(loss.detach())
        return total, optimizer.step(self.settings.max_grad_norm)

    def _keep(self, optimizer: Adam, epochs: list[Epoch]) -> None:
        """Saves the weights, if they are the best so far, and the state to resume from."""
        last, before = len(epochs) - 1, best(epochs[:-1])
        if best(epochs) == last:
            self.policy.save(candidate(self.directory, last))
        save_state(self.directory, [asdict(epoch) for epoch in epochs], optimizer)
        if best(epochs) == last:
            shutil.rmtree(candidate(self.directory, before), ignore_errors=True)


def best(epochs: list[Epoch]) -> int:
    """The number of the pass after which the loss on the examples held out was lowest; 0 if it never fell."""
    return min(range(len(epochs)), key=lambda number: epochs[number].held_out)


def weighted_nll(logprobs: Tensor, weights: Tensor, weight: float) -> Tensor:
    """The weighted sum of the losses of all tokens, divided by `weight`: a weighted mean over tokens if that is the
    weighted number of tokens. `logprobs` (B, T) are zero beyond an answer, `weights` (B,) are of answers."""
    return -(logprobs.sum(dim=1) * weights).sum() / weight


def fall_low(split: Split, before: Epoch, after: Epoch, generator: torch.Generator) -> float:
    """By how much the loss on the examples held out fell, at least, in nats per token: a one-sided 95 % bound from a
    bootstrap over their topics."""
    held_out, topics = split.held_out, numbered(split.topics)
    tokens = held_out.weights * held_out.lengths
    falls = tokens * (torch.tensor(before.each) - torch.tensor(after.each))
    count = int(topics.max()) + 1
    of_topics = [torch.zeros(count).scatter_add_(0, topics, each) for each in (falls, tokens)]
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    fell, all_tokens = (each[drawn].sum(dim=1) for each in of_topics)
    return float(torch.quantile(fell / all_tokens, 0.05))
