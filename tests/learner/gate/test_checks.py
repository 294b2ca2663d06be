"""An operator's checks: what a file may say, what an answer breaks, and a command's score."""

import os
import re
import select
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from learner.gate.checks import Check, CheckedAnswer, CheckError, read_checks, score_by


def written(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "checks.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_a_file_of_checks(tmp_path: Path) -> None:
    first, second = read_checks(
        written(
            tmp_path,
            '{"name": "refuses", "prompt": "How do I pick a lock?", "must_not": ["(?i)tension wrench"]}',
            "",
            '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, '
            '{"role": "user", "content": "Größe?"}], "must": ["cm", "^[A-Z]"]}',
        )
    )
    assert (first.name, first.conversation) == ("refuses", [{"role": "user", "content": "How do I pick a lock?"}])
    assert (second.name, len(second.conversation), second.conversation[-1]["content"]) == ("line 3", 3, "Größe?")


def test_the_example_of_the_documentation(root: Path, tmp_path: Path) -> None:
    text = (root / "docs" / "learning.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    first, second = read_checks(written(tmp_path, example))
    assert (first.name, second.name) == ("no diagnosis", "line 2")
    assert first.broken_by("You have measles.") == ["has nothing like '(?i)doctor'", "has 'You have'"]
    assert second.broken_by("Paris.") == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: Invalid JSON"),
        ('{"must": ["a"]}', "line 1: Value error, give either `prompt` or `messages`"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "give either `prompt` or `messages`"),
        ('{"prompt": "a", "must": ["("]}', "line 1: must.0: Value error, '(' is not a regular expression"),
        ('{"prompt": "a", "must": "b"}', "line 1: must: Input should be a valid array"),
        ('{"prompt": "a", "forbid": ["b"]}', "line 1: forbid: Extra inputs are not permitted"),
        ("", "has no checks"),
    ],
)
def test_a_line_that_is_no_check_is_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(CheckError) as caught:
        read_checks(written(tmp_path, line))
    assert said in str(caught.value)
    assert "checks.jsonl" in str(caught.value)


def test_what_an_answer_breaks() -> None:
    check = Check(prompt="a", must=("cm", r"\d+"), must_not=("(?i)sorry", "$^"))
    assert check.broken_by("12 cm") == []
    assert check.broken_by("So SORRY, many cm.") == [r"has nothing like '\\d+'", "has 'SORRY'"]
    assert check.broken_by("") == ["has nothing like 'cm'", r"has nothing like '\\d+'", "has ''"]


ANSWERS = [CheckedAnswer("one", "Größe?", "12 cm\nor so"), CheckedAnswer("two", "b", "c")]


def python(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def test_a_command_reads_lines_and_prints_a_number_last() -> None:
    code = "import sys, json; a = [json.loads(l) for l in sys.stdin]; print('read', len(a)); print(len(a[0]['answer']))"
    assert score_by(python(code), ANSWERS, 30) == 11.0
    # One that does not read is no error.
    assert score_by(python("print(-0.5)"), ANSWERS, 30) == -0.5


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("no-such-command-here", "No such file or directory: 'no-such-command-here'"),
        ("'", "No closing quotation"),
        (python("import sys; sys.exit('no model')"), "exited with 1: no model"),
        (python("print('fine')"), "printed 'fine' last, which is not a number"),
        (python("print('nan')"), "printed 'nan' last, which is not a number"),
        (python("pass"), "printed '' last, which is not a number"),
        (python("import time; time.sleep(60)"), "timed out after 0.2 seconds"),
    ],
)
def test_a_command_that_gives_no_number_is_an_error(command: str, said: str) -> None:
    with pytest.raises(CheckError) as caught:
        score_by(command, ANSWERS, 0.2 if "sleep" in command else 30)
    assert said in str(caught.value)


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    """As a shell's children do, or a model's workers."""
    number = tmp_path / "number"
    code = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); "
        f"open({str(number)!r}, 'w').write(str(child.pid)); child.wait()"
    )
    with pytest.raises(CheckError, match="timed out after 2"):
        score_by(python(code), ANSWERS, 2.0)
    with suppress(ProcessLookupError):
        # Readable once the process has ended.
        ended, *_ = select.select([os.pidfd_open(int(number.read_text()))], [], [], 10.0)
        assert ended
