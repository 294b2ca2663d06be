"""Prints a report, for people or as JSON."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.doctor.examine import Report

STYLES = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def show(report: Report, console: Console | None = None) -> None:
    """Print the table, then a line of advice for each finding that is not ok."""
    console = console or Console()
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "found"):
        table.add_column(heading, overflow="fold")
    for finding in report.findings:
        table.add_row(finding.name, Text(finding.state, STYLES[finding.state]), Text(finding.value))
    console.print(table)
    for finding in report.findings:
        if finding.advice:
            console.print()
            headed = Text.assemble((f"{finding.state}, {finding.name}: ", STYLES[finding.state]), finding.advice)
            # One line each: a terminal wraps it, and a log can be searched.
            console.print(headed, soft_wrap=True)


def to_json(report: Report) -> str:
    return json.dumps(
        {"state": report.state, **report.figures, "findings": [asdict(finding) for finding in report.findings]},
        indent=2,
    )
