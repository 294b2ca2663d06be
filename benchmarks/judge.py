"""How far a small machine judge can be believed: answers of two models to MT-bench's questions, judged by both.

    python benchmarks/judge.py MODEL OTHER mt_bench_questions.jsonl --work-dir DIR [--write]

MODEL and OTHER are Hugging Face directories. The data are the 80 questions of MT-bench (lm-sys/FastChat, Apache-2.0),
not part of this repository; the first turn of each is asked. Each model answers once, at the service temperature, with
up to 128 tokens; the first model's answer is A in every other comparison. Then `learner judge` asks a vLLM server about
every comparison, in both orders: with MODEL, and with OTHER. Reported are how often a judge says the same in both
orders, which place it prefers, and how often the two judges name the same winner. Prints one JSON line last; `--write`
writes docs/benchmarks/judge.md.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from kept import kept

REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "judge.md"
TOKENS = 128
NAMES = ("MODEL", "OTHER")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--sample", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    asked = [json.loads(line)["turns"][0] for line in arguments.questions.read_text().splitlines()]
    if arguments.sample:
        print(json.dumps(sample(arguments.sample, asked, work)))
        return
    models = dict(zip(NAMES, (arguments.model.resolve(), arguments.other.resolve()), strict=True))
    answers = {
        name: kept(work / f"{name}.json", partial(sample_apart, arguments, directory))
        for name, directory in models.items()
    }
    result: dict[str, Any] = {}
    for name, directory in models.items():
        make_data(work / f"data-{name}", asked, answers)
        result[name] = judge(work / f"data-{name}", directory)
        print(f"{name}: {result[name]}", file=sys.stderr, flush=True)
    result["both"] = agreement(*(result[name]["winners"] for name in NAMES))
    if arguments.write:
        REPORT.write_text("\n".join(page(result)) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "judge", **result}))


def sample_apart(arguments: Any, directory: Path) -> list[dict[str, Any]]:
    """`sample` in a process of its own, which owns an engine."""
    from study import run_json

    given = [str(arguments.model), str(arguments.other), str(arguments.questions)]
    found: Any = run_json([__file__, *given, "--work-dir", str(arguments.work_dir), "--sample", str(directory)])
    return list(found)


def sample(model: Path, asked: list[str], work: Path) -> list[dict[str, Any]]:
    """An answer of the model to each question."""
    from learner.process import set_environment
    from learner.settings import LearnerSettings
    from server.shared.model.dtype import resolve_dtype
    from server.shared.model.text import ChatText
    from server.store.chats.records import Prompt

    settings = LearnerSettings(data_dir=work)
    set_environment(settings)

    from learner.model.rollout import RolloutEngine

    text = ChatText.load(model)
    prompts = [Prompt("", text.prompt([{"role": "user", "content": one}], 0), TOKENS) for one in asked]
    longest = max(len(prompt.token_ids) for prompt in prompts) + TOKENS
    engine = RolloutEngine(model, settings, resolve_dtype(settings.dtype).name, longest)
    found = engine.sample(prompts, 1)
    engine.close()
    return [vars(one) for one in found]


def make_data(data: Path, asked: list[str], answers: dict[str, list[dict[str, Any]]]) -> None:
    """A data directory with a comparison of the two models' answers to each question."""
    from server.store.chats.records import Generation, Span
    from server.store.store import Store

    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    with closing(Store.open(data)) as store:
        store.policies.register_reference()
        for number, question in enumerate(asked):
            pair = [answers[name][number] for name in (NAMES if number % 2 == 0 else NAMES[::-1])]
            conversation = store.conversations.create("ann", question)
            _, *responses = store.responses.begin_comparison(
                "ann", conversation, message=question, replica_id="here", policy_versions=("v0000", "v0000"),
                prompt_token_ids=pair[0]["prompt"], temperatures=(0.85, 0.85), max_tokens=TOKENS, seeds=(None, None),
            )  # fmt: skip
            for response, one in zip(responses, pair, strict=True):
                spans = [Span(0, len(one["token_ids"]), "v0000")]
                said = Generation(one["token_ids"], one["logprobs"], one["text"], one["finish_reason"], spans)
                store.responses.finish(response, said)


def judge(data: Path, model: Path) -> dict[str, Any]:
    """What `learner judge` finds with this model: its bias, and the winner of each comparison."""
    from learner.judge.agreement import bias_of
    from learner.judge.judge import judge_comparisons
    from learner.settings import LearnerSettings
    from server.store.store import Store
    from tests.e2e.test_judge import vllm_server

    with vllm_server(model) as url:
        # Every comparison trains.
        settings = LearnerSettings(data_dir=data, judge={"url": url, "model": "judge"}, gate={"judge_share": 1e-9})
        used = judge_comparisons(settings, lambda used, count: None)
    with closing(Store.open(data)) as store:
        said = sorted(store.machine_choices.all(settings.judge.name), key=lambda one: one.comparison.create_time)
    winners = [winner(one.choice, number) for number, one in enumerate(said)]
    return {**vars(bias_of(said)), "unreadable": used.unreadable, "winners": winners}


def winner(choice: str | None, number: int) -> str:
    """The model that won a comparison, whose first answer is MODEL's in every other; empty if neither did."""
    return NAMES[(choice == "B") ^ (number % 2)] if choice in ("A", "B") else ""


def agreement(ours: list[str], theirs: list[str]) -> dict[str, int]:
    """Of the comparisons in which both judges name a winner, how often it is the same."""
    both = [(one, other) for one, other in zip(ours, theirs, strict=True) if one and other]
    return {"pairs": len(both), "same": sum(one == other for one, other in both)}


# The page


def page(result: dict[str, Any]) -> Iterator[str]:
    """Its lines."""
    yield "# How far a small judge can be believed"
    yield ""
    yield "`python benchmarks/judge.py --write`: the program's docstring says who answers what and who judges. MODEL is"
    yield "the default one of 135 million parameters; OTHER is the same after ten demonstrations (`learner sft`)."
    yield ""
    yield "| judge | read | same in both orders | always first | always second | MODEL wins | OTHER wins |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name in NAMES:
        one = result[name]
        shares = [f"{one[key] / one['pairs']:.2f}" for key in ("consistent", "first", "second")]
        wins = [one["winners"].count(each) for each in NAMES]
        yield f"| {name} | {one['pairs']} | {' | '.join(shares)} | {wins[0]} | {wins[1]} |"
    yield ""
    both = result["both"]
    yield f"In {both['pairs']} comparisons both judges name a winner; in {both['same']} it is the same."


if __name__ == "__main__":
    main()
