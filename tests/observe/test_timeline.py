"""Timelines show what happened, at any length, and the report command prints and draws it."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from rollout_spec import cli
from rollout_spec.observe.report import EvidenceLevel, Report
from rollout_spec.observe.timeline import Series, draw_html, draw_png
from rollout_spec.observe.trace import TraceError, write_trace
from rollout_spec.policy.records import Reason, Trace, TraceRequest, TraceStep


def drain(passes: int, largest: int = 64, rounds: int = 1, seed: int = 0) -> Trace:
    """`rounds` RL steps, each the long tail of a rollout: speculation from 16 sequences down, 4 % of it probes."""
    rng = np.random.default_rng(seed)
    steps, requests, events, clock = [], [], [], 0.0
    for index in range(passes):
        at = index % -(-passes // rounds)
        if at == 0 and index:
            events.append((clock, "weights updated"))
            clock += 0.02 * passes / rounds / 10  # training: nothing decodes
        batch = max(1, round(largest * math.exp(-7 * at * rounds / passes)))
        context = 200 + 8000 * at * rounds // passes
        plain = (0.010 + 1e-4 * batch + 2e-8 * batch * context) * rng.lognormal(0, 0.05)
        mode, reason, longest, gain = "plain", Reason.NOT_WORTH, 0, 1.0
        if batch <= 16:
            mode, reason = ("int4", Reason.PROBE) if rng.random() < 0.04 else ("int4", Reason.STILL_PAYS)
            longest, gain = (3 if batch > 4 else 7), 1.4
            if batch <= 2 and rng.random() < 0.5:
                mode = "history+int4" if rng.random() < 0.6 else "history"
            if reason is Reason.PROBE:
                mode, longest, gain = "plain", 0, 1.0
            elif not steps or steps[-1].batch > 16:
                reason = Reason.PAYS
        drafted = longest * batch
        accepted = int(rng.binomial(drafted, 0.75 - 0.1 * at * rounds / passes))
        draft, target = (0.25 * plain * longest / 3, 1.15 * plain) if longest else (0.0, plain)
        row = (index, clock, batch, batch * context, mode, drafted, accepted, batch + accepted, longest)
        steps.append(TraceStep(*row, draft, target, reason.value, gain))
        clock += draft + target
    for index in range(12):
        times = (0.0, clock * (index + 1) / 12)
        requests.append(
            TraceRequest(f"problem-{index}/<0>", 40, 100 * index + 10, *times, 90 * index, 60 * index)
        )
    return Trace(
        {"model": "toy <7B>", "seed": seed, "evidence_level": "L3"},
        tuple(steps),
        tuple(requests),
        tuple(events),
    )


def run(*arguments: object) -> click.testing.Result:
    return CliRunner().invoke(cli.main, ["report", *map(str, arguments)])


# --- series


@pytest.mark.parametrize(("passes", "rounds"), [(10, 1), (3000, 1), (5000, 3)])
def test_columns_lose_nothing(passes: int, rounds: int) -> None:
    trace = drain(passes, rounds=rounds)
    series = Series.of(trace.steps, columns=400)
    width = series.edges[1] - series.edges[0]
    busy = sum(step.draft_seconds + step.target_seconds for step in trace.steps)
    assert sum(share.sum() for share in series.shares.values()) * width == pytest.approx(busy)
    assert np.nanmax(series.batch[2]) == max(step.batch for step in trace.steps)
    assert np.nanmin(series.batch[0]) == 1
    assert np.nanmax(series.longest[2]) == max(step.longest for step in trace.steps)
    for least, mean, largest in (series.batch, series.longest):
        there = ~np.isnan(mean)
        assert (least[there] <= mean[there] + 1e-9).all() and (mean[there] <= largest[there] + 1e-9).all()
    total = sum(series.shares.values())
    assert total.max() <= 1 + 1e-9
    assert (total.min() < 1e-9) == (rounds > 1)  # training leaves a gap
    assert np.isnan(series.batch[1]).any() == (rounds > 1)


def test_probes_leave_no_trace_in_the_draft_length() -> None:
    """In columns shorter than a pass, and in a trace of nothing else."""
    series = Series.of(drain(300).steps, columns=5000)
    least, mean, largest = (of[~np.isnan(of)] for of in series.longest)
    assert set(least) == set(largest) == {0.0, 3.0, 7.0}
    assert (least <= mean + 1e-9).all() and (mean <= largest + 1e-9).all()
    probe = TraceStep(0, 0.0, 1, 9, "plain", 0, 0, 1, 0, 0.0, 0.1, "probe", 1.0)
    assert np.isnan(Series.of([probe]).longest).all()


def test_rates_are_those_of_the_window() -> None:
    """Four tokens every tenth of a second, three of four drafts accepted, then plain and slower."""
    fast = [TraceStep(i, i / 10, 1, 9, "int4", 4, 3, 4, 4, 0.0, 0.1, "pays", 1.5) for i in range(100)]
    slow = [
        TraceStep(100 + i, 10 + i / 5, 1, 9, "plain", 0, 0, 1, 0, 0.0, 0.2, "off", 1.0) for i in range(50)
    ]
    series = Series.of(fast + slow, columns=100)
    assert series.throughput[[0, 20, 48]] == pytest.approx([40.0] * 3)
    assert series.throughput[[52, 99]] == pytest.approx([5.0] * 2)
    assert series.acceptance[[0, 48]] == pytest.approx([0.75] * 2)
    assert np.isnan(series.acceptance[[52, 99]]).all()
    assert series.window == pytest.approx(20 / 80)


# --- pictures


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.parametrize(("passes", "rounds"), [(1, 1), (10, 1), (20_000, 3)])
def test_any_length_is_drawn(tmp_path: Path, passes: int, rounds: int) -> None:
    pytest.importorskip("matplotlib")
    trace = drain(passes, rounds=rounds)
    events = tuple((0.001 * index, f"${index}\n\\frac$ of a {'long ' * 20}text") for index in range(50))
    draw_png(replace(trace, events=(*trace.events, *events)), tmp_path / "t.png")
    assert png_size(tmp_path / "t.png")[0] > 1000


def test_the_page_needs_nothing_else_and_trusts_no_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_html(drain(2000, rounds=2), tmp_path / "t.html")
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert re.findall(r'src="([^,"]+),', page) == ["data:image/png;base64"]
    assert "toy &lt;7B&gt;" in page and "<7B>" not in page
    assert "problem-11/&lt;0&gt;" in page and "problem-1/" not in page
    assert "The 10 longest of 12" in page and "weights updated" in page
    for text in (
        "Speculation saved",
        "makespan",
        "acceptance",
        "tau",
        "tokens per second",
        "switches",
        "pays",
    ):
        assert text in page


def test_an_empty_trace_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nothing to draw"):
        draw_png(Trace({}, ()), tmp_path / "t.png")


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TraceError, match=r"pip install 'rollout-spec\[plots\]'"):
        draw_png(drain(10), tmp_path / "t.png")


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(TraceError, match=r"no/t\.png: cannot be written"):
        draw_png(drain(10), tmp_path / "no" / "t.png")


# --- the command


def test_report_prints_draws_and_writes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = drain(2000)
    write_trace(trace, tmp_path / "t.json.gz")
    files = {name: tmp_path / f"out.{name}" for name in ("png", "html", "json")}
    result = run(
        tmp_path / "t.json.gz", *(part for name, path in files.items() for part in (f"--{name}", path))
    )
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "toy <7B>" in output and "Speculation saved" in output
    assert f"{sum(step.emitted for step in trace.steps):,} in 2,000 passes" in output
    assert all(path.stat().st_size > 1000 for path in files.values())
    report = Report.read(files["json"])
    assert report.evidence_level is EvidenceLevel.L3
    assert report.results["passes"] == 2000 and report.results["about"]["model"] == "toy <7B>"
    saved = report.results["saved"]["seconds_saved"]
    assert saved["low"] < saved["value"] < saved["high"]


def test_report_of_a_rollout_without_probes_says_so(tmp_path: Path) -> None:
    trace = drain(500)
    steps = tuple(replace(step, reason="fixed") for step in trace.steps)
    write_trace(replace(trace, steps=steps, about={"passes_not_recorded": 7}), tmp_path / "t.json")
    result = run(tmp_path / "t.json", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert "The time saved cannot be stated: 0 randomized plain passes" in " ".join(result.output.split())
    assert "7 later passes were not recorded" in result.output
    assert json.loads((tmp_path / "r.json").read_text())["results"]["saved"]["seconds_saved"] is None


def test_report_of_an_empty_trace_is_a_table(tmp_path: Path) -> None:
    write_trace(Trace({}, ()), tmp_path / "t.json")
    result = run(tmp_path / "t.json")
    assert result.exit_code == 0, result.output
    assert "no pass speculated" in result.output


def test_report_of_a_malformed_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    result = run(tmp_path / "t.json")
    assert result.exit_code == 2
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
