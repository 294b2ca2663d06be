"""One PPO update of the learner, by stage, and of a peer: seconds, response tokens per second, peak memory.

    python benchmarks/ppo.py MODEL_DIR [--updates 3] [--readings 1] [--ablate]
        [--peer-python PYTHON --peer-script SCRIPT]

An update is 32 answers of 64 tokens and four passes over them, with one optimiser step per pass: sampling, the
reference's pass, the policy's pass, training, in this machine's dtype. All answers have the same length, because the
model's end token is set to one that it never samples. The timed loop is `learner.improve.ppo.trainer.PPO` itself.

The peer is an optional program with its own environment that takes `MODEL_DIR --updates N`, does the same work and
prints one JSON line with `seconds_per_update` and `response_tokens_per_s`. With several readings the two take turns,
since a machine's speed varies, and the result is the ratio of their medians. `--ablate` repeats the learner's update
with one optimisation left out at a time. Each run is a separate process, one after another; its peak memory is the
kernel's measurement. Prints one JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from endless import copy_without_end

EPISODES, TOKENS, EPOCHS = 32, 64, 4
SECONDS = 900
# The optimisation that is left out, and its replacement.
ABLATIONS = {
    "adapters": "all weights are trained",
    "shared-pass": "a trunk of its own for the critic, trained along",
    "response-logits": "logits at every position",
    "engine": "transformers' generate samples",
    "prefix": "what all prompts begin with is computed for each",
    "attention": "PyTorch's fused attention also for short rows",
    "memory": "freed memory goes back to the kernel",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--readings", type=int, default=1)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-script", type=Path)
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--run", choices=["whole", *ABLATIONS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(updates(arguments.model, arguments.updates, arguments.run)))
        return
    common = [str(arguments.model), "--updates", str(arguments.updates)]
    commands = {"whole": [sys.executable, __file__, *common, "--run", "whole"]}
    if arguments.peer_python and arguments.peer_script:
        commands["peer"] = [str(arguments.peer_python), str(arguments.peer_script), *common]
    turns = [name for _ in range(arguments.readings) for name in commands]
    results: dict[str, list[dict[str, Any]]] = {}
    for name in [*turns, *(ABLATIONS if arguments.ablate else ())]:
        found = measured(commands.get(name, [sys.executable, __file__, *common, "--run", name]))
        show(name, found)
        results.setdefault(name, []).append(found)
    if "peer" in results:
        whole, peer = (median(one["seconds_per_update"] for one in results[name]) for name in ("whole", "peer"))
        print(f"the peer takes {peer / whole:.2f} times as long", file=sys.stderr)
    print(json.dumps({"benchmark": "ppo", "updates": arguments.updates, "results": results}))


def measured(command: list[str]) -> dict[str, Any]:
    """The last JSON line that a program printed, with its peak memory."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        end = time.monotonic() + SECONDS
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > end:
                process.kill()
                sys.exit(f"{' '.join(command)} did not finish within {SECONDS} s")
            time.sleep(0.2)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed with {process.returncode}")
        output.seek(0)
        lines = [line for line in output if line.startswith("{")]
    return {**json.loads(lines[-1]), "peak_gib": round(usage.ru_maxrss / 2**20, 2)}


def show(name: str, result: dict[str, Any]) -> None:
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.get("stages", {}).items())
    print(
        f"{name:<16} {result['seconds_per_update']:6.1f} s an update  {result['response_tokens_per_s']:6.1f} tokens/s  "
        f"{result['peak_gib']:5.2f} GiB  {stages}",
        file=sys.stderr,
    )


# One run, in a separate process


def updates(model: Path, count: int, ablation: str) -> dict[str, Any]:
    """Makes `count` updates; the seconds of each stage are means over them."""
    from learner.improve_settings import PolicySettings, PPOSettings
    from learner.process import keep_freed_memory, set_environment
    from learner.settings import LearnerSettings

    policy_settings = PolicySettings(train="full" if ablation == "adapters" else "lora")
    ppo = PPOSettings(
        steps=count,
        episodes=EPISODES,
        epochs=EPOCHS,
        minibatches=1,
        # Small steps, so that no pass stops early; nothing is saved in between.
        learning_rate=1e-6,
        patience=count,
        save_every=count,
        checkpoint_every=count + 1,
    )
    settings = LearnerSettings(policy=policy_settings, ppo=ppo)
    set_environment(settings)
    if ablation != "memory":
        keep_freed_memory()

    import torch

    import learner.improve.ppo.trainer as ppo_trainer
    import learner.improve.training as training
    import learner.model.forward as forward
    import learner.model.passes as passes
    from learner.improve.base import ExperienceSource, Task
    from learner.improve.budget import Budget
    from learner.model.features import FeatureSpec, default_layers
    from learner.model.policy import TrainablePolicy
    from learner.model.rollout import RolloutEngine
    from server.shared.model.dtype import resolve_dtype, torch_dtype

    dtype = resolve_dtype(settings.dtype).name
    policy_settings = policy_settings.at(dtype)

    with tempfile.TemporaryDirectory() as work:
        directory = Path(work) / "model"
        copy_without_end(model, directory)
        policy = TrainablePolicy.create(directory, policy_settings, torch_dtype(dtype), torch.device("cpu"))
        prompts = questions(directory, EPISODES * count)
        engine: Any = RolloutEngine(directory, settings, dtype, max(len(p.token_ids) for p in prompts) + TOKENS + 1)
        spec = FeatureSpec(*default_layers(policy.model.config.num_hidden_layers))
        reward_model = random_head(spec, policy.model.config.hidden_size)
        if ablation == "prefix":
            forward.MIN_SHARED = 10**9
        if ablation == "attention":
            forward.EAGER_COLUMNS = 0
        if ablation == "engine":
            engine = Generating(policy, settings.service_temperature)
        if ablation == "response-logits":
            training.token_logprobs = everywhere(training.token_logprobs)  # type: ignore[attr-defined]
            passes.token_logprobs = everywhere(passes.token_logprobs)  # type: ignore[attr-defined]
        if ablation == "shared-pass":
            ppo_trainer.ppo_update = with_critic_trunk(
                ppo_trainer.ppo_update, directory, policy_settings.micro_batch_tokens
            )
        seconds = timed_stages(training, ppo_trainer, engine)
        started = time.perf_counter()
        source = ExperienceSource(engine, prompts, settings.service_temperature, 0)
        improver = ppo_trainer.PPO(ppo, policy_settings)
        budget = Budget(policy_settings.kl_budget)
        task = Task(policy, source, reward_model, budget, Path(work), lambda step: None)
        found = improver.improve(task)
        took = time.perf_counter() - started
    assert [step.length for step in found.steps] == [TOKENS] * count
    assert [step.optimizer_steps for step in found.steps] == [EPOCHS] * count
    stages = {name: round(total / count, 2) for name, total in seconds.items()}
    return {
        "seconds_per_update": round(took / count, 2),
        "response_tokens_per_s": round(count * EPISODES * TOKENS / took, 1),
        "stages": {**stages, "rest": round((took - sum(seconds.values())) / count, 2)},
    }


def timed_stages(training: Any, ppo_trainer: Any, engine: Any) -> dict[str, float]:
    """Seconds by stage, filled in as the stages run."""
    seconds: dict[str, float] = {}

    def timed(owner: Any, attribute: str, stage: str) -> None:
        call = getattr(owner, attribute)

        def timing(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started

        setattr(owner, attribute, timing)

    timed(engine, "push", "push")
    timed(engine, "sample", "sample")
    timed(training, "reference_pass", "reference")
    timed(training, "policy_logprobs", "policy")
    timed(ppo_trainer, "ppo_update", "train")
    return seconds


def questions(directory: Path, count: int) -> list[Any]:
    from transformers import AutoTokenizer

    from server.store.chats.records import Prompt

    tokenizer = AutoTokenizer.from_pretrained(directory)
    asked = [[{"role": "user", "content": f"Tell me a fact about the number {number}."}] for number in range(count)]
    ids: Any = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in asked]
    return [Prompt(str(number), list(one), TOKENS) for number, one in enumerate(ids)]


def random_head(spec: Any, hidden: int) -> Any:
    import torch

    from learner.reward.linear_reward_model import LinearRewardModel
    from learner.reward.standardiser import Standardiser

    width = len(spec.words + spec.meaning) * hidden + 1
    weights = torch.randn(width, generator=torch.Generator().manual_seed(0)) / width**0.5
    return LinearRewardModel(
        spec=spec, standardiser=Standardiser(torch.zeros(width), torch.ones(width)), weights=weights,
        members=weights.expand(32, -1), member_bias=torch.zeros(32), bias=0.0, low=-3.0, high=3.0,
        thumb_bar=0.0, bad_bar=0.0, eta=0.5, temperature=0.0, l2=1.0, prompt_mean=torch.zeros(width - 1),
        prompt_scale=torch.zeros(width - 1),
    )  # fmt: skip


# Ablations: the same update without one optimisation


class Generating:
    """Samples with transformers instead of the engine."""

    def __init__(self, policy: Any, temperature: float) -> None:
        self._policy, self._temperature = policy, temperature

    def push(self, weights: Iterator[Any]) -> None:
        pass

    def sleep(self) -> None:
        pass

    def sample(self, prompts: list[Any], seed: int) -> list[Any]:
        import torch

        from learner.model.rollout import SampledAnswer

        torch.manual_seed(seed)
        width = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(p.token_ids)) + p.token_ids for p in prompts])
        mask = torch.tensor([[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts])
        with torch.no_grad():
            found = self._policy.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=self._temperature, top_k=0, top_p=1.0,
                max_new_tokens=TOKENS, return_dict_in_generate=True, output_scores=True, pad_token_id=0,
            )  # fmt: skip
            scores = torch.stack(found.scores, dim=1).float().log_softmax(-1)
        tokens = found.sequences[:, width:]
        logprobs = scores.gather(2, tokens[..., None]).squeeze(-1)
        return [
            SampledAnswer(prompt.token_ids, row.tolist(), log.tolist(), "", "length")
            for prompt, row, log in zip(prompts, tokens, logprobs, strict=True)
        ]


def everywhere(token_logprobs: Callable[..., Any]) -> Callable[..., Any]:
    """Computes logits at every position, of which most are discarded."""
    import torch

    def call(model: Any, hidden: Any, tokens: Any, temperature: float) -> Any:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        logits = base.get_output_embeddings()(hidden).float() / temperature
        logprobs = logits.log_softmax(-1)[:, :-1].gather(2, tokens.input_ids[:, 1:, None]).squeeze(-1)
        start = tokens.prompt_lengths[:, None] - 1 + torch.arange(tokens.response_mask.shape[1])
        return torch.where(tokens.response_mask, logprobs.gather(1, start.clamp(max=logprobs.shape[1] - 1)), 0.0)

    return call


def with_critic_trunk(ppo_update: Callable[..., Any], directory: Path, budget: int) -> Callable[..., Any]:
    """Adds the cost of a separate critic model: one more forward and backward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    from learner.model.forward import micro_batches, run_trunk, shares_prefix
    from server.shared.model.dtype import resolve_dtype, torch_dtype

    critic = AutoModelForCausalLM.from_pretrained(directory, dtype=torch_dtype(resolve_dtype("auto").name))

    def call(logprobs_of: Any, head: Any, optimizer: Any, batch: Any, *rest: Any) -> Any:
        def both(tokens: Any) -> Any:
            hidden, _ = run_trunk(critic, tokens)
            return logprobs_of(tokens) + 0.0 * hidden.float().sum()

        with torch.no_grad():
            for rows in micro_batches(batch.tokens, budget, sharing=shares_prefix(critic)):
                run_trunk(critic, batch.tokens[rows])
        return ppo_update(both, head, optimizer, batch, *rest)

    return call


if __name__ == "__main__":
    main()
