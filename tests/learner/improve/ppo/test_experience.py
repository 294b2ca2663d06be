"""Values of a rollout: the critic starts as the reward model, and other rows of a micro-batch do not affect a row's
values. Every tensor is created on the device of the tokens.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from learner.improve.adam import Adam
from learner.improve.policy_gradient import UpdateStats, draw_minibatches
from learner.improve.ppo.critic import critic_features, make_critic
from learner.improve.ppo.experience import to_experience
from learner.improve.ppo.trainer import ppo_update
from learner.improve_settings import PolicySettings, PPOSettings
from learner.model.features import FeatureSpec
from learner.model.forward import Tokens, run_trunk, token_logprobs
from learner.model.passes import ReferencePass, policy_logprobs, reference_pass
from learner.model.policy import TrainablePolicy
from learner.model.rollout import Rollout, SampledAnswer, to_rollout
from learner.reward.linear_reward_model import LinearRewardModel
from learner.reward.standardiser import Standardiser
from tests.learner.conftest import HIDDEN

WIDTH = HIDDEN + 1


def reward_model() -> LinearRewardModel:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(WIDTH, generator=generator)
    return LinearRewardModel(
        spec=FeatureSpec(meaning=(2,)),
        standardiser=Standardiser(torch.zeros(WIDTH), torch.ones(WIDTH)), weights=weights,
        members=weights.expand(2, -1), member_bias=torch.zeros(2), bias=0.75, low=-3.0, high=3.0, thumb_bar=0.0,
        bad_bar=0.0, eta=0.5, temperature=0.0, l2=1.0, prompt_mean=torch.zeros(HIDDEN),
        prompt_scale=torch.full((HIDDEN,), 0.1),
    )  # fmt: skip


def sample(token_ids: list[int]) -> SampledAnswer:
    return SampledAnswer([5, 6], token_ids, [0.0] * len(token_ids), "", "length")


def judge_rollout(
    policy: TrainablePolicy,
    reward_model: LinearRewardModel,
    rollout: Rollout,
    temperature: float,
    budget: int,
    groups: list[torch.Tensor] | None = None,
) -> ReferencePass:
    """The reference's pass over a rollout, with the critic's features."""
    prefix = partial(critic_features, reward_model=reward_model)
    return reference_pass(policy, rollout.tokens, reward_model.spec, temperature, budget, groups, prefix)


def test_the_critic_begins_as_the_reward_head_without_its_length() -> None:
    critic = make_critic(reward_model())
    assert critic(torch.zeros(WIDTH)).item() == 0.75
    only_length = torch.zeros(WIDTH)
    only_length[-1] = 9.0
    assert critic(only_length).item() == 0.75
    first = torch.zeros(WIDTH)
    first[0] = 1.0
    assert critic(first).item() == 0.75 + reward_model().weights[0].item()


def test_the_value_before_the_first_token_comes_from_the_prompt(model_directory: Path) -> None:
    policy = TrainablePolicy.create(model_directory, PolicySettings(lora_rank=4), torch.float32, torch.device("cpu"))
    prompts = [[5, 6], [9, 10, 11], [9, 10, 11]]
    rollout = to_rollout([SampledAnswer(p, [7, 8, n], [0.0] * 3, "", "length") for n, p in enumerate(prompts)])
    model = reward_model()
    judged = judge_rollout(policy, model, rollout, 0.85, 100)
    with torch.no_grad():
        states = [policy.model.get_base_model()(torch.tensor([p]), output_hidden_states=True) for p in prompts]
    expected = torch.stack([model.prompt_features(each.hidden_states[2][0, -1]) for each in states])
    assert torch.allclose(judged.prefix_features[:, 0, :-1], expected, atol=1e-5)
    values = make_critic(model)(judged.prefix_features)[:, 0].tolist()
    assert values[1] == pytest.approx(values[2], abs=1e-5)
    assert abs(values[0] - values[1]) > 0.01


def test_other_rows_do_not_affect_a_rows_prefix_features(model_directory: Path) -> None:
    policy = TrainablePolicy.create(model_directory, PolicySettings(lora_rank=4), torch.float32, torch.device("cpu"))
    rollout = to_rollout([sample([7, 8, 9]), sample([10, 11, 12, 13, 14, 15, 16, 17])])
    alone = judge_rollout(policy, reward_model(), rollout, 0.85, 1)
    together = judge_rollout(policy, reward_model(), rollout, 0.85, 100)
    mask = rollout.tokens.response_mask
    assert torch.allclose(alone.prefix_features[mask], together.prefix_features[mask], atol=1e-5)
    assert torch.allclose(alone.ref_logprobs[mask], together.ref_logprobs[mask], atol=1e-5)


def test_without_prefixes_the_rest_is_the_same(model_directory: Path) -> None:
    policy = TrainablePolicy.create(model_directory, PolicySettings(lora_rank=4), torch.float32, torch.device("cpu"))
    rollout = to_rollout([sample([7, 8, 9]), sample([10, 11])])
    whole = judge_rollout(policy, reward_model(), rollout, 0.85, 2)
    bare = reference_pass(policy, rollout.tokens, reward_model().spec, 0.85, 2)
    assert torch.equal(bare.features, whole.features)
    assert bare.prefix_features.shape == (2, 3, 0)


def test_an_update_creates_every_tensor_on_the_device_of_its_tokens(model_directory: Path) -> None:
    # Stands in for a GPU: a tensor created without a device is on `meta`, which cannot be mixed with another.
    ppo = PPOSettings(learning_rate=1e-9, critic_learning_rate=1e-9)
    policy = TrainablePolicy.create(model_directory, PolicySettings(lora_rank=4), torch.float32, torch.device("cpu"))
    shared = [5, 6, 7, 8, 9, 10, 11, 12]
    rollout = to_rollout([SampledAnswer([*shared, n], [20] * n, [-3.0] * n, "", "length") for n in (2, 5, 3, 4)])
    model = reward_model()
    critic = make_critic(model)
    optimizer = Adam([(policy.parameters, ppo.learning_rate), (list(critic.parameters()), 1e-9)], ppo.adam_epsilon)

    def logprobs_of(part: Tokens) -> torch.Tensor:
        return token_logprobs(policy.model, run_trunk(policy.model, part)[0], part, 0.85)

    def update() -> UpdateStats:
        judged = judge_rollout(policy, model, rollout, 0.85, 2)
        old_logprobs = policy_logprobs(policy, rollout.tokens, 0.85, 2)
        batch = to_experience(rollout, judged, old_logprobs, model.scores(judged.features), critic, 0.1, ppo)
        passes = draw_minibatches(rollout.tokens, ppo.epochs, ppo.minibatches, torch.Generator().manual_seed(0))
        return ppo_update(logprobs_of, critic, optimizer, batch, ppo, passes, 2, sharing=True)

    # The first update creates Adam's state, which is up to torch.
    expected = update()
    with torch.device("meta"):
        found = update()
    assert found.optimizer_steps == 2
    # The gradient's norm is 13: float32 rounds it to some parts in a million.
    assert asdict(found) == pytest.approx(asdict(expected), rel=5e-6, abs=1e-5)
