"""The gate stage of a whole round: which prompts choose a candidate, which confirm it, and whom it is compared with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import learner.round.gate.gate_stage as judging
from learner.gate.rules import Verdict
from learner.gate.win_rate import Wins
from learner.round.gate.gate_stage import gate_prompts, opponents
from learner.round.report import rows
from learner.round.workspace import Workspace
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import CandidateMetrics, WinRate
from server.store.store import Store
from tests.learner.rounds import low_words, passing, run, settings, vote

pytestmark = pytest.mark.usefixtures("engine")


@pytest.mark.parametrize(
    ("reasons", "rate", "asked"),
    [
        # Clear after the first batch; it may become clear; certain to lose; only more votes could decide it.
        ([], WinRate(0.7, 0.6, 0.8, 0, 0.05, 0.05), [4]),
        (["It may be chance."], WinRate(0.52, 0.4, 0.6, 0, 0.05, 0.05), [4, 8, 10]),
        (["It is worse."], WinRate(0.3, 0.2, 0.4, 0, 0.05, 0.05), [4]),
        (["It may be chance."], WinRate(0.52, 0.4, 0.6, 0, 0.02, 0.08), [4]),
    ],
)
def test_the_chosen_candidate_is_confirmed_on_other_prompts_in_batches(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, reasons: list[str], rate: WinRate, asked: list[int]
) -> None:
    seen: list[int] = []

    def verdict(candidates: list[CandidateMetrics], *_: Any, **__: Any) -> Verdict:
        # The first verdict chooses, the others confirm.
        counts = {each.prompts for figures in candidates for each in figures.rates.values()}
        assert len(counts) == 1
        seen.extend(counts)
        return Verdict(candidates[0], reasons if len(seen) > 1 else [])

    def measured(won: Wins, looks: list[int], confidence: float, _: Any) -> WinRate:
        prompts = len(won.point)
        assert (looks, confidence) == ([4, 8, 10] if seen else [6], 0.98)
        return replace(rate, prompts=prompts) if seen else WinRate(0.6, 0.5, 0.7, prompts)

    # Whichever votes train, and however far apart the candidates are.
    monkeypatch.setattr(judging, "promising", lambda *_: [1, 2])
    monkeypatch.setattr(judging, "decide", verdict)
    monkeypatch.setattr(judging, "win_rate", measured)
    changes = {"prompts": 6, "answers": 2, "confirm_prompts": 10, "confirm_batch": 4}
    report = run(data_dir, gate=settings(data_dir).gate.model_copy(update=changes))
    assert seen == [6, *asked]
    lines = (data_dir / "rounds" / str(report.round_id) / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    confirmed, chosen = rows[: asked[-1]], rows[asked[-1] :]
    # Two answers to each prompt that the candidate was chosen on, the first to each before the second to any.
    assert len(chosen) == 12
    assert [row["prompt_token_ids"] for row in chosen[:6]] == [row["prompt_token_ids"] for row in chosen[6:]]
    assert all({"step 1", "step 2", "incumbent", "reference"} < row.keys() for row in chosen)
    # None of them confirms it.
    prompts = {name: {str(row["prompt_token_ids"]) for row in of} for name, of in (("a", chosen), ("b", confirmed))}
    assert (len(prompts["a"]), len(prompts["b"]), prompts["a"] & prompts["b"]) == (6, asked[-1], set())
    assert [row["row"] for row in rows] == list(range(len(rows)))
    assert all(row["incumbent"] == row["reference"] and "step 2" not in row for row in confirmed)


def test_a_candidate_that_surely_loses_where_it_is_chosen_is_not_confirmed(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "win_rate", lambda won, *_: WinRate(0.3, 0.2, 0.4, len(won.point)))
    report = run(data_dir)
    assert (report.state, report.metrics.gate and report.metrics.gate.chosen.against_incumbent.prompts) == (
        "rejected",
        12,
    )


def test_a_candidate_is_compared_with_the_earlier_ones(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    compare = judging.compare

    def counting(judge: Any, ours: Any, theirs: Any, prompts: int) -> Wins:
        won = compare(judge, ours, theirs, prompts)
        compared.append((len(compared), prompts))
        return won

    def losing(won: Wins, *_: Any) -> WinRate:
        # Of one candidate: the incumbent, the reference, and then each earlier one.
        return WinRate(0.3, 0.2, 0.4 if len(compared) == 5 else 0.6, len(won.point))

    monkeypatch.setattr(judging, "promising", lambda *_: [1, 2])
    monkeypatch.setattr(judging, "compare", counting)
    monkeypatch.setattr(judging, "win_rate", losing)
    monkeypatch.setattr(judging, "decide", lambda found, *_, **__: Verdict(found[0], ["It may be chance."]))
    gate = run(data_dir).metrics.gate
    assert gate
    assert [figures.loses_to for figures in gate.candidates] == [[], [1]]


def test_no_prompt_that_trains_confirms_a_candidate(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[list[Prompt], list[Prompt], list[Prompt]]] = []

    def noted(work: Workspace) -> tuple[list[Prompt], list[Prompt]]:
        few, others = gate_prompts(work)
        found.append((few, others, work.prompts.train))
        # As if the pool had a question that somebody asked.
        asked = [("", prompt) for prompt in (work.prompts.train[0], few[0], others[0])]
        monkeypatch.setattr(judging, "from_pool", lambda *_: iter(asked))
        assert gate_prompts(work) == (few, [prompt for prompt in others if prompt.conversation_id])
        return few, others

    monkeypatch.setattr(judging, "gate_prompts", noted)
    monkeypatch.setattr(judging, "decide", passing)
    run(data_dir, gate=settings(data_dir).gate.model_copy(update={"confirm_prompts": 64}))
    few, others, train = found[0]
    assert len(others) == 64
    tokens = [{tuple(prompt.token_ids) for prompt in side} for side in (few, others, train)]
    assert not tokens[0] & tokens[1]
    assert not tokens[1] & tokens[2]


@pytest.mark.parametrize(("batch", "total", "pools"), [(8, 64, False), (40, 64, True), (64, 40, True)])
def test_the_pool_only_fills_up_the_first_batch(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, batch: int, total: int, pools: bool
) -> None:
    found: list[list[Prompt]] = []

    def noted(work: Workspace) -> tuple[list[Prompt], list[Prompt]]:
        few, others = gate_prompts(work)
        # Eighty prompts, of which two fifths or so are held out, and twelve of these choose.
        assert len([prompt for prompt in others if prompt.conversation_id]) == len(work.prompts.held_out) - 12
        found.append(others)
        return few, others

    monkeypatch.setattr(judging, "gate_prompts", noted)
    monkeypatch.setattr(judging, "decide", passing)
    changes = {"confirm_batch": batch, "confirm_prompts": total}
    run(data_dir, gate=settings(data_dir).gate.model_copy(update=changes))
    assert any(not prompt.conversation_id for prompt in found[0]) == pools
    assert len(found[0]) == 40 or not pools


def test_a_candidate_is_also_compared_with_the_best_version_so_far(
    data_dir: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    rates = iter([0.8, 0.6, 0.7])

    def rated(candidates: list[CandidateMetrics], *_: Any, **__: Any) -> Verdict:
        # Twelve prompts choose, eight others confirm.
        if candidates[0].against_reference.prompts == 12:
            return Verdict(candidates[-1], [])
        won = replace(candidates[0].against_reference, rate=next(rates))
        return Verdict(replace(candidates[0], against_reference=won), [])

    monkeypatch.setattr(judging, "decide", rated)
    monkeypatch.setattr(judging, "win_rate", lambda won, *_: WinRate(0.6, 0.55, 0.7, len(won.point), 0.02, 0.02))
    found: list[dict[str, str]] = []

    def noted(work: Workspace) -> dict[str, str]:
        found.append(opponents(work))
        return found[-1]

    monkeypatch.setattr(judging, "opponents", noted)
    store = Store.open(data_dir)
    model = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    for number in range(3):
        report = run(data_dir)
        assert report.state == "promoted"
        vote(store, model, 1, low_words, seed=number)
    store.close()
    assert found == [
        {"reference": "v0000", "incumbent": "v0000"},
        # The only earlier one is the reference, which is no better.
        {"reference": "v0000", "incumbent": "v0001"},
        {"reference": "v0000", "incumbent": "v0002", "best": "v0001"},
    ]
    assert ("", "0.60 [0.55, 0.70] against v0001, the best so far") in rows(report)
