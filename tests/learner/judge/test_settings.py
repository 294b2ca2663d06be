"""Where users' texts may be sent is said twice, or they stay on this machine."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from learner.judge_settings import JudgeSettings
from learner.settings import LearnerSettings

LOCAL = "http://127.0.0.1:8000/v1"


def test_there_is_no_judge_unless_one_is_set() -> None:
    assert LearnerSettings().judge.name == ""


@pytest.mark.parametrize("url", [LOCAL, "http://localhost:1/v1", "https://[::1]:8000/v1"])
def test_a_judge_on_this_machine(url: str) -> None:
    assert JudgeSettings(url=url, model="m").name.startswith("m ")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"url": "https://example.com/v1", "model": "m"}, "users' texts would leave this machine"),
        ({"url": "https://example.com/v1", "model": "m", "host": "example.org"}, "set judge.host to example.com"),
        ({"url": LOCAL}, "needs judge.model"),
        ({"url": "127.0.0.1:8000", "model": "m"}, "is not a URL"),
        ({"url": "http://u:secret@127.0.0.1:8000/v1", "model": "m"}, "the key is judge.api_key"),
        ({"url": "http://127.0.0.1:8000/v1?key=secret", "model": "m"}, "the key is judge.api_key"),
        ({"url": "ftp://127.0.0.1/v1", "model": "m"}, "is not a URL"),
    ],
)
def test_what_is_refused(values: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        JudgeSettings(**values)  # type: ignore[arg-type]


def test_a_host_that_is_named_again_may_be_asked() -> None:
    assert JudgeSettings(url="https://Example.com/v1", host="example.com", model="m").name
    assert JudgeSettings(url="https://example.com/v1", host="Example.com", model="m").name


def test_another_rubric_is_another_judge(tmp_path: Path) -> None:
    (tmp_path / "rubric.txt").write_text("The shorter one.\n")
    names = {JudgeSettings(url=LOCAL, model="m", rubric_file=file).name for file in (None, tmp_path / "rubric.txt")}
    assert len(names) == 2


def test_the_key_is_neither_stored_nor_shown() -> None:
    settings = LearnerSettings(judge={"url": LOCAL, "model": "m", "api_key": "hunter2"})
    assert "hunter2" not in settings.model_dump_json() + repr(settings)
    assert settings.judge.api_key.get_secret_value() == "hunter2"
