"""Whether engine and trainer are one policy for this model, before a round depends on it.

PPO compares them at every step, but its steps are small: what does not reach the engine, or only in part, may hide in
rounding. So here the policy is first moved far from its reference, and only then pushed and compared.
"""

from collections.abc import Callable
from dataclasses import replace

from learner.model.mismatch import MISMATCH_LIMITS, mismatch
from learner.model.passes import policy_logprobs
from learner.model.policy import TrainablePolicy
from learner.model.rollout import Rollout, RolloutEngine, draw_seed, to_rollout
from learner.settings import LearnerSettings
from server.store.chats.records import Prompt

# Answers that are compared, and their length in tokens.
ANSWERS, LENGTH = 8, 16
# How far the policy is moved: root mean square of the change of log-probabilities, in nats. In bfloat16 a matrix with a
# thirtieth of the variance still shows.
FAR = 2.0
# The first size of the random change (`TrainablePolicy.disturb`); each next one is larger by the factor.
FIRST_CHANGE, FACTOR, CHANGES = 0.05, 1.6, 14
# Numbers of the draws: see `draw_seed`.
AS_SERVED, AS_PUSHED = 990, 991


def check_engine(
    policy: TrainablePolicy, engine: RolloutEngine, prompts: list[Prompt], settings: LearnerSettings
) -> None:
    """Checks a policy that equals its reference, and an engine that has it; both have it afterwards.

    Raises RuntimeError if the engine computes the model otherwise than the trainer does, or if weights that are pushed
    do not reach it."""
    limit = settings.policy.mismatch_limit or MISMATCH_LIMITS[policy.model.dtype]
    asked = [replace(prompt, max_tokens=min(LENGTH, prompt.max_tokens)) for prompt in prompts[:ANSWERS]]

    def sample(draw: int) -> Rollout:
        return to_rollout(engine.sample(asked, draw_seed(settings.seed, draw))).to(policy.model.device)

    def gap(rollout: Rollout) -> float:
        logprobs = policy_logprobs(
            policy, rollout.tokens, settings.service_temperature, settings.policy.micro_batch_tokens
        )
        return mismatch(logprobs, rollout.behavior_logprobs, rollout.tokens.response_mask).rms

    served = sample(AS_SERVED)
    if (rms := gap(served)) > limit:
        raise RuntimeError(_sentence(policy, "The engine computes", rms, limit))
    move_away(policy, lambda: gap(served), settings.seed)
    engine.push(policy.engine_weights())
    rms = gap(sample(AS_PUSHED))
    policy.reset()
    engine.push(policy.engine_weights())
    if rms > limit:
        raise RuntimeError(_sentence(policy, "After weights were pushed, the engine computes", rms, limit))


def move_away(policy: TrainablePolicy, distance: Callable[[], float], seed: int) -> None:
    """Changes the policy at random, more and more, until `distance` to the reference, in nats, is FAR. Raises
    RuntimeError if it never is."""
    for number in range(CHANGES):
        policy.disturb(FIRST_CHANGE * FACTOR**number, seed)
        if distance() >= FAR:
            return
    raise RuntimeError("Random changes of the trained weights do not change this model's answers: it cannot learn.")


def _sentence(policy: TrainablePolicy, who: str, rms: float, limit: float) -> str:
    family = policy.model.config.model_type
    return (
        f"{who} this model ({family}) otherwise than the trainer does: log-probabilities differ by {rms:.3f} (root "
        f"mean square), more than {limit}. It can be served but not improved; docs/models.md has families that can."
    )
