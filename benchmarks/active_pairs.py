"""How many votes are saved by offering the pair of many answers on which the reward model is least certain.

    python benchmarks/active_pairs.py MODEL --work-dir DIR [--write]

The reference answers each question sixteen times at the service temperature. A tenth of the votes is flipped; a tie is
a vote. Votes come in rounds of 60, as in a service: the reward model is fitted after each, and chooses the pairs of the
next from questions that nobody voted on yet. The ways to choose a question's two answers:
- random: any two.
- probability: those on which the members' probabilities of a win vary most.
- score: those on which the members' differences in score vary most.
- information: those whose vote says most about which member is right (BALD, Houlsby et al. 2011).
The first round is random in each. Measured on answers to 48 unseen questions, by the taste itself: accuracy on all
pairs that differ, and how often the best of sixteen by the reward model beats another one. Each run is saved as it
ends, so that a killed benchmark resumes after the last one. `--write` writes docs/benchmarks/active_pairs.md. Prints
one JSON line last.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kept import kept
from planner import entropy, to_votes
from pool import CHOICES, shown

from clients.demo.questions import questions
from clients.demo.voter import FLIPPED, TASTES

REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "active_pairs.md"
UNSEEN, SEEN, ANSWERS, TOKENS = 48, 202, 16, 64
BATCH, ROUNDS, SEEDS, FLIPS = 60, 3, 5, 0.1
WAYS = ("random", "probability", "score", "information")
# The compared numbers of votes: chosen pairs, and random ones.
FEWER, MORE = 120, 200


@dataclass(frozen=True)
class Pool:
    """Answers to Q questions by question: features (Q * 16, F) and each one as a voter sees it."""

    features: Any
    spec: Any
    answers: list[Any]

    def of(self, question: int) -> list[int]:
        """The rows of a question's answers."""
        return list(range(question * ANSWERS, (question + 1) * ANSWERS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory, as in a data directory's policies/v0000")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    pool = make_pool(arguments.model, work)
    results: dict[str, list[Any]] = {}
    for seed in range(SEEDS):
        for taste in TASTES:
            for way in WAYS:
                path = work / "results" / f"{taste}-{seed}-{way}.json"
                results.setdefault(f"{taste} {way}", []).append(kept(path, partial(learn, pool, taste, seed, way)))
    if arguments.write:
        REPORT.write_text("\n".join(page(results)) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "active_pairs", "results": results}))


def make_pool(model: Path, work: Path) -> Pool:
    """The answers and their features, sampled once."""
    import torch

    from learner.model.features import feature_spec
    from learner.model.rollout import SampledAnswer
    from server.shared.model.text import ChatText

    answers = [SampledAnswer(**one) for one in kept(work / "answers.json", partial(sample, model, work))]
    path, text = work / "features.pt", ChatText.load(model)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    spec = feature_spec(loaded, text)
    if not path.exists():
        from learner.model.features import extract
        from learner.model.rollout import to_rollout

        parts = []
        for start in range(0, len(answers), 256):
            parts.append(extract(loaded, to_rollout(answers[start : start + 256]).tokens, spec, 1024, lambda n: None))
            print(f"features of {start + len(parts[-1])} answers", file=sys.stderr, flush=True)
        torch.save(torch.cat(parts), path)
    return Pool(torch.load(path), spec, [shown(one) for one in answers])


def sample(model: Path, work: Path) -> list[dict[str, Any]]:
    """Sixteen answers to each question, question by question."""
    from learner.process import set_environment
    from learner.settings import LearnerSettings
    from server.shared.model.dtype import resolve_dtype
    from server.shared.model.text import ChatText
    from server.store.chats.records import Prompt

    settings = LearnerSettings(data_dir=work)
    set_environment(settings)

    from learner.model.rollout import RolloutEngine

    engine = RolloutEngine(model, settings, resolve_dtype(settings.dtype).name, 256)
    text = ChatText.load(model)
    asked = [text.prompt([{"role": "user", "content": one}], 0) for one in questions(0)[: UNSEEN + SEEN]]
    found = engine.sample([Prompt("", ids, TOKENS) for ids in asked for _ in range(ANSWERS)], 1)
    engine.close()
    return [vars(one) for one in found]


def learn(pool: Pool, taste: str, seed: int, way: str) -> dict[str, Any]:
    """Accuracy and the win rate of the best of sixteen, by the number of votes."""
    import torch

    from learner.reward.linear_reward_model import LinearRewardModel
    from learner.settings import RewardSettings

    chance = random.Random(f"{taste} {seed}")
    order = chance.sample(range(UNSEEN, UNSEEN + SEEN), ROUNDS * BATCH + MORE % BATCH)
    votes: list[tuple[int, int, str, float]] = []
    found: dict[str, Any] = {}
    model = None
    for start in range(0, len(order), BATCH):
        for question in order[start : start + BATCH]:
            # The same draws, whichever way, so that runs differ by the pairs alone.
            one, other = chance.sample(pool.of(question), 2)
            flipped = chance.random() < FLIPS
            if model and way != "random":
                one, other = most_uncertain(model, pool, question, way)
            choice = TASTES[taste].choice(pool.answers[one], pool.answers[other])
            votes.append((one, other, CHOICES[FLIPPED[choice] if flipped else choice], 0.0))
        generator = torch.Generator().manual_seed(seed)
        model = LinearRewardModel.fit(pool.features, to_votes(votes), pool.spec, RewardSettings(), generator)
        found[str(len(votes))] = measure(model, pool, taste)
    return {**found, "ties": round(mean(said == "TIE" for *_, said, _ in votes[BATCH:]), 3)}


def most_uncertain(model: Any, pool: Pool, question: int, way: str) -> tuple[int, int]:
    """The rows of the question's two answers whose vote would say most."""
    import torch

    from learner.round.review.active_pairs import most_disputed

    rows = pool.of(question)
    scores = model.member_scores(pool.features[rows])
    difference = scores[:, :, None] - scores[:, None, :]
    if way == "probability":
        [(one, other)] = most_disputed(scores, len(rows))
        return rows[one], rows[other]
    if way == "score":
        worth = difference.var(dim=0)
    else:
        won = torch.sigmoid(difference)
        worth = entropy(won.mean(dim=0)) - entropy(won).mean(dim=0)
    one, other = divmod(int(worth.argmax()), len(rows))
    return rows[one], rows[other]


def measure(model: Any, pool: Pool, taste: str) -> tuple[float, float]:
    """On unseen questions: accuracy on pairs that differ by the taste, and how often the best of sixteen wins."""
    import torch

    says = model.scores(pool.features[: UNSEEN * ANSWERS]).view(UNSEEN, ANSWERS)
    is_ = torch.tensor([TASTES[taste].score(one) for one in pool.answers[: UNSEEN * ANSWERS]]).view(UNSEEN, ANSWERS)
    better = is_[:, :, None] > is_[:, None, :]
    right = (says[:, :, None] > says[:, None, :]) & better
    best = is_.gather(1, says.argmax(dim=1, keepdim=True))
    # Against the fifteen others: without a tie with itself.
    wins = ((best > is_).float().sum(dim=1) + ((best == is_).float().sum(dim=1) - 1) / 2) / (ANSWERS - 1)
    return round(float(right.sum() / better.sum()), 4), round(float(wins.mean()), 4)


# The page


def page(results: dict[str, list[Any]]) -> Iterator[str]:
    """Its lines."""
    yield "# Offering the pairs that the reward model is least certain of"
    yield ""
    yield "`python benchmarks/active_pairs.py --write`: the program's docstring says what is done and what the ways"
    yield f"are. Means of {SEEDS} seeds: accuracy on unseen pairs, and how often the best of sixteen by the reward"
    yield "model wins."
    yield ""
    at = [BATCH * number for number in range(1, ROUNDS + 1)] + [MORE]
    yield f"| taste | pairs | {' | '.join(f'{votes} votes' for votes in at)} | ties |"
    yield f"|---|---|{'---:|' * (len(at) + 1)}"
    for taste in TASTES:
        for way in WAYS:
            runs = results[f"{taste} {way}"]
            cells = [f"{mean_of(runs, votes, 0):.3f}, {mean_of(runs, votes, 1):.3f}" for votes in at]
            yield f"| {taste} | {way} | {' | '.join(cells)} | {mean(one['ties'] for one in runs):.2f} |"
    yield ""
    yield f"After {FEWER} votes, less random pairs after {MORE}, with the 95 % interval over tastes and seeds:"
    yield ""
    yield "| pairs | accuracy | best of sixteen |"
    yield "|---|---:|---:|"
    for way in WAYS:
        yield f"| {way} | {' | '.join(gain(results, way, place) for place in range(2))} |"


def mean_of(runs: list[Any], votes: int, place: int) -> float:
    return float(mean(one[str(votes)][place] for one in runs))


def gain(results: dict[str, list[Any]], way: str, place: int) -> str:
    """The mean difference over tastes and seeds, and its interval."""
    gains = [
        fewer[str(FEWER)][place] - more[str(MORE)][place]
        for taste in TASTES
        for fewer, more in zip(results[f"{taste} {way}"], results[f"{taste} random"], strict=True)
    ]
    error = 1.96 * stdev(gains) / len(gains) ** 0.5
    return f"{mean(gains):+.3f} [{mean(gains) - error:+.3f}, {mean(gains) + error:+.3f}]"


if __name__ == "__main__":
    main()
