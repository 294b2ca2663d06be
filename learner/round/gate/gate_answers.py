"""What the gate judges: versions' answers to prompts, with the features that a judge reads; and the file of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from learner.improve.candidates import candidate
from learner.model.features import FeatureSpec
from learner.model.kl import kl_k1
from learner.model.mismatch import PUSH_ANSWERS, check_push, mismatch
from learner.model.passes import policy_logprobs, reference_pass
from learner.model.rollout import SampledAnswer, draw_seed, to_rollout
from learner.round.workspace import Workspace
from server.shared.whole_file import whole_file
from server.store.chats.records import Prompt
from server.store.files.residue import ANSWERS, keeping, sweep


@dataclass(frozen=True)
class Answers:
    """One version's answers, M to each of N prompts, grouped by prompt: features (N * M, F), and for a candidate kl (N
    * M,), nats to the reference; both on the CPU, where the judge is."""

    samples: list[SampledAnswer]
    features: Tensor
    kl: Tensor

    def __add__(self, more: "Answers") -> "Answers":
        features, kl = torch.cat([self.features, more.features]), torch.cat([self.kl, more.kl])
        return Answers(self.samples + more.samples, features, kl)


@dataclass(frozen=True)
class Asked:
    """Prompts, and each version's answers to them by its name: the same number to each prompt."""

    prompts: list[Prompt]
    answers: dict[str, Answers]

    def __add__(self, more: "Asked") -> "Asked":
        """Those of `more`, after these if there are any."""
        before = self.answers
        answers = {name: before[name] + each if name in before else each for name, each in more.answers.items()}
        return Asked(self.prompts + more.prompts, answers)


def step_name(step: int) -> str:
    """The name of a candidate's answers."""
    return f"step {step}"


def published_answers(work: Workspace, version: str, prompts: list[Prompt], seed: int, spec: FeatureSpec) -> Answers:
    """Answers of a published version."""
    work.push(version)
    samples = work.engine.sample(prompts, seed)
    return Answers(samples, work.features_of(samples, spec), torch.zeros(0))


def candidate_answers(work: Workspace, step: int, prompts: list[Prompt], seed: int, spec: FeatureSpec) -> Answers:
    """Answers of the candidate after `step` updates. Raises RuntimeError if the engine cannot have had its weights."""
    settings, temperature = work.settings.policy, work.settings.service_temperature
    work.policy.load(candidate(work.directory, step))
    work.engine.push(work.policy.engine_weights())
    rollout = to_rollout(work.engine.sample(prompts, seed)).to(work.policy.model.device)
    budget = settings.micro_batch_tokens
    judged = reference_pass(work.policy, rollout.tokens, spec, temperature, budget)
    # The trainer's log-probabilities, not the engine's: rounding adds to each token's, and so to a long answer's KL. In
    # float32 it adds nothing, and some answers are enough to check that the engine has the trained weights.
    exact = work.policy.model.dtype == torch.float32
    rows = torch.arange(len(rollout.tokens), device=work.policy.model.device)[: PUSH_ANSWERS if exact else None]
    seen = policy_logprobs(work.policy, rollout.tokens, temperature, budget, [rows])
    gap = mismatch(seen[rows], rollout.behavior_logprobs[rows], rollout.tokens.response_mask[rows])
    check_push(gap, settings.mismatch_limit, work.policy.model.dtype)
    kl = kl_k1(rollout.behavior_logprobs if exact else seen, judged.ref_logprobs).sum(dim=1)
    return Answers(rollout.samples, judged.features, kl.cpu())


def ask(
    work: Workspace,
    spec: FeatureSpec,
    opponents: dict[str, str],
    steps: list[int],
    prompts: list[Prompt],
    answers: int,
    draw: int,
    advance: Callable[[int], None],
) -> Asked:
    """Answers of the opponents, versions by role, and of the candidates after these steps: `answers` to each prompt,
    all with the same draw. A version with two roles is asked once."""
    asking = [prompt for prompt in prompts for _ in range(answers)]
    seed, published, ours = draw_seed(work.settings.seed, draw), dict[str, Answers](), dict[str, Answers]()
    for version in dict.fromkeys(opponents.values()):
        published[version] = published_answers(work, version, asking, seed, spec)
        advance(1)
    for step in steps:
        ours[step_name(step)] = candidate_answers(work, step, asking, seed, spec)
        advance(1)
    return Asked(prompts, {role: published[version] for role, version in opponents.items()} | ours)


def keep_answers(work: Workspace, asked: list[Asked]) -> None:
    """Writes every judged answer, one prompt's of all versions on a line. Lines of conversations that were deleted
    since the round began are left out."""
    with keeping(work.settings.data_dir), whole_file(work.directory / ANSWERS) as file:
        for row, line in enumerate(chain.from_iterable(map(partial(_lines, work), asked))):
            # The conversation comes first: `sweep` reads it there to delete the lines of deleted conversations.
            json.dump({"conversation_id": line.pop("conversation_id"), "row": row, **line}, file, ensure_ascii=False)
            file.write("\n")
    sweep(work.settings.data_dir)


def _lines(work: Workspace, asked: Asked) -> Iterator[dict[str, Any]]:
    """The first answer to each prompt, then the second to each."""
    answers = len(next(iter(asked.answers.values())).samples) // len(asked.prompts)
    for number, (place, prompt) in product(range(answers), enumerate(asked.prompts)):
        line = {name: asdict(each.samples[place * answers + number]) for name, each in asked.answers.items()}
        for answer in line.values():
            del answer["prompt"], answer["logprobs"]
        yield {
            "conversation_id": prompt.conversation_id,
            "prompt": work.decode(prompt.token_ids),
            "prompt_token_ids": prompt.token_ids,
            **line,
        }
