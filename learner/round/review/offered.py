"""Sampled answers as pairs to review."""

from learner.model.rollout import SampledAnswer, draw_seed
from learner.round.review.prompts import ReviewPrompt
from learner.round.workspace import Workspace
from server.store.chats.records import FinishReason, OfferedAnswer, OfferedReview


def sample_answers(work: Workspace, version: str, prompts: list[ReviewPrompt], draw: int) -> list[SampledAnswer]:
    """A published version's answer to each prompt; others in each round, even of the same version."""
    work.push(version)
    seed = draw_seed(work.settings.seed, draw + 1_000 * work.round.watermark)
    return work.engine.sample([prompt.asked for prompt in prompts], seed)


def to_review(
    work: Workspace, prompt: ReviewPrompt, one: tuple[str, SampledAnswer], other: tuple[str, SampledAnswer]
) -> OfferedReview:
    """The pair of two answers to the prompt, each with its version."""
    return OfferedReview(
        prompt.conversation_id,
        prompt.user,
        prompt.messages,
        prompt.asked.token_ids,
        (_offered(*one), _offered(*other)),
        work.settings.service_temperature,
        prompt.asked.max_tokens,
        prompt.asked.system,
        prompt.asked.stop,
    )


def _offered(version: str, sample: SampledAnswer) -> OfferedAnswer:
    reasons: dict[str, FinishReason] = {"stop": "stop", "stop_sequence": "stop_sequence"}
    reason = reasons.get(sample.finish_reason, "length")
    return OfferedAnswer(version, sample.token_ids, sample.logprobs, sample.text, reason)
