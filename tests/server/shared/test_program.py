"""A command's environment: its locale, its user, its folders."""

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
import learner.cli_settings
import server.cli
from server.shared.errors import DatabaseError, NotFoundError
from server.shared.program import begin, sentence
from server.store.store import Store

PROGRAMS = ("server.cli", "learner.cli", "clients.cli")


def ran(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    everything: Any = {"capture_output": True, "text": True, "timeout": 60, "check": False, **options}
    return subprocess.run([sys.executable, "-m", *arguments], **everything)


def test_each_expected_error_is_a_sentence_and_a_bug_is_not() -> None:
    assert sentence(NotFoundError("policy", "v0009")) == "There is no policy 'v0009'."
    assert sentence(FileNotFoundError(2, "No such file or directory", "a/b.json")) == (
        "'a/b.json': No such file or directory."
    )
    assert sentence(OSError(28, "No space left on device")) == "[Errno 28] No space left on device."
    assert sentence(DatabaseError("disk I/O error")) == (
        "The data directory cannot be used (disk I/O error); give --data-dir a folder that you may write to."
    )
    assert sentence(KeyError("x")) is None


def test_a_commands_files_are_private_to_its_user(tmp_path: Path) -> None:
    ran("server.cli", "keys", "create", "--user", "ann", "--data-dir", str(tmp_path / "data"), check=True)
    out = tmp_path / "ann.jsonl"
    ran("server.cli", "export-user", "ann", "--out", str(out), "--data-dir", str(tmp_path / "data"), check=True)
    assert stat.filemode(out.stat().st_mode) == "-rw-------"
    assert '"role": "user"' in out.read_text(encoding="utf-8")


def test_a_missing_output_folder_is_reported_in_a_sentence(tmp_path: Path) -> None:
    out = str(tmp_path / "none" / "ann.jsonl")
    result = ran("server.cli", "export-user", "ann", "--out", out, "--data-dir", str(tmp_path / "data"))
    assert (result.returncode, result.stderr) == (1, f"server: '{out}': No such file or directory.\n")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1", "nowhere.UTF-8"])
def test_output_does_not_fail_in_any_locale(program: str, locale: str, tmp_path: Path) -> None:
    settings = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    assert ran(program, "--help", env=settings).returncode == 0


def test_an_export_escapes_what_a_terminal_cannot_encode(tmp_path: Path) -> None:
    with closing(Store.open(tmp_path)) as store:
        store.conversations.create("ann", "你好")
    latin = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    exported = ran("server.cli", "export-user", "ann", "--data-dir", str(tmp_path), env=latin)
    assert (exported.returncode, exported.stderr) == (0, "")
    assert json.loads(exported.stdout)["conversation"]["title"] == "你好"


@pytest.mark.parametrize("program", PROGRAMS)
def test_invalid_toml_is_reported_in_a_sentence(program: str, tmp_path: Path) -> None:
    (tmp_path / "prefloop.toml").write_text("port = [", encoding="utf-8")
    command = {"server.cli": ["keys", "list"], "learner.cli": ["status"], "clients.cli": ["--help"]}[program]
    result = ran(program, *command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    assert "Traceback" not in result.stderr
    if program != "clients.cli":  # They read no file.
        assert result.returncode == 1
        assert "prefloop.toml is not TOML" in result.stderr


def test_a_user_without_a_name_is_known_by_the_user_id(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_text_cannot_control_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for say in (lambda: learner.cli_settings.say(lambda: HOSTILE), lambda: server.cli._say(HOSTILE)):
        say()
        assert capsys.readouterr().out == TAME + "\n"
    for fail in (learner.cli_settings.fail, server.cli._fail):
        with pytest.raises(SystemExit):
            fail(HOSTILE)
        assert capsys.readouterr().err.endswith(f": {TAME}\n")


@pytest.mark.parametrize(("terminal", "printed"), [(True, TAME), (False, HOSTILE)])
def test_an_answer_is_filtered_on_a_terminal_and_unchanged_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, printed: str
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", output)
    clients.cli._echo(HOSTILE)
    assert output.getvalue() == printed
