"""`rollout-spec report`: what a recorded rollout took, what speculation really saved, and how it went over time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rollout_spec.observe.report import EvidenceLevel, Report, finish, report_options
from rollout_spec.observe.timeline import draw_html, draw_png, figures
from rollout_spec.observe.trace import MISSED, read_trace
from rollout_spec.policy.accounting import Summary

_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--png", metavar="FILE", type=_FILE, help="Draw the timeline to FILE; needs matplotlib.")
@click.option("--html", metavar="FILE", type=_FILE, help="Write a page of it all to FILE; needs matplotlib.")
@report_options
def command(trace: Path, png: Path | None, html: Path | None, json_path: Path | None) -> None:
    """Sum up and draw TRACE, a recorded rollout (.json or .json.gz)."""
    recorded = read_trace(trace)
    summary = Summary.of(recorded)
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    for label, value in figures(summary).items():
        table.add_row(label, escape(value))
    console.print(f"[bold]{escape(str(recorded.about.get('model', trace.name)))}[/]", highlight=False)
    console.print(table, highlight=False)
    console.print(f"\n{escape(summary.saved.text)}", highlight=False)
    if MISSED in recorded.about:
        missed = f"{recorded.about[MISSED]} later passes were not recorded: the recorder was full"
        console.print(f"[bold yellow]{escape(missed)}[/]", highlight=False)
    for path, draw in ((png, draw_png), (html, draw_html)):
        if path is not None:
            draw(recorded, path)
            console.print(f"drawn to {escape(str(path))}", style="dim", highlight=False)
    if json_path is not None:
        level = str(recorded.about.get("evidence_level"))
        known = {known.value for known in EvidenceLevel}
        results = {"trace": str(trace), "about": dict(recorded.about), **asdict(summary)}
        finish(
            Report("report", results, evidence_level=EvidenceLevel(level) if level in known else None),
            json_path,
            console,
        )
