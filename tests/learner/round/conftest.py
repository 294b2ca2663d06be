"""An engine without vLLM for rounds that run in the test's own process."""

import pytest

import learner.round.workspace as workspace
from tests.learner.rounds import TinyEngine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[TinyEngine]:
    monkeypatch.setattr(workspace, "RolloutEngine", TinyEngine)
    return TinyEngine
