"""A round's page and picture: everything in one file, and whatever users wrote stays text."""

import base64
import re
from pathlib import Path

import pytest

from learner.ops.report_page import render, write_report
from server.shared.errors import FailedPreconditionError, NotFoundError
from server.store.learning.records import Round
from server.store.learning.round_metrics import RoundMetrics
from server.store.store import Store

PNG = b"\x89PNG\r\n\x1a\n"
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


def test_what_users_and_models_wrote_stays_text() -> None:
    answer = dict.fromkeys(("conversation_id", "prompt", "before", "after"), HOSTILE)
    page = render(finished(reason=HOSTILE), None, [answer])
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)") == 5
    assert "default-src 'none'" in page


def test_the_page_says_what_and_how(tmp_path: Path) -> None:
    (tmp_path / "report.png").write_bytes(PNG)
    answers = [{"conversation_id": "conv_1", "prompt": "Why?", "before": "long", "after": "short"}]
    page = render(finished(), tmp_path / "report.png", answers)
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
    [picture] = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture) == PNG
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_rounds_that_are_not_there(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    with pytest.raises(FailedPreconditionError, match="No round was run here yet"):
        write_report(tmp_path)
    with pytest.raises(NotFoundError, match="round_x"):
        write_report(tmp_path, "round_x")
