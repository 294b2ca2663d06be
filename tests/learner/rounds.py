"""What a whole round needs besides the learner: a store with votes, a reference, and an engine without vLLM."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from learner.gate import Verdict
from learner.rollout import Sample
from learner.settings import LearnerSettings
from server.manifest import new_staging, publish, write_manifest
from server.records import Generation, PointerAction, Prompt, Span
from server.shared.dtype import DtypeName
from server.store import FeedbackStore
from tests.learner.conftest import EOS, WORDS

LENGTH = 12


class TinyEngine:
    """What `learner.rollout.Engine` promises, without vLLM."""

    pushes = 0

    def __init__(self, directory: Path, settings: LearnerSettings, dtype: DtypeName, max_model_len: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.temperature = settings.service_temperature

    def push(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        type(self).pushes += 1
        self.model.load_state_dict({name: tensor.float() for name, tensor in weights}, strict=False)

    def sample(self, prompts: list[Prompt], seed: int) -> list[Sample]:
        generator = torch.Generator().manual_seed(seed)
        return [
            draw(self.model, prompt.token_ids, prompt.max_tokens, self.temperature, generator) for prompt in prompts
        ]

    def close(self) -> None:
        pass


@torch.no_grad()
def draw(model: Any, prompt: list[int], max_tokens: int, temperature: float, generator: torch.Generator) -> Sample:
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < max_tokens and EOS not in tokens:
        log_pi = (model(torch.tensor([prompt + tokens])).logits[0, -1] / temperature).log_softmax(0)
        tokens.append(int(torch.multinomial(log_pi.exp(), 1, generator=generator)))
        logprobs.append(float(log_pi[tokens[-1]]))
    return Sample(prompt, tokens, logprobs, " ".join(map(str, tokens)), "stop" if EOS in tokens else "length")


def low_words(sample: Sample) -> float:
    """The voters' taste: words of the vocabulary's lower half."""
    return sum(token < WORDS // 2 for token in sample.token_ids) / len(sample.token_ids)


def vote(
    store: FeedbackStore,
    model: Any,
    count: int,
    taste: Callable[[Sample], float],
    seed: int = 0,
    user: str = "ann",
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        prompt = torch.randint(3, WORDS, (6,), generator=generator).tolist()
        conversation = store.create_conversation(user, f"question {number}")
        samples = [draw(model, prompt, LENGTH, temperature, generator) for temperature in (0.7, 1.0)]
        comparison, *responses = store.begin_comparison(
            user, conversation, message="?", replica_id="r", policy_versions=("v0000", "v0000"),
            prompt_token_ids=prompt, temperatures=(0.7, 1.0), max_tokens=LENGTH, seeds=(None, None),
        )  # fmt: skip
        for response, sample in zip(responses, samples, strict=True):
            span = Span(0, len(sample.token_ids), "v0000")
            reason: Any = sample.finish_reason
            store.finish_response(response, Generation(sample.token_ids, sample.logprobs, sample.text, reason, [span]))
        better = taste(samples[0]) - taste(samples[1])
        store.submit_choice(user, comparison, "A" if better > 0 else "B" if better < 0 else "TIE")


def make_reference(data_dir: Path, model_directory: Path) -> None:
    final = data_dir / "policies" / "v0000"
    staging = new_staging(final)
    shutil.copytree(model_directory, staging, dirs_exist_ok=True)
    write_manifest(staging, version="v0000", kind="full", base_version="v0000", reference_version="v0000")
    publish(staging, final)
    store = FeedbackStore.open(data_dir)
    store.registry.register_reference()
    store.close()


def make_version(data_dir: Path, version: str, active: PointerAction | None = None) -> None:
    """A copy of the reference under another name."""
    final = data_dir / "policies" / version
    staging = new_staging(final)
    shutil.copytree(data_dir / "policies" / "v0000", staging, dirs_exist_ok=True)
    write_manifest(staging, version=version, kind="full", base_version=version, reference_version="v0000")
    publish(staging, final)
    store = FeedbackStore.open(data_dir)
    store.registry.register_policy(
        version, kind="full", state="rejected", parent_version="v0000", reference_version="v0000", round_id=None,
        reward_model_version=None, metrics={}, reason="The win rate may be chance.",
    )  # fmt: skip
    if active:
        store.registry.activate_policy(version, actor="learner", action=active)
    store.close()


def settings(data_dir: Path, **changes: Any) -> LearnerSettings:
    values: dict[str, Any] = {
        "data_dir": data_dir,
        "lease_seconds": 0.5,
        "load_timeout_seconds": 0.5,
        "min_prompts": 8,
        "reward": {"permutations": 39, "reference_answers": 16},
        "dtype": "float32",
        "ppo": {"steps": 2, "episodes": 16, "lora_rank": 4, "learning_rate": 3e-3},
        # Eighty votes on a model that knows nothing: what a round does is tested here, not whether it should.
        "gate": {"refits": 100, "candidates": 2, "prompts": 12, "answers": 1, "signal_p": 0.2},
    }
    return LearnerSettings(**{**values, **changes})


def passing(candidates: Any, *_: Any) -> Verdict:
    return Verdict(candidates[-1], [])
