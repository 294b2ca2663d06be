"""The reward model on human votes: PandaLM's test set, held out by instruction, compared with simpler rules and humans.

    python benchmarks/pandalm.py MODEL_DIR pandalm_testset_v1.json --work-dir DIR [--write]

The data are 999 pairs of answers to 170 instructions with three annotators each (0 a tie, 1, 2), from
github.com/WeOpenML/PandaLM, not part of this repository. Each annotation is a vote. In ten folds that split no
instruction, the head is fitted on nine, its penalty chosen within them, and judged on the tenth by the annotators'
majority. Baselines: a head on length alone, the rule "longer wins", and each annotator against the other two if these
agree. Intervals come from a bootstrap over instructions. Prints one JSON line last; `--write` writes
docs/benchmarks/pandalm.md.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDS = 10
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "pandalm.md"
LONGEST = 512
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows = json.loads(arguments.data.read_text())
    result = judge(rows, arguments.model, arguments.work_dir)
    if arguments.write:
        REPORT.write_text(page(result), encoding="utf-8")
    print(json.dumps({"benchmark": "pandalm", **result}))


def judge(rows: list[dict[str, Any]], model: Path, work: Path) -> dict[str, Any]:
    """The results of every rule."""
    import torch

    from learner.reward.likelihood import preference_loss
    from learner.reward.linear_reward_model import LinearRewardModel
    from learner.settings import RewardSettings

    features, spec = features_of(rows, model, work)
    groups = group(rows)
    count = int(groups.max()) + 1
    fold_of = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % FOLDS
    lengths = features[:, -1:]
    deltas: dict[str, Any] = {name: torch.zeros(len(rows)) for name in ("reward model", "length alone")}
    for fold in range(FOLDS):
        held = fold_of[groups] == fold
        train = votes_of(rows, groups, ~held)
        generator = torch.Generator().manual_seed(fold)
        fitted = LinearRewardModel.fit(features, train, spec, RewardSettings(), generator)
        scores = fitted.scores(features)
        deltas["reward model"][held] = (scores[0::2] - scores[1::2])[held]
        deltas["length alone"][held] = length_head(lengths, train)[held]
        print(f"fold {fold + 1} of {FOLDS}", file=sys.stderr)
    deltas["longer wins"] = lengths[0::2, 0] - lengths[1::2, 0]
    majority = torch.tensor([said(row) for row in rows])
    decisive = majority != 0
    sign = torch.where(majority == 1, 1.0, -1.0)
    result: dict[str, Any] = {"pairs": len(rows), "decisive": int(decisive.sum()), "instructions": count}
    for name, delta in deltas.items():
        right = ((torch.sign(delta) * sign + 1) / 2)[decisive]
        result[name] = {
            "accuracy": float(right.mean()),
            "interval": interval(right, groups[decisive], count),
            "nll": None if name == "longer wins" else float(preference_loss((delta * sign)[decisive]).mean()),
        }
    agree = torch.tensor(agreement(rows))
    result["an annotator, the other two agreeing"] = {"accuracy": float(agree.mean()), "votes": len(agree)}
    return result


def said(row: dict[str, Any]) -> int:
    """The annotators' majority; 0 for a tie or no majority."""
    choice, count = Counter(row[f"annotator{n}"] for n in (1, 2, 3)).most_common(1)[0]
    return int(choice) if count > 1 else 0


def agreement(rows: list[dict[str, Any]]) -> list[float]:
    """For each annotator, if the other two name the same winner: 1.0 for agreement, 0.0 for disagreement, 0.5 for a
    tie."""
    found = []
    for row in rows:
        votes = [row[f"annotator{n}"] for n in (1, 2, 3)]
        for one in range(3):
            others = votes[:one] + votes[one + 1 :]
            if others[0] == others[1] != 0:
                found.append(float(votes[one] == others[0]) if votes[one] else 0.5)
    return found


def group(rows: list[dict[str, Any]]) -> Any:
    import torch

    numbers: dict[tuple[str, str], int] = {}
    return torch.tensor([numbers.setdefault((row["instruction"], row["input"]), len(numbers)) for row in rows])


def votes_of(rows: list[dict[str, Any]], groups: Any, chosen: Any) -> Any:
    """Three votes on every chosen pair; answers 2i and 2i + 1 are those of row i."""
    import torch

    from learner.reward.likelihood import TIE, A, B
    from learner.reward.linear_heads import VoteTensors

    outcomes = {0: TIE, 1: A, 2: B}
    at = chosen.nonzero().squeeze(1).repeat_interleave(3)
    said = [outcomes[rows[i][f"annotator{n}"]] for i in chosen.nonzero().squeeze(1).tolist() for n in (1, 2, 3)]
    _, numbered = groups[at].unique(return_inverse=True)
    none = torch.zeros(0, dtype=torch.long)
    return VoteTensors(
        a=2 * at, b=2 * at + 1, outcome=torch.tensor(said), temperature_difference=torch.zeros(len(at)),
        choice_weight=torch.full((len(at),), 1 / 3), choice_group=numbered, response=none, thumb=torch.zeros(0),
        user=none, thumb_weight=torch.zeros(0), thumb_group=none, users=1,
    )  # fmt: skip


def length_head(lengths: Any, train: Any) -> Any:
    """(rows,) score differences of a head that sees only log length."""
    import torch

    from learner.reward import linear_heads as fitting

    standard = (lengths - lengths.mean()) / lengths.std()
    scores = fitting.fit(standard, train, torch.tensor([1.0]), 0.05).scores(standard)[0]
    return scores[0::2] - scores[1::2]


def interval(right: Any, groups: Any, count: int) -> list[float]:
    """95 % interval of the mean, by drawing instructions with replacement."""
    import torch

    sums = torch.zeros(count).scatter_add_(0, groups, right)
    sizes = torch.zeros(count).scatter_add_(0, groups, torch.ones_like(right))
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(dim=1) / sizes[drawn].sum(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return [low, high]


def features_of(rows: list[dict[str, Any]], model_directory: Path, work: Path) -> Any:
    """(features (2 * rows, F), spec), cached in the work directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from learner.model.features import FeatureCache, feature_spec
    from server.shared.model.dtype import MICRO_BATCH_TOKENS, resolve_dtype, torch_dtype
    from server.shared.model.text import ChatText

    dtype = resolve_dtype("auto").name
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch_dtype(dtype))
    spec = feature_spec(model, ChatText.load(model_directory))
    answers = []
    for row in rows:
        asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=False
        )
        for text in (row["response1"], row["response2"]):
            # A few answers are a JSON true.
            ids = tokenizer.encode(str(text), add_special_tokens=False)[: LONGEST - 1]
            answers.append((list(prompt), [*ids, tokenizer.eos_token_id]))
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if done // 200 != (done - n) // 200:
            print(f"{done} of {len(answers)} answers read", file=sys.stderr)

    with closing(FeatureCache.open(work, f"pandalm {model_directory.resolve().name}", spec, dtype)) as cache:
        return cache.get(answers, model, spec, MICRO_BATCH_TOKENS[dtype], advance), spec


def page(result: dict[str, Any]) -> str:
    lines = [
        "# The reward model on people's votes",
        "",
        f"`python benchmarks/pandalm.py --write`, {datetime.now(UTC):%Y-%m-%d}. PandaLM's test set (WeOpenML,",
        f"Apache-2.0): {result['pairs']} pairs on {result['instructions']} instructions, three annotators each;",
        f"{result['decisive']} pairs have a majority for one answer.",
        "Held out by instruction, ten folds; intervals are 95 %, from a bootstrap over instructions.",
        "",
        "| judge | accuracy | NLL |",
        "|---|---:|---:|",
    ]
    for name in ("reward model", "length alone", "longer wins"):
        one = result[name]
        low, high = one["interval"]
        nll = "" if one["nll"] is None else f"{one['nll']:.3f}"
        lines.append(f"| {name} | {one['accuracy']:.3f} [{low:.3f}, {high:.3f}] | {nll} |")
    people = result["an annotator, the other two agreeing"]
    lines.append(f"| an annotator, where the other two agree | {people['accuracy']:.3f} ({people['votes']} votes) | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
