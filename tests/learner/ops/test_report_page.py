"""A round's report page: everything in one file, with users' text escaped."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from learner.ops.report_page.report_page import render, write_report
from server.shared.errors import FailedPreconditionError, NotFoundError
from server.store.learning.records import Round
from server.store.learning.round_metrics import Improvement, RoundMetrics, StepMetrics
from server.store.store import Store
from tests.round_metrics import filled

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def finished(**changes: object) -> Round:
    values: dict[str, object] = {
        "id": "round_1",
        "state": "rejected",
        "stage": "gate",
        "watermark": 3,
        "incumbent_version": "v0000",
        "reference_version": "v0000",
        "policy_version": None,
        "reward_model_version": None,
        "settings": {"seed": 7},
        "metrics": RoundMetrics(versions={"torch": "2.13.0"}, seconds={"features": 2.0}),
        "reason": "It is worse.",
        "create_time": 0.0,
        "finish_time": 1.0,
    }
    return Round(**{**values, **changes})  # type: ignore[arg-type]


def test_text_of_users_and_models_is_escaped() -> None:
    answer = dict.fromkeys(("conversation_id", "prompt", "before", "after"), HOSTILE)
    page = render(finished(reason=HOSTILE), [answer])
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)") == 5
    assert "default-src 'none'" in page


def test_the_page_shows_results_and_settings() -> None:
    answers = [{"conversation_id": "conv_1", "prompt": "Why?", "before": "long", "after": "short"}]
    page = render(finished(), answers)
    for said in (
        "round_1",
        "rejected",
        "It is worse.",
        "features 2",
        "Why?",
        "long",
        "short",
        "2.13.0",
        "&#34;seed&#34;: 7",
    ):
        assert said in page, said
    assert "<svg" not in page


def test_the_curves_are_in_the_page_itself() -> None:
    step = filled(StepMetrics, score=1.0, mismatch_rms=float("nan"))
    steps = [replace(step, step=0, kl=0.0), replace(step, step=1, kl=2.0)]
    page = render(finished(metrics=RoundMetrics(improvement=Improvement(steps, [1], "steps", 3.5, 4.0))), [])
    titles = re.findall(r'<svg class="chart" viewBox="-14 0 294 168" role="img" aria-label="([^"]+)">', page)
    # The mismatch could not be measured.
    assert titles == [
        "Score and its uncertainty",
        "KL to the reference",
        "Answer length",
        "Entropy",
        "Clipped ratios",
        "Value loss",
        "KL penalty weight",
    ]
    # From 0 to 2 nats of 4, and 44 to 264 across.
    assert '<polyline class="line" points="44.0,128.0 264.0,68.0 "/>' in page
    assert re.findall(r'text-anchor="end">(target|budget)<', page) == ["target", "budget"]
    assert ".chart .line { fill: none;" in page
    assert not re.findall(r"(?:src|href)=", page)


def test_missing_rounds_are_refused(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    with pytest.raises(FailedPreconditionError, match="No round has run here yet"):
        write_report(tmp_path)
    with pytest.raises(NotFoundError, match="round_x"):
        write_report(tmp_path, "round_x")
