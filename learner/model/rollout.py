"""Rollouts: responses sampled by vLLM in the learner's own process, from weights pushed in memory.

Training uses exactly what was sampled: the token ids that vLLM drew (never text tokenised again), with the
log-probabilities of that draw (`processed_logprobs`: at the service temperature; the default is raw, at temperature 1).
top_p is 1 and top_k off, since either would make the ratios wrong. `push` empties the prefix cache: its keys and values
belong to the old weights.

On a GPU that the trainer uses too, the engine sleeps from one batch to the next push: its memory is the trainer's.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.model.device import resolve_device
from learner.model.engine_classes import unchanged_classes
from learner.model.forward import Tokens, to_tokens
from learner.process import set_environment
from learner.settings import LearnerSettings
from server.shared.model.dtype import DtypeName, engine_uses_gpu
from server.shared.model.packing import keep_experts_packed, pack_tied_head
from server.shared.model.rotary import rotate_every_head
from server.shared.model.seeds import keep_seeds
from server.shared.model.stopping import StoppingText
from server.shared.model.text import ChatText
from server.store.chats.records import Prompt


@dataclass(frozen=True)
class SampledAnswer:
    """One sampled response. `logprobs` are mu's: the engine's own."""

    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str

    @property
    def ended(self) -> bool:
        """Whether the model ended it, or a stop sequence came, rather than the length limit."""
        return self.finish_reason in ("stop", "stop_sequence")


@dataclass(frozen=True)
class Rollout:
    """A sampled batch: `tokens` of B responses, behavior_logprobs (B, T), `ended` (B,), which stays on the CPU as the
    scores do."""

    samples: list[SampledAnswer]
    tokens: Tokens
    behavior_logprobs: Tensor
    ended: Tensor

    def to(self, device: torch.device) -> "Rollout":
        """The same batch for passes on `device`."""
        return replace(self, tokens=self.tokens.to(device), behavior_logprobs=self.behavior_logprobs.to(device))


def draw_seed(seed: int, draw: int) -> int:
    """The seed of a round's numbered draw; a round makes fewer than a thousand."""
    return seed * 1_000 + draw


def draw_generator(seed: int, draw: int) -> torch.Generator:
    """The generator of a round's numbered draw: the same however often the round is resumed."""
    return torch.Generator().manual_seed(draw_seed(seed, draw))


def to_rollout(samples: list[SampledAnswer]) -> Rollout:
    """Pads samples to tensors, on the CPU."""
    tokens = to_tokens([s.prompt for s in samples], [s.token_ids for s in samples])
    behavior_logprobs = torch.zeros(tokens.response_mask.shape)
    for row, sample in enumerate(samples):
        behavior_logprobs[row, : len(sample.logprobs)] = torch.tensor(sample.logprobs)
    return Rollout(samples, tokens, behavior_logprobs, torch.tensor([s.ended for s in samples]))


class RolloutEngine:
    """vLLM on the reference's directory; `push` gives it other weights, and wakes it after `sleep`. Call `close` when
    done."""

    def __init__(self, directory: Path, settings: LearnerSettings, dtype: DtypeName, max_model_len: int) -> None:
        set_environment(settings)
        from vllm import LLM
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

        rotate_every_head(RotaryEmbedding)
        self._temperature = settings.service_temperature
        self._text = ChatText.load(directory, settings.trust_remote_code)
        self._can_sleep = engine_uses_gpu() and resolve_device(settings.learner_device).type == "cuda"
        self._asleep = False
        with unchanged_classes():
            self._llm: Any = LLM(
                model=str(directory),
                trust_remote_code=settings.trust_remote_code,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=64,
                gpu_memory_utilization=settings.learner_gpu_memory_share,
                # A round samples a few dozen batches: compiling would cost more than it saves.
                enforce_eager=True,
                enable_sleep_mode=self._can_sleep,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                distributed_executor_backend="uni",
                use_tqdm_on_load=False,
                disable_log_stats=True,
                seed=settings.seed,
            )
        self._llm.collective_rpc(lambda worker: keep_seeds(worker.model_runner))
        self._llm.collective_rpc(lambda worker: keep_experts_packed(worker.model_runner.get_model()))

    def push(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replaces all weights, by their checkpoint names, and clears the prefix cache."""
        # The cache comes last: a push needs memory for the weights of a layer.
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.collective_rpc(lambda worker: pack_tied_head(worker.model_runner.get_model()))
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("The engine kept cached prefixes of the old weights.")

    def sample(
        self, prompts: list[Prompt], seed: int, temperature: float | None = None, first: int = 0
    ) -> list[SampledAnswer]:
        """One response to each prompt, up to the length that users were shown (the prompt's logged max_tokens), at the
        service's temperature or another. `first`: how many prompts of the same draw come before these."""
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt.token_ids} for prompt in prompts],
            [
                SamplingParams(
                    temperature=self._temperature if temperature is None else temperature,
                    top_p=1.0,
                    top_k=0,
                    max_tokens=prompt.max_tokens,
                    logprobs=0,
                    # Only to find a stop sequence; the text is from server.shared.model.
                    detokenize=bool(prompt.stop),
                    skip_special_tokens=False,
                    stop=list(prompt.stop),
                    seed=seed * 100_003 + number,
                )
                for number, prompt in enumerate(prompts, start=first)
            ],
            use_tqdm=False,
        )
        return [self._sample(prompt, output.outputs[0]) for prompt, output in zip(prompts, outputs, strict=True)]

    def sleep(self) -> None:
        """Frees the engine's memory on a GPU until the next push, if the trainer is there too."""
        if self._can_sleep:
            # Level 1 keeps all but the cache on the CPU. Level 2 would lose tensors that are neither parameters nor
            # buffers, which some families have (docs/decisions/0035-devices.md).
            self._llm.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """Frees the engine's memory."""
        del self._llm
        gc.collect()

    def _sample(self, prompt: Prompt, output: Any) -> SampledAnswer:
        token_ids = list(output.token_ids)
        logprobs = [entry[token].logprob for token, entry in zip(token_ids, output.logprobs, strict=True)]
        if not prompt.stop:
            text = self._text.text(token_ids)
            return SampledAnswer(prompt.token_ids, token_ids, logprobs, text, output.finish_reason)
        shown = StoppingText(self._text.stream(prompt.token_ids), prompt.stop)
        text = shown.text(token_ids) + shown.rest()
        if not shown.stopped:
            # vLLM's own text may have the sequence where ours does not: then it has cut the answer.
            reason = "length" if isinstance(output.stop_reason, str) else output.finish_reason
            return SampledAnswer(prompt.token_ids, token_ids, logprobs, text, reason)
        count = shown.token_count
        return SampledAnswer(prompt.token_ids, token_ids[:count], logprobs[:count], text, "stop_sequence")
