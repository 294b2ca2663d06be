"""Copies what two of server, learner and clients need, where neither may import the other. `make docs` runs it.

The clients get along without the server's package, and the server and the learner without the clients'.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPORT = "learner/ops/report_page"
# From a file to its copy.
COPIES = {
    "server/shared/setting_names.py": "clients/setting_names.py",
    "server/shared/loopback.py": "clients/loopback.py",
    "server/shared/variables.py": "clients/variables.py",
    "clients/web/charts/chart.py": f"{REPORT}/chart.py",
    "clients/interval.py": "learner/reward/interval.py",
    "clients/web/charts/curves.py": f"{REPORT}/curves.py",
    "clients/web/templates/chart.html.j2": f"{REPORT}/chart.html.j2",
    "clients/web/static/chart.css": f"{REPORT}/chart.css",
}
COMMENTS = {".py": "# {}", ".j2": "{{# {} #}}", ".css": "/* {} */"}


def module(path: str) -> str:
    """As it is imported."""
    return path.removesuffix(".py").replace("/", ".")


def copy(source: str) -> str:
    """The copy's text: it imports other copies."""
    text = (ROOT / source).read_text()
    for original, copied in COPIES.items():
        text = text.replace(f"from {module(original)} import", f"from {module(copied)} import")
    said = f"Copied from {source} by `make docs`: write there, not here."
    return COMMENTS[Path(source).suffix].format(said) + "\n" + text


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for source, target in COPIES.items():
        (directory / target).parent.mkdir(parents=True, exist_ok=True)
        (directory / target).write_text(copy(source))
