"""The place that a command runs in: its locale, its user, its folders."""

import getpass
import io
import json
import os
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import clients.cli
import learner.cli
import server.cli
from server.shared.errors import DatabaseError, NotFoundError
from server.shared.program import begin, sentence
from server.store.store import Store

PROGRAMS = ("server.cli", "learner.cli", "clients.cli")


def ran(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    everything: Any = {"capture_output": True, "text": True, "timeout": 60, "check": False, **options}
    return subprocess.run([sys.executable, "-m", *arguments], **everything)


def test_each_trouble_is_a_sentence_and_a_fault_of_ours_is_none() -> None:
    assert sentence(NotFoundError("policy", "v0009")) == "There is no policy 'v0009'."
    assert sentence(FileNotFoundError(2, "No such file or directory", "a/b.json")) == (
        "'a/b.json': No such file or directory."
    )
    assert sentence(OSError(28, "No space left on device")) == "[Errno 28] No space left on device."
    assert sentence(DatabaseError("disk I/O error")) == (
        "The data directory cannot be used (disk I/O error); give --data-dir a folder that you may write to."
    )
    assert sentence(KeyError("x")) is None


def test_what_a_command_writes_is_its_users_alone(tmp_path: Path) -> None:
    ran("server.cli", "keys", "create", "--user", "ann", "--data-dir", str(tmp_path / "data"), check=True)
    out = tmp_path / "ann.jsonl"
    ran("server.cli", "export-user", "ann", "--out", str(out), "--data-dir", str(tmp_path / "data"), check=True)
    assert stat.filemode(out.stat().st_mode) == "-rw-------"
    assert '"role": "user"' in out.read_text(encoding="utf-8")


def test_an_output_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    out = str(tmp_path / "none" / "ann.jsonl")
    result = ran("server.cli", "export-user", "ann", "--out", out, "--data-dir", str(tmp_path / "data"))
    assert (result.returncode, result.stderr) == (1, f"server: '{out}': No such file or directory.\n")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1", "nowhere.UTF-8"])
def test_a_locale_that_cannot_say_it_is_no_reason_to_fail(program: str, locale: str, tmp_path: Path) -> None:
    settings = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    assert ran(program, "--help", env=settings).returncode == 0


def test_what_a_terminal_cannot_say_is_escaped_in_an_export(tmp_path: Path) -> None:
    with closing(Store.open(tmp_path)) as store:
        store.conversations.create("ann", "你好")
    latin = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    exported = ran("server.cli", "export-user", "ann", "--data-dir", str(tmp_path), env=latin)
    assert (exported.returncode, exported.stderr) == (0, "")
    assert json.loads(exported.stdout)["conversation"]["title"] == "你好"


@pytest.mark.parametrize("program", PROGRAMS)
def test_settings_that_are_no_toml_are_a_sentence(program: str, tmp_path: Path) -> None:
    (tmp_path / "prefloop.toml").write_text("port = [", encoding="utf-8")
    command = {"server.cli": ["keys", "list"], "learner.cli": ["status"], "clients.cli": ["--help"]}[program]
    result = ran(program, *command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    assert "Traceback" not in result.stderr
    if program != "clients.cli":  # They read no file.
        assert result.returncode == 1
        assert "prefloop.toml is not TOML" in result.stderr


def test_a_user_without_a_name_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(getpass, "getuser", nameless)
    monkeypatch.setenv("LOGNAME", "")
    before = os.umask(0o022)
    try:
        begin()
        assert os.environ["LOGNAME"] == str(os.getuid())
    finally:
        os.umask(before)


HOSTILE = "red\x1b[31m, \x9b2Jgone, \x1b]0;title\x07, back\x08\x08, \u202eturned"
TAME = "red[31m, 2Jgone, ]0;title, back, turned"


def test_a_terminal_obeys_nothing_that_people_or_models_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    for say in (lambda: learner.cli._say(lambda: HOSTILE), lambda: server.cli._say(HOSTILE)):
        say()
        assert capsys.readouterr().out == TAME + "\n"
    for fail in (learner.cli._fail, server.cli._fail):
        with pytest.raises(SystemExit):
            fail(HOSTILE)
        assert capsys.readouterr().err.endswith(f": {TAME}\n")


@pytest.mark.parametrize(("terminal", "printed"), [(True, TAME), (False, HOSTILE)])
def test_an_answer_is_tame_on_a_terminal_and_itself_for_a_program(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, printed: str
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", output)
    clients.cli._echo(HOSTILE)
    assert output.getvalue() == printed
