"""Pairs to learn from: of many answers that the served version gives to a prompt, the two whose comparison would teach
the reward model most (active learning).

They are chosen for being uncertain, so choices on them say little about how often a version wins: their prompts are
only ones that train.
"""

import torch
from torch import Tensor

from learner.reward.linear_reward_model import LinearRewardModel
from learner.round.review.canary import too_quiet
from learner.round.review.offered import sample_answers, to_review
from learner.round.review.prompts import training_prompts
from learner.round.workspace import Workspace

# Number of the random draw of the answers; the canary's are below.
DRAW = 992


def offer_active_pairs(work: Workspace, reward_model: LinearRewardModel) -> None:
    """Offers people pairs of the served version's answers, instead of those that earlier rounds offered."""
    store, answers = work.store, work.settings.review.active_answers
    active = store.policies.active()
    # The round's engine and reward model are of its reference.
    if active.reference_version != work.round.reference_version or too_quiet(store, work.settings):
        return
    prompts, version = training_prompts(work), active.version
    if not prompts:
        return
    asked = [prompt for prompt in prompts for _ in range(answers)]
    with work.stages.stage("review", "sampling answers to learn from", 2) as advance:
        samples = sample_answers(work, version, asked, DRAW)
        advance(1)
        scores = reward_model.member_scores(work.features_of(samples, reward_model.spec))
        advance(1)
    pairs = []
    for prompt, (one, other) in zip(prompts, most_disputed(scores, answers), strict=True):
        if samples[one].token_ids != samples[other].token_ids:
            pairs.append(to_review(work, prompt, (version, samples[one]), (version, samples[other])))
    store.reviews.offer(work.round.id, "learn", pairs, fence=work.lease)


def most_disputed(scores: Tensor, answers: int) -> list[tuple[int, int]]:
    """For each prompt the columns of its two answers whose probabilities of a win differ most between the K members,
    from their scores (K, N * answers)."""
    by_prompt = scores.view(len(scores), -1, answers)
    won = torch.sigmoid(by_prompt[:, :, :, None] - by_prompt[:, :, None, :])
    best = won.var(dim=0).flatten(start_dim=1).argmax(dim=1)
    return [(n * answers + int(b) // answers, n * answers + int(b) % answers) for n, b in enumerate(best)]
