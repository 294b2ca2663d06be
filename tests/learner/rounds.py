"""What a whole round needs apart from the learner: a store with votes, a reference, and an engine without vLLM."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from learner.gate.rules import Verdict
from learner.model.rollout import SampledAnswer
from learner.progress import Stages
from learner.round.report import Report
from learner.round.run import run_once
from learner.settings import LearnerSettings
from server.shared.model.dtype import DtypeName
from server.store.chats.records import Generation, Prompt, Span
from server.store.files.manifest import new_version
from server.store.learning.records import PointerAction
from server.store.store import Store
from tests.learner.conftest import EOS, PAD, WORDS

LENGTH = 12


class TinyEngine:
    """The interface of `learner.model.rollout.RolloutEngine`, without vLLM."""

    pushes = 0

    def __init__(self, directory: Path, settings: LearnerSettings, dtype: DtypeName, max_model_len: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.temperature = settings.service_temperature
        self.asleep = False

    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        type(self).pushes += 1
        self.asleep = False
        self.model.load_state_dict({name: tensor.float() for name, tensor in weights}, strict=False)

    def sample(
        self, prompts: list[Prompt], seed: int, temperature: float | None = None, first: int = 0
    ) -> list[SampledAnswer]:
        assert not self.asleep, "no weights were pushed since the engine fell asleep"
        generator = torch.Generator().manual_seed(seed)
        return draw(
            self.model, [prompt.token_ids for prompt in prompts], [prompt.max_tokens for prompt in prompts],
            [self.temperature if temperature is None else max(temperature, 1e-4)] * len(prompts), generator,
        )  # fmt: skip

    def sleep(self) -> None:
        self.asleep = True

    def close(self) -> None:
        pass


@torch.no_grad()
def draw(
    model: Any, prompts: list[list[int]], max_tokens: list[int], temperatures: list[float], generator: torch.Generator
) -> list[SampledAnswer]:
    """One answer to each prompt, all in one batch: a pass over the tiny model costs the same for one as for many."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    heat = torch.tensor(temperatures)[:, None]
    logprobs = torch.empty(len(prompts), 0)
    for _ in range(max(max_tokens)):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits[:, -1]
        log_pi = (logits / heat).log_softmax(1)
        drawn = torch.multinomial(log_pi.exp(), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], 1)
        mask = torch.cat([mask, torch.ones_like(drawn)], 1)
        logprobs = torch.cat([logprobs, log_pi.gather(1, drawn)], 1)
    drawn_tokens: list[list[int]] = tokens[:, longest:].tolist()
    return [to_sample(*each) for each in zip(prompts, drawn_tokens, logprobs.tolist(), max_tokens, strict=True)]


def to_sample(prompt: list[int], tokens: list[int], logprobs: list[float], max_tokens: int) -> SampledAnswer:
    """Cut after its EOS, or at its maximum length."""
    tokens = tokens[:max_tokens]
    ended = EOS in tokens
    length = tokens.index(EOS) + 1 if ended else max_tokens
    tokens = tokens[:length]
    return SampledAnswer(prompt, tokens, logprobs[:length], " ".join(map(str, tokens)), "stop" if ended else "length")


def low_words(sample: SampledAnswer) -> float:
    """The voters' taste: words of the vocabulary's lower half."""
    return sum(token < WORDS // 2 for token in sample.token_ids) / len(sample.token_ids)


def vote(
    store: Store,
    model: Any,
    count: int,
    taste: Callable[[SampledAnswer], float],
    seed: int = 0,
    user: str = "ann",
) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, WORDS, (count, 6), generator=generator).tolist()
    twice = [prompt for prompt in prompts for _ in range(2)]
    drawn = iter(draw(model, twice, [LENGTH] * len(twice), [0.7, 1.0] * count, generator))
    for number, prompt in enumerate(prompts):
        conversation = store.conversations.create(user, f"question {number}")
        samples = [next(drawn), next(drawn)]
        comparison, *responses = store.responses.begin_comparison(
            user, conversation, message=f"question {number}", replica_id="r", policy_versions=("v0000", "v0000"),
            prompt_token_ids=prompt, temperatures=(0.7, 1.0), max_tokens=LENGTH, seeds=(None, None),
        )  # fmt: skip
        for response, sample in zip(responses, samples, strict=True):
            span = Span(0, len(sample.token_ids), "v0000")
            reason: Any = sample.finish_reason
            store.responses.finish(response, Generation(sample.token_ids, sample.logprobs, sample.text, reason, [span]))
        better = taste(samples[0]) - taste(samples[1])
        store.feedback.submit_choice(user, comparison, "A" if better > 0 else "B" if better < 0 else "TIE")


def make_reference(data_dir: Path, model_directory: Path) -> None:
    final = data_dir / "policies" / "v0000"
    info = {"model": str(model_directory)}
    with new_version(final, kind="full", reference_version="v0000", info=info) as staging:
        shutil.copytree(model_directory, staging, dirs_exist_ok=True)
    store = Store.open(data_dir)
    store.policies.register_reference()
    store.close()


def make_version(data_dir: Path, version: str, active: PointerAction | None = None) -> None:
    """A copy of the reference under another name."""
    final = data_dir / "policies" / version
    with new_version(final, kind="full", reference_version="v0000") as staging:
        shutil.copytree(data_dir / "policies" / "v0000", staging, dirs_exist_ok=True)
    store = Store.open(data_dir)
    store.policies.register(
        version, kind="full", state="rejected", parent_version="v0000", reference_version="v0000", round_id=None,
        reward_model_version=None, metrics={}, reason="The win rate may be chance.",
    )  # fmt: skip
    if active:
        store.policies.activate(version, actor="learner", action=active)
    store.close()


def settings(data_dir: Path, **changes: Any) -> LearnerSettings:
    values: dict[str, Any] = {
        "data_dir": data_dir,
        "lease_seconds": 0.5,
        "load_timeout_seconds": 0.5,
        "min_prompts": 8,
        "reward": {"reference_answers": 16, "fold_repeats": 1},
        "dtype": "float32",
        # Answers of a dozen tokens, which would have their own budget.
        "policy": {"lora_rank": 4, "kl_per_token": 10.0},
        "ppo": {"steps": 2, "episodes": 16, "learning_rate": 3e-3},
        "review": {"pairs": 8, "active_pairs": 1},
        # Eighty votes on a random model: tests check what a round does, not whether it should.
        "gate": {"refits": 100, "candidates": 2, "prompts": 12, "answers": 1, "confirm_prompts": 8, "signal_p": 0.99},
    }
    return LearnerSettings(**{**values, **changes})


def run(data_dir: Path, **changes: Any) -> Report:
    """Runs or resumes a round with these settings, in silence."""
    return run_once(settings(data_dir, **changes), Stages(Console(quiet=True)))


def passing(candidates: Any, *_: Any, **__: Any) -> Verdict:
    return Verdict(candidates[-1], [])


def waiting(candidates: Any, *_: Any, **__: Any) -> Verdict:
    """The judge is not certain: people decide."""
    return Verdict(candidates[-1], [], canary=True)
