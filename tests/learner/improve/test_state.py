"""States to resume from, also as earlier commits wrote them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from learner.improve.adam import Adam
from learner.improve.state import load_state, save_state


def stepped(dtype: torch.dtype, steps: int) -> tuple[Adam, nn.Parameter]:
    """An optimizer after some steps on one matrix."""
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=dtype))
    optimizer = Adam([([parameter], 0.1)], 1e-8)
    for number in range(steps):
        (parameter.float() * torch.tensor([1.0, number - 3.0])).sum().backward()
        optimizer.step(1.0)
    return optimizer, parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_state_restores_weights_moments_and_figures(tmp_path: Path, dtype: torch.dtype, earlier: bool) -> None:
    """What two more steps make of it is what they make of an optimizer that was not stopped, to the bit."""
    figures = [{"step": 0}, {"step": 1}]
    optimizer, _ = stepped(dtype, 2)
    if earlier:
        (tmp_path / "state-002").mkdir()
        save_file(optimizer.state(), tmp_path / "state-002" / "optimizer.safetensors")
        (tmp_path / "state-002" / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    else:
        save_state(tmp_path, figures, optimizer)
    resumed, parameter = stepped(dtype, 0)
    assert load_state(tmp_path, resumed) == figures
    unbroken, expected = stepped(dtype, 2)
    assert torch.equal(parameter, expected)
    for each, weights in ((resumed, parameter), (unbroken, expected)):
        (weights.float() * torch.tensor([2.0, 1.0])).sum().backward()
        each.step(1.0)
    assert torch.equal(parameter, expected)
    assert {name: value.tolist() for name, value in resumed.state().items()} == {
        name: value.tolist() for name, value in unbroken.state().items()
    }


def test_a_parameter_that_never_had_a_gradient_is_no_obstacle(tmp_path: Path) -> None:
    def pair() -> tuple[Adam, nn.Parameter, nn.Parameter]:
        used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((3,), 7.0))
        return Adam([([used, unused], 0.1)], 1e-8), used, unused

    optimizer, used, _ = pair()
    used.sum().backward()
    optimizer.step(1.0)
    save_state(tmp_path, [{"step": 0}], optimizer)
    resumed, again, unused = pair()
    assert load_state(tmp_path, resumed) == [{"step": 0}]
    assert torch.equal(again, used)
    assert unused.tolist() == [7.0] * 3


def test_without_a_state_there_are_no_figures(tmp_path: Path) -> None:
    assert load_state(tmp_path, stepped(torch.float32, 0)[0]) == []
