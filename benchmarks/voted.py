"""Data directories whose votes simulated voters cast on answers of a version, sampled by an engine of this process."""

import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pool import CHOICES, shown

from clients.demo.voter import FLIPPED, TASTES, Answer
from server.store.chats.records import Prompt

FLIPS, VOTERS = 0.1, 10
# The temperatures of a comparison's two answers, and of answers to questions that nobody voted on.
TEMPERATURES, UNSEEN_TEMPERATURE = (0.7, 1.0), 0.85
UNSEEN_DRAW = 424_242
# More than the longest question takes.
QUESTION_TOKENS = 192

Sampled = Callable[[list[Prompt], float, int], Any]


def make_data(model: Path, data: Path) -> None:
    """A data directory with the model as its reference, as a server makes it at its first start."""
    from server.reference.reference import prepare_reference
    from server.store.store import Store

    data.mkdir(parents=True)
    prepare_reference(data, str(model), lambda line: print(line, file=sys.stderr))
    store = Store.open(data)
    store.policies.register_reference()
    store.close()


def choose(taste: str, chance: random.Random, a: Answer, b: Answer) -> Any:
    """The choice of a voter of this taste, who sometimes names the other answer."""
    choice = TASTES[taste].choice(a, b)
    return CHOICES[FLIPPED[choice] if chance.random() < FLIPS else choice]


def cast(data: Path, taste: str, chance: random.Random, asked: list[str], tokens: int, draw: int) -> None:
    """Samples two answers of the served version to each question, and votes on them: comparisons, as the server
    records them. `tokens` is the answers' length limit."""
    from server.store.chats.records import Generation, Span
    from server.store.store import Store

    store = Store.open(data)
    version = store.policies.active().version
    prompts, sample = served(data, version, asked, tokens)
    first, second = (sample(prompts, temperature, draw + slot) for slot, temperature in enumerate(TEMPERATURES))
    for place, (question, prompt, both) in enumerate(zip(asked, prompts, zip(first, second, strict=True), strict=True)):
        user = f"voter{place % VOTERS}"
        conversation = store.conversations.create(user, question)
        comparison, *responses = store.responses.begin_comparison(
            user, conversation, message=question, replica_id="benchmark", policy_versions=(version, version),
            prompt_token_ids=prompt.token_ids, temperatures=TEMPERATURES, max_tokens=tokens, seeds=(None, None),
        )  # fmt: skip
        for response, one in zip(responses, both, strict=True):
            reason: Any = "stop" if one.ended else "length"
            span = [Span(0, len(one.token_ids), version)]
            store.responses.finish(response, Generation(one.token_ids, one.logprobs, one.text, reason, span))
        store.feedback.submit_choice(user, comparison, choose(taste, chance, *map(shown, both)))
    store.close()


def scores(data: Path, version: str, taste: str, asked: list[str], tokens: int) -> list[float]:
    """How much the taste likes a version's answers to questions that nobody voted on."""
    prompts, sample = served(data, version, asked, tokens)
    return [TASTES[taste].score(shown(one)) for one in sample(prompts, UNSEEN_TEMPERATURE, UNSEEN_DRAW)]


def wins(after: list[float], before: list[float]) -> str:
    """One digit for each question: 0 lost, 1 drawn, 2 won."""
    return "".join(str((new > old) * 2 + (new == old)) for new, old in zip(after, before, strict=True))


def win_rate(digits: str) -> float:
    """The share of questions won, a draw is half."""
    return round(sum(map(int, digits)) / 2 / len(digits), 4)


def served(data: Path, version: str, asked: list[str], tokens: int) -> tuple[list[Prompt], Sampled]:
    """The prompts of these questions, and a function that samples a version's answers to prompts at a temperature."""
    engine, dtype = _engine_of(data, tokens)

    from learner.model.policy import published_weights
    from server.shared.model.dtype import torch_dtype
    from server.shared.model.text import ChatText

    reference = data / "policies" / "v0000"
    base = None if version == "v0000" else reference
    engine.push(published_weights(data / "policies" / version, base, torch_dtype(dtype)))
    text = ChatText.load(reference)

    def sample(prompts: list[Prompt], temperature: float, draw: int) -> Any:
        return engine.sample(prompts, draw, temperature)

    return [Prompt("", text.prompt([{"role": "user", "content": one}], 0), tokens) for one in asked], sample


@cache
def _engine_of(data: Path, tokens: int) -> Any:
    """This process's engine, and its dtype."""
    from learner.process import set_environment
    from learner.settings import LearnerSettings
    from server.shared.model.dtype import resolve_dtype

    settings = LearnerSettings(data_dir=data)
    set_environment(settings)
    dtype = resolve_dtype(settings.dtype).name

    from learner.model.rollout import RolloutEngine

    return RolloutEngine(data / "policies" / "v0000", settings, dtype, QUESTION_TOKENS + tokens), dtype
