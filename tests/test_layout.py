"""Rules for the source tree: imports, the place of SQL, what loads when, and up-to-date generated files."""

import ast
import filecmp
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from clients.generate import generate

TOPS = ("server", "learner", "clients")


def modules(root: Path) -> dict[str, set[str]]:
    """The imports of each of our modules, at any depth of its code, with candidate names of submodules."""
    found: dict[str, set[str]] = {}
    for path in (path for top in TOPS for path in (root / top).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found[name] |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, *packages: str) -> bool:
    """Whether a module is one of these packages or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# (packages, forbidden imports, exceptions among those imports, modules that are exempt)
RULES = [
    (["server"], ["learner", "clients"], [], []),
    (["clients"], ["server", "learner", "torch"], [], []),
    (["learner"], ["clients"], [], []),
    (["learner"], ["server"], ["server.store", "server.shared"], ["learner.ops.rebase"]),
    # A reference is made by the same code, whether a server starts or the model is changed.
    (["learner.ops.rebase"], ["server"], ["server.store", "server.shared", "server.reference"], []),
    (["server.shared"], ["server"], ["server.shared"], []),
    (["server.store"], ["server"], ["server.store", "server.shared"], []),
    (["server.store", "server.shared"], ["grpc", "prefloop", "google", "vllm"], [], []),
    (["server.store"], ["torch", "transformers"], [], []),
    (["server.turns"], ["grpc", "prefloop", "google", "server.rpc"], [], []),
    (
        ["server.versions", "server.engine", "server.reference"],
        ["grpc", "prefloop", "google", "server.rpc", "server.turns"],
        [],
        [],
    ),
    # The learner's cache of features is a separate file, written with sqlite-utils.
    (
        ["server", "learner", "clients"],
        ["sqlite3", "pysqlite3", "sqlite_utils"],
        [],
        ["server.store.sqlite", "server.store.migrations", "learner.model.features"],
    ),
    # The store implementation is chosen in one place; the doctor checks the SQLite library.
    (
        ["server", "learner"],
        ["server.store.sqlite"],
        [],
        ["server.store.sqlite", "server.store.store", "server.doctor"],
    ),
    (["server", "learner"], ["server.store.postgres"], [], ["server.store.postgres", "server.store.store"]),
    (["server", "learner", "clients"], ["psycopg", "psycopg_pool"], [], ["server.store.postgres"]),
    (["learner.model", "learner.reward", "learner.gate", "learner.improve"], ["learner.round", "learner.ops"], [], []),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{'+'.join(rule[0])} without {'+'.join(rule[1])}")
def test_who_may_import_whom(root: Path, rule: tuple[list[str], list[str], list[str], list[str]]) -> None:
    who, forbidden, but, may = rule
    assert [
        f"{name} imports {imported}"
        for name, everything in modules(root).items()
        if within(name, *who) and not within(name, *may)
        for imported in sorted(everything)
        if within(imported, *forbidden) and not within(imported, *but)
        if not any(within(allowed, imported) for allowed in but)
    ] == []


def test_ways_to_improve_do_not_know_each_other(root: Path) -> None:
    ways = [f"learner.improve.{path.name}" for path in (root / "learner" / "improve").iterdir() if path.is_dir()]
    assert "learner.improve.ppo" in ways
    assert [
        f"{name} imports {imported}"
        for name, everything in modules(root).items()
        for way in ways
        if within(name, way)
        for imported in sorted(everything)
        if within(imported, *ways) and not within(imported, way)
    ] == []


SQL = re.compile(r"\s*(SELECT|INSERT INTO|UPDATE \w+ SET|DELETE FROM|CREATE (TABLE|INDEX)|PRAGMA|VACUUM)\b")
# Syntax that only SQLite understands.
DIALECT = re.compile(r"unixepoch|json_each|json_group_array|INSERT OR |PRAGMA|VACUUM|strftime|sqlite_master|x''|GLOB")


def strings(path: Path) -> list[str]:
    """Every string in the code except docstrings; of an f-string, its literal parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs)
    return [node.value for node in nodes if isinstance(node.value, str)]


def test_sql_is_in_the_store_alone_and_dialects_in_their_rooms(root: Path) -> None:
    sql, dialect = [], []
    for path in (path for top in TOPS for path in (root / top).rglob("*.py")):
        place = path.relative_to(root)
        sql += [f"{place}: {text}" for text in strings(path) if SQL.match(text)]
        dialect += [f"{place}: {text}" for text in strings(path) if DIALECT.search(text)]
    assert sql
    assert [found for found in sql if not found.startswith("server/store/")] == []
    rooms = ("server/store/sqlite/", "server/store/postgres/", "server/store/migrations.py")
    assert [found for found in dialect if not found.startswith(rooms)] == []


def without_encoding(path: Path) -> list[str]:
    """Calls that open a file as text without naming an encoding."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        mode = next((arg.value for arg in node.args if isinstance(arg, ast.Constant)), "")
        text = isinstance(mode, str) and 0 < len(mode) <= 3 and set(mode) <= set("rwxat+")
        if name in ("read_text", "write_text") or (name == "open" and text):
            found.append(f"{path}:{node.lineno}")
    return found


def test_texts_are_utf8_whatever_the_machines_locale(root: Path) -> None:
    ours = (path for package in ("server", "learner", "clients") for path in (root / package).rglob("*.py"))
    assert [place for path in ours for place in without_encoding(path)] == []


LIGHT = ("server.cli", "learner.cli", "clients.cli", "server.store.store", "server.process", "server.settings")
ALSO_LIGHT = ("learner.settings", "server.shared.settings_base", "server.doctor.examine")


@pytest.mark.parametrize("module", [*LIGHT, *ALSO_LIGHT])
def test_starting_a_command_loads_neither_torch_nor_vllm(module: str) -> None:
    check = f"import sys, {module}; sys.exit(bool({{'torch', 'vllm', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0


def test_the_committed_stubs_are_the_protos(root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "proto/generate.py", str(tmp_path)], cwd=root, check=True, timeout=60)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*")}
    kept = {path.relative_to(root / "proto") for path in (root / "proto").rglob("*_pb2*.py*") if path.suffix != ".pyc"}
    assert made == kept
    changed = [name for name in made if not filecmp.cmp(tmp_path / name, root / "proto" / name, shallow=False)]
    assert changed == [], "run `make stubs`"


def test_the_committed_client_is_the_async_one_without_its_async(root: Path) -> None:
    assert generate() == (root / "clients" / "client.py").read_text(), "run `make stubs`"


def test_nothing_shadows_the_package_proto(root: Path) -> None:
    assert not (root / "proto" / "__init__.py").exists()


# Files above the limit, each with the reason.
LONG_FILES = {
    "clients/async_client.py": "one class with a method per call and the examples that are its reference",
    "clients/client.py": "generated from async_client.py",
    "server/store/migrations.py": "a released migration is never edited",
}
LONG_FUNCTIONS = {
    "server/store/migrations.py m001_chat": "one table after another",
    "server/store/migrations.py m003_policies": "one table after another",
}
MOST_LINES, MOST_FUNCTION_LINES, MOST_FILES = 350, 50, 15


def test_files_functions_and_folders_can_be_held_in_the_head(root: Path) -> None:
    files = [path for top in TOPS for path in (root / top).rglob("*.py")]
    long_files, long_functions = set(), set()
    for path in files:
        name, text = str(path.relative_to(root)), path.read_text(encoding="utf-8")
        if text.count("\n") > MOST_LINES:
            long_files.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                if node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES:
                    long_functions.add(f"{name} {node.name}")
    assert long_files == set(LONG_FILES)
    assert long_functions == set(LONG_FUNCTIONS)
    folders = Counter(path.parent for path in files if path.name != "__init__.py")
    assert {str(folder.relative_to(root)): count for folder, count in folders.items() if count > MOST_FILES} == {}
