"""A tiny model of a family in the learner's engine, beside the same model in the trainer: do the two stay one policy?

    python -m tests.families.engine FAMILY DIRECTORY [bfloat16]

Writes the model into the directory, an empty one. Prints JSON lines, each with what was measured so far: the largest
difference between the engine's and the trainer's log-probabilities in nats, as served (`served`), with random adapters
pushed (`lora`), and with all weights changed and pushed (`full`); and how far the adapters moved the answers (`moved`).
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPTS = [[5 + 7 * number % 110 for number in range(12)], [9, 8, 7]]
SEEDS = {"served": 1, "lora": 2, "full": 3}


def measure(family: str, directory: Path, dtype: Any) -> Iterator[dict[str, float]]:
    """See above. An error of vLLM's, of PEFT's or of ours is raised."""
    from learner.improve_settings import PolicySettings
    from learner.process import set_environment
    from learner.settings import LearnerSettings

    settings = LearnerSettings.from_values({"dtype": dtype, "service_temperature": 0.85})
    set_environment(settings)

    import torch

    from learner.model.policy import TrainablePolicy
    from server.shared.model.dtype import torch_dtype
    from tests.families.configs import save

    save(family, directory)
    policy, full = (
        TrainablePolicy.create(
            directory, PolicySettings(train=train, lora_rank=4), torch_dtype(dtype), torch.device("cpu")
        )
        for train in ("lora", "full")
    )

    from learner.model.passes import policy_logprobs
    from learner.model.rollout import RolloutEngine, to_rollout
    from server.shared.model.context import context_length
    from server.store.chats.records import Prompt

    engine = RolloutEngine(directory, settings, dtype, context_length(directory, 128))
    prompts = [Prompt("", prompt, 10) for prompt in PROMPTS]

    def difference(policy: TrainablePolicy, seed: int) -> float:
        rollout = to_rollout(engine.sample(prompts, seed))
        own = policy_logprobs(policy, rollout.tokens, settings.service_temperature, 2048)
        return round(float((own - rollout.behavior_logprobs)[rollout.tokens.response_mask].abs().max()), 5)

    yield {"served": difference(full, SEEDS["served"])}
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.normal_(std=0.15)
    engine.push(policy.engine_weights())
    yield {"lora": difference(policy, SEEDS["lora"]), "moved": difference(full, SEEDS["lora"])}
    with torch.no_grad():
        for parameter in full.parameters:
            parameter.add_(torch.randn_like(parameter) * (0.1 * parameter.abs().mean() + 0.01))
    engine.push(full.engine_weights())
    yield {"full": difference(full, SEEDS["full"])}


if __name__ == "__main__":
    found: dict[str, float] = {}
    for more in measure(sys.argv[1], Path(sys.argv[2]), (*sys.argv[3:], "float32")[0]):
        found |= more
        print(json.dumps(found), flush=True)
    # vLLM's threads would keep the process.
    os._exit(0)
