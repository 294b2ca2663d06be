"""A whole round on a tiny model and a real store; only the engine is a stand-in, sampling by transformers."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import learner.judging as judging
import learner.round as rounds
import learner.workspace as workspace
from learner.gate import Verdict
from learner.progress import Stages
from learner.publishing import wait_until_loaded
from learner.report import Report, print_report
from learner.rollout import Sample
from learner.round import run_once
from learner.settings import LearnerSettings
from learner.status import status
from learner.workspace import STAGES, Workspace
from server.manifest import new_staging, publish, verify, write_manifest
from server.records import Generation, Prompt, Span
from server.store import FeedbackStore
from tests.learner.conftest import EOS, WORDS

LENGTH = 12


class TinyEngine:
    """What `learner.rollout.Engine` promises, without vLLM."""

    pushes = 0

    def __init__(self, directory: Path, settings: LearnerSettings, max_model_len: int) -> None:
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


def vote(store: FeedbackStore, model: Any, count: int, taste: Callable[[Sample], float], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        prompt = torch.randint(3, WORDS, (6,), generator=generator).tolist()
        conversation = store.create_conversation("ann", f"question {number}")
        samples = [draw(model, prompt, LENGTH, temperature, generator) for temperature in (0.7, 1.0)]
        comparison, *responses = store.begin_comparison(
            "ann", conversation, message="?", replica_id="r", policy_version="v0000", prompt_token_ids=prompt,
            temperatures=(0.7, 1.0), max_tokens=LENGTH, seeds=(None, None),
        )  # fmt: skip
        for response, sample in zip(responses, samples, strict=True):
            span = Span(0, len(sample.token_ids), "v0000")
            reason: Any = sample.finish_reason
            store.finish_response(response, Generation(sample.token_ids, sample.logprobs, sample.text, reason, [span]))
        better = taste(samples[0]) - taste(samples[1])
        store.submit_choice("ann", comparison, "A" if better > 0 else "B" if better < 0 else "TIE")


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Path:
    """A data directory with a reference and 80 votes; copy it."""
    from transformers import AutoModelForCausalLM

    data_dir = tmp_path_factory.mktemp("voted") / "data"
    make_reference(data_dir, model_directory)
    store = FeedbackStore.open(data_dir)
    vote(store, AutoModelForCausalLM.from_pretrained(model_directory).eval(), 80, low_words)
    store.close()
    return data_dir


def make_reference(data_dir: Path, model_directory: Path) -> None:
    final = data_dir / "policies" / "v0000"
    staging = new_staging(final)
    shutil.copytree(model_directory, staging, dirs_exist_ok=True)
    write_manifest(staging, version="v0000", kind="full", base_version="v0000", reference_version="v0000")
    publish(staging, final)
    store = FeedbackStore.open(data_dir)
    store.registry.register_reference()
    store.close()


@pytest.fixture
def data_dir(voted: Path, tmp_path: Path) -> Path:
    shutil.copytree(voted, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> type[TinyEngine]:
    monkeypatch.setattr(workspace, "Engine", TinyEngine)
    return TinyEngine


def settings(data_dir: Path, **changes: Any) -> LearnerSettings:
    values: dict[str, Any] = {
        "data_dir": data_dir,
        "lease_seconds": 0.5,
        "load_timeout_seconds": 0.5,
        "reward": {"permutations": 39, "reference_answers": 16},
        "ppo": {"dtype": "float32", "steps": 2, "episodes": 16, "lora_rank": 4, "learning_rate": 3e-3},
        "gate": {"refits": 100, "candidates": 2, "prompts": 12, "answers": 1},
    }
    return LearnerSettings(**{**values, **changes})


def run(data_dir: Path, **changes: Any) -> Report:
    return run_once(settings(data_dir, **changes), Stages(Console(quiet=True)))


def passing(candidates: Any, *_: Any) -> Verdict:
    return Verdict(candidates[-1], [])


def opened(data_dir: Path) -> FeedbackStore:
    return FeedbackStore.open(data_dir)


def test_nothing_to_learn_from_is_a_sentence_and_changes_nothing(tmp_path: Path, model_directory: Path) -> None:
    assert "no data" in run(tmp_path / "nowhere").sentence
    assert not (tmp_path / "nowhere").exists()
    data_dir = tmp_path / "data"
    opened(data_dir).close()
    assert "no policy yet" in run(data_dir).sentence
    make_reference(data_dir, model_directory)
    assert "no votes yet" in run(data_dir).sentence
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    store = opened(data_dir)
    vote(store, model, 5, low_words)
    assert "5 votes, fewer than the 40" in run(data_dir).sentence
    assert "and 10 of each are needed" in run(data_dir, min_votes=5).sentence
    assert store.registry.rounds() == []
    assert [p.version for p in store.registry.policies()] == ["v0000"]


def test_a_promoted_round(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    report = run(data_dir)
    assert report.state == "promoted"
    assert report.policy_version == "v0001"
    assert "v0001 is active in place of v0000; no server is running" in report.sentence
    manifest = verify(data_dir / "policies" / "v0001")
    assert (manifest.kind, manifest.base_version, manifest.reference_version) == ("adapter", "v0000", "v0000")
    assert verify(data_dir / "reward_models" / "rm0001")
    store = opened(data_dir)
    assert store.registry.active_policy().version == "v0001"
    policy = store.registry.policy("v0001")
    assert (policy.parent_version, policy.reward_model_version, policy.round_id) == ("v0000", "rm0001", report.round_id)
    assert set(report.metrics) == {"votes", "signal", "reward_model", "ppo", "gate", "seconds"}
    first = report.metrics["ppo"]["steps"][0]
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert first["first_ratio_error"] < 1e-5
    assert report.metrics["ppo"]["steps"][1]["kl"] > 1e-4
    assert list((data_dir / "rounds" / str(report.round_id)).glob("events.out.tfevents*"))
    assert json.loads((data_dir / "rounds" / str(report.round_id) / "report.json").read_text())["state"] == "promoted"

    again = run(data_dir)
    assert again.state == "nothing"
    assert "no new votes" in again.sentence
    found = status(data_dir)
    assert (found["active_version"], found["votes"], found["new_votes"]) == ("v0001", 80, 0)

    console = Console(record=True, width=100, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(report, console)
    table = console.export_text()
    for word in ("votes used", "longer wins", "reward", "KL", "win rate", "seconds", "v0001 is active"):
        assert word in table


def test_the_next_round_meets_the_promoted_version(
    data_dir: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(judging, "decide", passing)
    run(data_dir)
    store = opened(data_dir)
    vote(store, AutoModelForCausalLM.from_pretrained(model_directory).eval(), 60, low_words, seed=1)
    assert status(data_dir)["new_votes"] == 60
    report = run(data_dir)
    assert (report.state, report.incumbent_version, report.policy_version) == ("promoted", "v0001", "v0002")
    assert store.registry.policy("v0002").parent_version == "v0001"
    # The incumbent's answers are its own, not the reference's.
    lines = (data_dir / "rounds" / str(report.round_id) / "answers.jsonl").read_text().splitlines()
    assert any(answers["incumbent"] != answers["reference"] for answers in map(json.loads, lines))


def test_a_policy_that_goes_over_the_budget_at_once_leaves_no_candidate(data_dir: Path) -> None:
    ppo = settings(data_dir).ppo.model_copy(update={"kl_budget": 1e-9})
    report = run(data_dir, ppo=ppo)
    assert report.state == "rejected"
    assert "over the KL budget" in report.sentence
    assert report.policy_version is None


def test_full_fine_tuning_publishes_all_weights(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    ppo = settings(data_dir).ppo.model_copy(update={"train": "full", "learning_rate": 1e-4})
    report = run(data_dir, ppo=ppo)
    assert report.state == "promoted"
    manifest = verify(data_dir / "policies" / "v0001")
    assert (manifest.kind, manifest.base_version) == ("full", "v0001")
    assert "model.safetensors" in manifest.files
    assert "config.json" in manifest.files


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_a_round_killed_after_any_stage_goes_on(data_dir: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    record = Workspace.record

    def killed(self: Workspace, finished: str, metrics: dict[str, Any]) -> None:
        record(self, finished, metrics)
        if finished == stage:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data_dir)
    store = opened(data_dir)
    started = store.registry.running_round()
    assert started is not None
    assert started.stage == stage
    assert store.registry.active_policy().version == "v0000"
    report = run(data_dir)
    assert (report.state, report.round_id, report.policy_version) == ("promoted", started.id, "v0001")
    assert [p.version for p in store.registry.policies()] == ["v0001", "v0000"]
    assert [m.version for m in store.registry.reward_models()] == ["rm0001"]


def test_a_rejected_candidate_is_kept_with_the_reason_and_not_served(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "decide", lambda candidates, *_: Verdict(candidates[-1], ["It is worse."]))
    report = run(data_dir)
    assert report.state == "rejected"
    assert "It is worse." in report.sentence
    store = opened(data_dir)
    assert store.registry.active_policy().version == "v0000"
    policy = store.registry.policy("v0001")
    assert (policy.state, policy.reason) == ("rejected", "It is worse.")
    assert verify(data_dir / "policies" / "v0001")


def test_votes_without_a_signal_end_the_round_before_training(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, engine: type[TinyEngine]
) -> None:
    monkeypatch.setattr(rounds.fitting, "signal_test", lambda *_: rounds.SignalTest(0.51, 0.5, 0.4))
    monkeypatch.setattr(engine, "pushes", 0)
    report = run(data_dir)
    assert report.state == "rejected"
    assert "too little signal" in report.sentence
    assert report.policy_version is None
    assert engine.pushes == 0


def test_an_operators_rollback_meanwhile_is_not_overwritten(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(candidates: Any, *_: Any) -> Verdict:
        store = opened(data_dir)
        shutil.copytree(data_dir / "policies" / "v0000", data_dir / "policies" / "v0009")
        store.registry.register_policy(
            "v0009", kind="full", state="candidate", parent_version="v0000", reference_version="v0000",
            round_id=None, reward_model_version=None, metrics={},
        )  # fmt: skip
        store.registry.activate_policy("v0009", actor="operator")
        return Verdict(candidates[-1], [])

    monkeypatch.setattr(judging, "decide", moved)
    report = run(data_dir)
    assert report.state == "rejected"
    assert "changed meanwhile" in report.sentence
    assert opened(data_dir).registry.active_policy().version == "v0009"


def test_a_round_that_raises_is_recorded_and_changes_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(rounds, "train", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        run(data_dir)
    store = opened(data_dir)
    (failed,) = store.registry.rounds()
    assert (failed.state, failed.reason) == ("failed", "RuntimeError: disk full")
    assert store.registry.active_policy().version == "v0000"


def test_one_learner_at_a_time(data_dir: Path) -> None:
    store = opened(data_dir)
    assert store.registry.acquire_lease("learner", "another", 60)
    report = run(data_dir)
    assert (report.state, report.round_id) == ("nothing", None)
    assert "Another learner is at work" in report.sentence


def test_waiting_for_servers(data_dir: Path) -> None:
    store = opened(data_dir)
    store.registry.report_replica("r1", "v0001")
    assert wait_until_loaded(store, "v0001", 0) == "1 running server loaded it."
    store.registry.report_replica("r2", "v0000")
    assert wait_until_loaded(store, "v0001", 0) == "1 of 2 running servers had not loaded it after 0 s."
    store.registry.report_replica("r2", "v0000", "bad tensor")
    assert "could not load it and went on with v0000: bad tensor" in wait_until_loaded(store, "v0001", 0)
