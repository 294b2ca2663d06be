"""`report.html` of a round: its metrics, its curves, answers before and after. One file, no scripts, no requests."""

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from learner.ops.report_page.chart import Chart
from learner.ops.report_page.curves import epoch_curves, step_curves
from learner.round.report import Report, rows
from server.shared.errors import FailedPreconditionError
from server.shared.whole_file import whole_file
from server.store.files.residue import REPORT, keeping, sweep
from server.store.files.round_samples import read_samples
from server.store.learning.records import Round
from server.store.store import Store

# Number of questions whose answers are shown side by side.
SHOWN = 12


def write_report(data_dir: Path, round_id: str | None = None) -> Path:
    """The file written for a round, the newest by default. Raises NotFoundError or FailedPreconditionError."""
    store = Store.open(data_dir)
    try:
        round_ = store.rounds.get(round_id) if round_id else next(iter(store.rounds.page(limit=1)), None)
    finally:
        store.close()
    if round_ is None:
        raise FailedPreconditionError("NO_ROUND", "No round has run here yet.")
    page = data_dir / "rounds" / round_.id / REPORT
    page.parent.mkdir(parents=True, exist_ok=True)
    with keeping(data_dir):
        answers = [asdict(sample) for sample in islice(read_samples(data_dir, round_), SHOWN)]
        with whole_file(page) as file:
            file.write(render(round_, answers))
    # If a quoted conversation was deleted in the meantime, this deletes the whole page.
    sweep(data_dir)
    return page


def render(round_: Round, answers: list[dict[str, Any]]) -> str:
    """The page. Answers are `conversation_id`, `prompt`, `before`, `after`; their content is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    report = Report(
        "nothing",
        round_.reason,
        round_.id,
        round_.policy_version,
        round_.reward_model_version,
        round_.incumbent_version,
        round_.metrics,
    )
    metrics = round_.metrics.to_json()
    return environment.get_template("report_page.html.j2").render(
        round=asdict(round_),
        rows=list(rows(report)),
        curves=curves(metrics),
        answers=answers,
        conversations=" ".join(answer["conversation_id"] for answer in answers if answer["conversation_id"]),
        settings=json.dumps(round_.settings, indent=2),
        versions=round_.metrics.versions,
    )


def curves(metrics: dict[str, Any]) -> list[Chart]:
    """The training curves of a round of either kind."""
    if "sft" in metrics:
        return epoch_curves(metrics["sft"])
    chosen = metrics["gate"]["chosen"]["step"] if "gate" in metrics else None
    return step_curves(metrics.get("improvement", {}), chosen)
