"""The learner on a pretended GPU (`tests.learner.devices`): no tensor stays on the CPU, and numbers are the CPU's.

What a GPU's own kernels compute is measured by `benchmarks/gpu.py`.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import learner.round.gate.gate_stage as judging
import learner.round.workspace as workspace
from learner.improve.base import ExperienceSource, Task
from learner.improve.budget import Budget
from learner.improve.ppo.critic import Critic
from learner.improve.ppo.trainer import PPO
from learner.improve_settings import PolicySettings, PPOSettings
from learner.model.features import extract
from learner.model.policy import TrainablePolicy
from learner.model.rollout import SampledAnswer, to_rollout
from learner.ops.score_server import Scorer
from learner.ops.users import read_users
from learner.progress import Stages
from learner.round.run import run_once
from server.shared.machine import GIB
from server.shared.model.dtype import DtypeName, torch_dtype
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import StepMetrics
from tests.learner.devices import CPU, GPU, WrongDeviceError, pretended_gpu
from tests.learner.improve.ppo.test_experience import reward_model
from tests.learner.ops.test_score_server import CANDIDATES, PROMPT, register
from tests.learner.ops.test_score_server import reward_model as scoring_model
from tests.learner.rounds import TinyEngine, passing, settings


@pytest.fixture(autouse=True)
def _nothing_else_differs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fused attention, which a GPU always uses, on the CPU too. One thread is faster for tiny tensors."""
    monkeypatch.setattr("learner.model.forward.EAGER_COLUMNS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def on(name: str) -> Iterator[torch.device]:
    with pretended_gpu() if name == "cuda" else nullcontext():
        yield torch.device(name)


def test_a_tensor_says_where_it_is() -> None:
    with pretended_gpu():
        there, here = torch.zeros(2, device="cuda"), torch.ones(2)
        assert (there.device, here.device) == (GPU, CPU)
        assert (there.is_cuda, there.is_cpu, here.is_cuda) == (True, False, False)
        assert [each.device for each in (there + 1, there[:1], torch.ones_like(there), there.new_zeros(3))] == [GPU] * 4
        assert here.to("cuda").device == here.to(there).device == here.cuda().to(torch.bfloat16).device == GPU
        assert there.cpu().device == there.to("cpu", torch.float64).device == CPU
        # A copy, not another name for the same data.
        moved = here.to("cuda")
        moved.add_(1)
        assert (here.tolist(), moved.tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_what_cuda_allows() -> None:
    with pretended_gpu():
        there = torch.arange(4.0, device="cuda")
        there[torch.tensor([0])] = torch.tensor(9.0)
        assert there[torch.tensor([0, 3])].tolist() == [9.0, 3.0]
        assert there[torch.tensor([True, False, False, True])].device == GPU
        assert (there * torch.tensor(2.0)).tolist() == [18.0, 2.0, 4.0, 6.0]
        assert float(there.sum()) == 15.0
        assert there.copy_(torch.zeros(4)).device == GPU
        weight = torch.ones(2, device="cuda", requires_grad=True)
        (weight * there[:2]).sum().backward()
        assert weight.grad is not None
        assert weight.grad.device == GPU


@pytest.mark.parametrize(
    "wrong",
    [
        lambda here, there: here + there,
        lambda here, there: there.add_(here),
        lambda here, there: here.mul_(there.sum()),
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.stack([here.sum(), there.sum()]),
        lambda here, there: here[there.long()],
        lambda here, there: there.index_put_((torch.tensor([0, 1]),), here),
        lambda here, there: there.gather(0, torch.tensor([0])),
        lambda here, there: torch.where(there > 0, here, 0.0),
        lambda here, there: there.numpy(),
        lambda here, there: torch.rand(2, generator=torch.Generator(), device="cuda"),
        lambda here, there: torch.multinomial(there + 1, 1, generator=torch.Generator()),
        lambda here, there: setattr(here, "grad", there),
        lambda here, there: (here.requires_grad_() * there.detach()).sum().backward(),
    ],
)
def test_what_cuda_refuses(wrong: Callable[[Tensor, Tensor], object]) -> None:
    with pretended_gpu(), pytest.raises(WrongDeviceError):
        wrong(torch.ones(2), torch.zeros(2, device="cuda"))


def train(
    name: str, directory: Path, model_directory: Path, dtype: DtypeName = "float32", train: Any = "lora", steps: int = 2
) -> tuple[list[StepMetrics], list[Tensor]]:
    """Metrics of PPO's steps on the device, and the trained weights."""
    ppo = PPOSettings(steps=steps, episodes=8, epochs=2, learning_rate=1e-3, approx_kl_stop=10)
    policy_settings = PolicySettings(lora_rank=4, train=train).at(dtype)
    prompts = [Prompt(str(number), [*range(5, 15), 20 + number], 6) for number in range(8)]
    with on(name) as device:
        policy = TrainablePolicy.create(model_directory, policy_settings, torch_dtype(dtype), device)
        source = ExperienceSource(TinyEngine(model_directory, settings(directory), dtype, 64), prompts, 0.85, 0)
        improver = PPO(ppo, policy_settings)
        task = Task(policy, source, reward_model(), Budget(100.0), directory, lambda step: None)
        found = improver.improve(task)
        return found.steps, [parameter.detach().float().cpu() for parameter in policy.parameters]


def same(one: tuple[list[StepMetrics], list[Tensor]], other: tuple[list[StepMetrics], list[Tensor]]) -> None:
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert asdict(ours) == pytest.approx(asdict(theirs), rel=1e-4, abs=1e-5)
    for a, b in zip(one[1], other[1], strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "lora"), ("float32", "full"), ("bfloat16", "lora")])
def test_ppo_and_its_state(dtype: DtypeName, kind: str, tmp_path: Path, model_directory: Path) -> None:
    """The second step resumes from the state that the first left on disk."""
    (tmp_path / "cpu").mkdir()
    expected = train("cpu", tmp_path / "cpu", model_directory, dtype, kind)
    (tmp_path / "cuda").mkdir()
    train("cuda", tmp_path / "cuda", model_directory, dtype, kind, steps=1)
    found = train("cuda", tmp_path / "cuda", model_directory, dtype, kind)
    same(found, expected)
    assert found[0][1].kl != 0


class WithoutDevice:
    """torch, except that one factory ignores the device."""

    def __init__(self, factory: str) -> None:
        self._factory = factory

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name != self._factory:
            return found
        return lambda *arguments, device=None, **named: found(*arguments, **named)


@pytest.mark.parametrize(
    ("module", "factory"),
    [
        ("learner.improve.policy_gradient", "zeros"),
        ("learner.improve.ppo.advantages", "arange"),
        ("learner.model.features", "arange"),
        ("learner.model.passes", "zeros"),
    ],
)
def test_a_forgotten_device_is_found(
    module: str, factory: str, tmp_path: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{module}.torch", WithoutDevice(factory))
    with pytest.raises(WrongDeviceError):
        train("cuda", tmp_path, model_directory, steps=1)


class OnCpu(Critic):
    def to(self, *_: Any, **__: Any) -> "OnCpu":
        return self


@pytest.mark.parametrize(
    ("replaced", "by"),
    [
        ("learner.model.rollout.Rollout.to", lambda rollout, device: rollout),
        ("learner.improve.ppo.trainer.make_critic", lambda model: OnCpu(*model.linear_head())),
        ("learner.improve.training.draw_minibatches", lambda *_: [[torch.arange(4), torch.arange(4, 8)]] * 2),
    ],
)
def test_what_stays_on_the_cpu_is_found(
    replaced: str, by: Any, tmp_path: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaced, by)
    with pytest.raises(WrongDeviceError):
        train("cuda", tmp_path, model_directory, steps=1)


def test_moments_that_stay_on_the_cpu_are_found(
    tmp_path: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(adam: torch.optim.Adam, state: Any) -> None:
        parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            adam.state[parameter] = {name: moment.cpu() for name, moment in state["state"][number].items()}

    train("cuda", tmp_path, model_directory, steps=1)
    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", load)
    with pytest.raises(WrongDeviceError):
        train("cuda", tmp_path, model_directory)


def test_adapters_and_all_weights_are_loaded_where_the_policy_is(tmp_path: Path, model_directory: Path) -> None:
    for kind in ("lora", "full"):
        with pretended_gpu():
            policy = TrainablePolicy.create(
                model_directory, PolicySettings(lora_rank=4, train=kind), torch.float32, torch.device("cuda")
            )
            with torch.no_grad():
                for parameter in policy.parameters:
                    parameter.fill_(0.5)
            policy.save(tmp_path / kind)
            for parameter in policy.parameters:
                parameter.data.zero_()
            policy.load(tmp_path / kind)
            assert {parameter.device for parameter in policy.parameters} == {GPU}
            assert {float(parameter.detach().mean()) for parameter in policy.parameters} == {0.5}


def test_adapters_begin_alike_on_both_devices(model_directory: Path) -> None:
    begun = []
    for name in ("cpu", "cuda"):
        with on(name) as device:
            policy = TrainablePolicy.create(model_directory, PolicySettings(lora_rank=4), torch.float32, device, seed=3)
            begun.append([parameter.detach().cpu() for parameter in policy.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*begun, strict=True))


# Small fits, which are on the CPU in any case.
SMALL: dict[str, Any] = {
    "reward": {
        "signal_flips": 20, "reference_answers": 8, "folds": 2, "fold_repeats": 1, "l2_grid": [3.0], "members": 2,
        "signal_folds": 2, "signal_repeats": 1,
        # The second round is some seconds later, which must not matter.
        "half_life_days": 1e12,
    },
    "ppo": {"steps": 1, "episodes": 8, "learning_rate": 3e-3},
    "gate": {"refits": 100, "candidates": 1, "prompts": 8, "answers": 1, "signal_p": 0.9, "confirm_prompts": 8},
}  # fmt: skip


def run(data_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The metrics of a whole round, as JSON, without its times."""
    monkeypatch.setattr(workspace, "RolloutEngine", TinyEngine)
    monkeypatch.setattr(judging, "decide", passing)
    with on(name):
        report = run_once(settings(data_dir, learner_device=name, **SMALL), Stages(Console(quiet=True)))
    assert report.state == "promoted"
    return {kind: values for kind, values in report.metrics.to_json().items() if kind != "seconds"}


def test_a_round_and_then_the_users(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features, signal test, reward model, PPO, gate: each in a model that is on the device."""
    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    expected = run(data_dir, "cpu", monkeypatch)
    _pretend_that_torch_sees_it(monkeypatch)
    found = run(other, "cuda", monkeypatch)
    ours, theirs = flat(found), flat(expected)
    for name, value in theirs.items():
        assert ours[name] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value), name
    for file, apart in (("reward_models/rm0001/head", 0), ("policies/v0001/adapter_model", 1e-6)):
        here, there = (load_file(where / f"{file}.safetensors") for where in (data_dir, other))
        assert all(torch.allclose(here[name], there[name], rtol=0, atol=apart) for name in here)
    # Features that the round stored would leave nothing to compute.
    shutil.rmtree(other / "cache")
    with pretended_gpu():
        [user] = read_users(settings(other, learner_device="cuda"))
    assert user.votes["choices"] == 80


def _pretend_that_torch_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_available=lambda: True, mem_get_info=lambda: (60 * GIB, 80 * GIB))
    monkeypatch.setattr("learner.model.device.torch", SimpleNamespace(cuda=cuda, device=torch.device))


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested JSON as one dictionary."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        return {name: values}
    return {key: value for under, each in items for key, value in flat(each, f"{name}.{under}").items()}


def test_scores(data_dir: Path) -> None:
    register(data_dir, "rm0001", scoring_model(1))
    pairs, found = [(PROMPT, candidate) for candidate in CANDIDATES], []
    for name in ("cpu", "cuda"):
        with on(name) as device:
            scorer = Scorer(data_dir, "float32", device, 64)
            found.append([score.score for score in scorer.score(pairs).scores])
            scorer.close()
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def test_features_that_stay_on_the_gpu_are_found(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left_there(*arguments: Any) -> Tensor:
        return extract(*arguments).to("cuda")

    register(data_dir, "rm0001", scoring_model(1))
    monkeypatch.setattr("learner.ops.score_server.extract", left_there)
    with pretended_gpu():
        scorer = Scorer(data_dir, "float32", torch.device("cuda"), 64)
        with pytest.raises(WrongDeviceError):
            scorer.score([(PROMPT, CANDIDATES[0])])
        scorer.close()


def test_a_rollout_keeps_on_the_cpu_what_goes_with_the_scores() -> None:
    with pretended_gpu():
        rollout = to_rollout([SampledAnswer([5], [7, 2], [-1.0, -2.0], "", "stop")]).to(torch.device("cuda"))
        assert (rollout.tokens.input_ids.device, rollout.behavior_logprobs.device) == (GPU, GPU)
        assert rollout.ended.device == CPU
