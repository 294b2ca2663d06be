"""The number of votes from which a reward model with learned features beats a head on frozen ones.

    python benchmarks/crossover.py MODEL --work-dir DIR [--votes 200 1000] [--tastes short to-you]

Uses the pool of `benchmarks/study.py` (the same --work-dir). Votes are split as in a round. The frozen head is that of
a round. The other starts from its weights, with LoRA below it: the adapter starts at zero, and both are trained on the
same penalised likelihood, one epoch at a time. Measures accuracy against the taste on comparisons of unseen questions,
and seconds. Prints one JSON line last.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from pool import Cell, make_pool
from study import accuracy, unseen, unseen_answers, voted

from clients.demo.voter import TASTES

EPOCHS, BATCH, LEARNING_RATE, RANK = 3, 16, 2e-4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--votes", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--tastes", nargs="+", choices=list(TASTES), default=list(TASTES))
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve()
    pairs = make_pool(arguments.model, work, lambda line: print(line, file=sys.stderr))
    results = []
    for votes in arguments.votes:
        for taste in arguments.tastes:
            results.append(compare(work, Cell(taste, votes, 0.1, 0), pairs))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "crossover", "results": results}))


def compare(work: Path, cell: Cell, pairs: Any) -> dict[str, Any]:
    """Both models' accuracy; the adapted one's after every epoch."""
    import torch
    from transformers import AutoModelForCausalLM

    from learner.improve.adam import Adam
    from learner.model.features import extract
    from learner.model.forward import to_tokens
    from learner.model.policy import lora
    from learner.reward.linear_reward_model import LinearRewardModel
    from server.shared.model.dtype import MICRO_BATCH_TOKENS

    settings, dataset, features, spec = voted(work, cell, pairs)
    votes = dataset.train
    frozen = LinearRewardModel.fit(features, votes, spec, settings.reward, torch.Generator().manual_seed(cell.seed))
    a, b, outcome = unseen(work, pairs, cell.taste)

    found: dict[str, Any] = {"cell": cell.name, "trained_on": len(votes)}
    found["frozen"] = accuracy(frozen.scores(a), frozen.scores(b), outcome)[0]
    reference = AutoModelForCausalLM.from_pretrained(work / "pool" / "policies" / "v0000", dtype=torch.bfloat16)
    torch.manual_seed(cell.seed)
    backbone = lora(reference, RANK, 2 * RANK)
    head = torch.nn.Parameter(frozen.weights.clone())
    adapter = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = Adam([(adapter, LEARNING_RATE), ([head], LEARNING_RATE)], 1e-8)
    tested = unseen_answers(work, [pair for pair in pairs if not pair.seen])
    flat = [one for both in tested for one in both]
    tokens = to_tokens([prompt for prompt, _ in flat], [response for _, response in flat])
    found["adapted"], found["seconds"] = [], []
    generator = torch.Generator().manual_seed(cell.seed)
    for _ in range(EPOCHS):
        started = time.perf_counter()
        epoch(backbone, frozen, head, dataset.answers, votes, settings.reward.label_smoothing, optimizer, generator)
        found["seconds"].append(round(time.perf_counter() - started, 1))
        adapted = (
            frozen.standardiser(extract(backbone, tokens, spec, MICRO_BATCH_TOKENS["bfloat16"], lambda n: None))
            @ head.detach()
        )
        found["adapted"].append(accuracy(adapted[0::2], adapted[1::2], outcome)[0])
    return found


def epoch(
    backbone: Any, frozen: Any, head: Any, answers: Any, votes: Any, smoothing: float, optimizer: Any, generator: Any
) -> None:
    """One pass over the choices, with an optimiser step for every `BATCH` of them."""
    import torch

    from learner.model.features import pool
    from learner.model.forward import response_states, to_tokens
    from learner.reward.likelihood import choice_log_probs, choice_loss

    order = torch.randperm(len(votes.a), generator=generator)
    for batch in order.split(BATCH):
        total = votes.choice_weight[batch].sum()
        for part in batch.split(4):
            rows = torch.cat([votes.a[part], votes.b[part]]).tolist()
            tokens = to_tokens([answers[row][0] for row in rows], [answers[row][1] for row in rows])
            _, states = frozen.spec.states(backbone, tokens)
            features = pool(response_states(states, tokens), tokens.response_mask)
            a, b = (frozen.standardiser(features) @ head).split(len(part))
            log_probs = choice_log_probs(
                a,
                b,
                frozen.temperature * votes.temperature_difference[part],
                torch.tensor(frozen.eta),
                torch.tensor(frozen.bad_bar),
            )
            losses = votes.choice_weight[part] * choice_loss(log_probs, votes.outcome[part], smoothing)
            (losses.sum() / total).backward()
            optimizer.gather()
        # The prior of the frozen fit, divided among the votes; the head started at the optimum of likelihood and prior.
        (0.5 * frozen.l2 / len(votes) * head.square().sum()).backward()
        optimizer.step(1.0)


if __name__ == "__main__":
    main()
