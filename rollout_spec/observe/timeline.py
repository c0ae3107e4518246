"""A rollout over time, drawn: how it decodes, live batch, draft length, acceptance, throughput.

Time is cut into `COLUMNS` equal columns. Where a column holds several passes a line is their mean and a shade
reaches from the least to the largest, so nothing is left out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from rollout_spec.observe.trace import TraceError
from rollout_spec.policy.accounting import Summary, seconds_text, switches
from rollout_spec.policy.records import HISTORY, PLAIN, Reason, Trace, TraceStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 1200
WINDOWS = 80  # acceptance and throughput are taken over 1 / WINDOWS of the time shown
LOG_FROM = 16  # largest batch from which the live batch is drawn on a logarithmic scale
LABEL_ROWS, LABEL_LENGTH = 3, 40
LABEL_WIDTH = 0.0062  # of one character, as a share of the axis
INK, MUTED, GRID, EVENT = "#22272e", "#6b7480", "#e3e7ec", "#b3261e"
PLAIN_COLOUR, HISTORY_COLOUR = "#c3c9d1", "#e8a33d"
DRAFTER_COLOURS, COMBINED_COLOURS = ("#3572c6", "#7fb0ea", "#1b3f73"), ("#7a3f9d", "#b68ad0", "#4a2063")
LONGEST_REQUESTS, FIRST_SWITCHES, NOTE_LENGTH = 10, 12, 165
_Extremes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Series:
    """What is drawn, by column of time.

    Attributes:
        edges: Borders of the columns, seconds, float64 [columns + 1].
        shares: For every mode the share of each column it takes, float64 [columns]; the rest is idle.
        batch, longest: (least, mean, largest) of the passes in each column, float64 [columns]; NaN without one.
            Probes, which draft nothing, are left out of `longest`.
        acceptance, throughput: Over a window around each column's middle, float64 [columns]; acceptance is NaN
            where nothing was drafted.
        window: Its width in seconds.
    """

    edges: np.ndarray
    shares: dict[str, np.ndarray]
    batch: _Extremes
    longest: _Extremes
    acceptance: np.ndarray
    throughput: np.ndarray
    window: float

    @classmethod
    def of(cls, steps: Sequence[TraceStep], columns: int = COLUMNS) -> Series:
        """The series of at least one pass, in order of time."""
        start = np.array([step.time for step in steps])
        seconds = np.array([step.draft_seconds + step.target_seconds for step in steps])
        end = np.minimum(start + seconds, np.append(start[1:], np.inf))
        duration = end - start
        modes = np.array([step.mode for step in steps])
        knots = np.stack([start, end], 1).ravel()
        edges = np.linspace(min(0.0, start[0]), max(end[-1], start[-1] + 1e-9), columns + 1)
        middle, window = (edges[1:] + edges[:-1]) / 2, (edges[-1] - edges[0]) / WINDOWS
        windows = np.clip([middle - window / 2, middle + window / 2], edges[0], edges[-1])

        def total(values: np.ndarray, borders: np.ndarray) -> np.ndarray:
            """Totals between borders [2, n], the value of a pass spread evenly over its duration."""
            after = np.cumsum(values)
            low, high = np.interp(borders, knots, np.stack([after - values, after], 1).ravel())
            return high - low

        def column(value: Callable[[TraceStep], int]) -> np.ndarray:
            return np.array([value(step) for step in steps], np.float64)

        within = np.stack([edges[:-1], edges[1:]])
        inside = np.stack(
            [np.searchsorted(end, within[0], "right"), np.searchsorted(start, within[1], "left")], 1
        )

        def extremes(values: np.ndarray, chosen: np.ndarray) -> _Extremes:
            """Of the chosen passes."""
            low, high = (np.where(chosen, values, no) for no in (np.inf, -np.inf))
            least = np.minimum.reduceat(np.append(low, np.inf), inside.ravel())[::2]
            largest = np.maximum.reduceat(np.append(high, -np.inf), inside.ravel())[::2]
            busy = total(duration * chosen, within)
            empty = (inside[:, 0] >= inside[:, 1]) | np.isinf(least) | (busy <= 1e-9 * window)
            mean = total(values * duration * chosen, within) / np.where(empty, 1.0, busy)
            found = (np.where(empty, np.nan, of) for of in (least, mean, largest))
            return tuple(found)  # type: ignore[return-value]

        plainly = column(lambda step: step.reason in (Reason.PROBE, Reason.REFERENCE))
        drafted = total(column(lambda step: step.drafted), windows)
        accepted = total(column(lambda step: step.accepted), windows)
        return cls(
            edges=edges,
            shares={
                str(mode): total(duration * (modes == mode), within) / (edges[1] - edges[0])
                for mode in np.unique(modes)
            },
            batch=extremes(column(lambda step: step.batch), np.ones(len(steps), bool)),
            longest=extremes(column(lambda step: step.longest), plainly == 0),
            acceptance=np.divide(accepted, drafted, out=np.full(columns, np.nan), where=drafted > 1e-6),
            throughput=total(column(lambda step: step.emitted), windows) / (windows[1] - windows[0]),
            window=window,
        )


def draw_png(trace: Trace, path: Path) -> None:
    """Draw the timeline of a trace.

    Raises:
        TraceError: The trace is empty, matplotlib is missing, or the file cannot be written.
    """
    _write(path, _png(trace, Summary.of(trace)))


def draw_html(trace: Trace, path: Path) -> None:
    """Write one page that needs nothing else: figures, timeline, switches, longest requests, provenance.

    Raises:
        TraceError: As `draw_png`.
    """
    summary = Summary.of(trace)
    picture = base64.b64encode(_png(trace, summary)).decode()
    _write(path, _page(trace, summary, picture).encode())


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written ({error}); name a file in a writable folder") from error


def _png(trace: Trace, summary: Summary) -> bytes:
    if not trace.steps:
        raise TraceError(
            "steps: the trace holds no pass, so there is nothing to draw; record a rollout first"
        )
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "pip install 'rollout-spec[plots]', or pip install matplotlib"
        raise TraceError(f"drawing needs matplotlib ({error}): {remedy}") from error
    content = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # a dollar sign in a name is a dollar sign
        figure = Figure(figsize=(12.5, 8.6), layout="constrained")
        _draw(figure, trace, summary)
        figure.savefig(content, format="png", dpi=140)
    return content.getvalue()


def _draw(figure: Figure, trace: Trace, summary: Summary) -> None:
    series = Series.of(trace.steps)
    edges, middle = series.edges, (series.edges[1:] + series.edges[:-1]) / 2
    panels = figure.subplots(6, 1, sharex=True, height_ratios=[0.75, 0.35, 2, 1.2, 1.2, 1.6])
    labels, strip, batch, longest, acceptance, throughput = panels
    colours = _colours(series.shares)

    floor = np.zeros(len(middle))
    for mode, colour in colours.items():
        share = series.shares[mode]
        strip.stairs(floor + share, edges, baseline=floor, fill=True, color=colour, label=mode, lw=0)
        floor = floor + share
    strip.set(ylim=(0, 1), yticks=[], ylabel="time in")

    logarithmic = float(np.nanmax(series.batch[2])) > LOG_FROM
    _band(batch, edges, series.batch, INK, bottom=0.8 if logarithmic else 0.0)
    if logarithmic:
        batch.set_yscale("log", base=2)
        batch.yaxis.get_major_locator().set_params(numticks=12)
        batch.yaxis.set_major_formatter("{x:g}")
    batch.set_ylim(bottom=0.8 if logarithmic else 0.0)
    batch.set_ylabel("live batch B")
    _band(longest, edges, series.longest, DRAFTER_COLOURS[0])
    longest.set_ylim(0, float(np.nanmax(series.longest[2], initial=1.0)) * 1.1)
    longest.set_ylabel("longest K")
    longest.yaxis.get_major_locator().set_params(integer=True)
    idle = np.isnan(series.batch[1])
    acceptance.plot(middle, np.where(idle, np.nan, series.acceptance), color=COMBINED_COLOURS[0], lw=1.4)
    acceptance.set(ylim=(0, 1.03), ylabel="acceptance")
    throughput.stairs(series.throughput, edges, fill=True, color="#2f8f5b", alpha=0.18, lw=0)
    throughput.plot(middle, series.throughput, color="#2f8f5b", lw=1.4)
    throughput.set_ylim(bottom=0)
    throughput.yaxis.set_major_formatter("{x:,.6g}")
    throughput.set(ylabel="tokens/s", xlabel="seconds", xlim=(edges[0], edges[-1]))
    _mark(labels, list(panels[1:]), trace, edges)

    for axis in panels:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(colors=MUTED, labelsize=9, length=3)
        axis.yaxis.label.set(color=INK, size=10)
        axis.xaxis.label.set(color=INK, size=10)
    for axis in panels[2:]:
        axis.grid(axis="y", color=GRID, lw=0.8)
        axis.set_axisbelow(True)
    strip.set_ylabel("mode", rotation=0, ha="right", va="center")
    figure.align_ylabels(panels)
    figure.suptitle(
        _headline(trace, summary), x=0.012, ha="left", size=13, weight="bold", color=INK, linespacing=1.5
    )
    figure.legend(
        *strip.get_legend_handles_labels(), loc="outside upper right", ncols=8, frameon=False, fontsize=9.5
    )
    notes = f"Acceptance and tokens/s are over {series.window:.2g} s."
    if len(trace.steps) > COLUMNS:
        notes += f" {len(trace.steps):,} passes in {COLUMNS:,} columns: lines are means, shades reach the extremes."
    text = f"{fill(summary.saved.text, NOTE_LENGTH)}\n{notes}"
    figure.supxlabel(text, x=0.012, ha="left", size=9.5, color=MUTED, linespacing=1.5)


def _band(axis: Axes, edges: np.ndarray, extremes: _Extremes, colour: str, bottom: float = 0.0) -> None:
    least, mean, largest = extremes
    axis.stairs(largest, edges, baseline=np.fmin(least, mean), fill=True, color=colour, alpha=0.3, lw=0)
    axis.stairs(mean, edges, baseline=bottom, fill=True, color=colour, alpha=0.1, lw=0)
    axis.stairs(mean, edges, baseline=None, color=colour, lw=1.4)


def _mark(labels: Axes, panels: Sequence[Axes], trace: Trace, edges: np.ndarray) -> None:
    """Events as lines through all panels, switches as ticks, and as many of their texts as find room."""
    labels.set(ylim=(-0.6, LABEL_ROWS), yticks=[])
    labels.tick_params(bottom=False)
    labels.spines[:].set_visible(False)
    turns = [(s.time, f"{s.after}: {s.reason}") for s in switches(trace.steps)]
    for when in _columns_of((when for when, _ in trace.events), edges):
        for axis in panels:
            axis.axvline(when, color=EVENT, lw=0.9, ls=(0, (4, 3)), alpha=0.75)
    for when in _columns_of((when for when, _ in turns), edges):
        labels.plot([when, when], [-0.6, -0.2], color=INK, lw=0.9)

    span = edges[-1] - edges[0]
    taken: list[tuple[int, float, float]] = []  # (row, from, to) as shares of the axis
    left_out = 0
    for (when, text), colour in [(e, EVENT) for e in trace.events] + [(t, INK) for t in turns]:
        text = " ".join(text.split())
        text = text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 1]}…"
        width = LABEL_WIDTH * (len(text) + 2)
        begin = max(min((when - edges[0]) / span, 1 - width), 0.0)
        blocked = {row for row, low, high in taken if low < begin + width and begin < high}
        row = min(set(range(LABEL_ROWS)) - blocked, default=None)
        if row is None:
            left_out += 1
            continue
        taken.append((row, begin, begin + width))
        height = LABEL_ROWS - row - 0.5
        labels.plot([when, when], [-0.2, height - 0.35], color=colour, lw=0.6, alpha=0.5)
        labels.text(edges[0] + begin * span, height, text, size=8.5, color=colour, va="center")
    if left_out:
        labels.set_title(f"{left_out:,} more have no room for a label", loc="right", size=8.5, color=MUTED)


def _columns_of(times: Iterable[float], edges: np.ndarray) -> list[float]:
    """One time for every column that holds any: more lines than pixels show nothing more."""
    width = edges[1] - edges[0]
    return list({int((when - edges[0]) / width): when for when in times}.values())


def _colours(modes: Iterable[str]) -> dict[str, str]:
    """Modes in the order they are stacked, with their colours."""
    drafters, combined = iter(DRAFTER_COLOURS * 9), iter(COMBINED_COLOURS * 9)
    fixed = {HISTORY: HISTORY_COLOUR, PLAIN: PLAIN_COLOUR}
    order = sorted(
        modes, key=lambda mode: (mode == PLAIN, mode == HISTORY, mode.startswith(f"{HISTORY}+"), mode)
    )
    return {
        mode: fixed[mode] if mode in fixed else next(combined if mode.startswith(f"{HISTORY}+") else drafters)
        for mode in order
    }


def _headline(trace: Trace, summary: Summary) -> str:
    model = trace.about.get("model")
    figures = f"{summary.tokens:,} tokens in {seconds_text(summary.makespan)} s, {summary.tokens_per_second:,.0f} tokens/s"
    return f"{model}: {figures}" if model else figures


def figures(summary: Summary) -> dict[str, str]:
    """The summary for a reader: labels and formatted values."""
    seconds = sum(summary.seconds_by_mode.values()) or 1.0
    none = "–"
    return {
        "makespan": f"{summary.makespan:.3f} s",
        "tokens": f"{summary.tokens:,} in {summary.passes:,} passes",
        "tokens per second": f"{summary.tokens_per_second:,.0f}",
        "finished samples": f"{summary.requests:,}",
        "acceptance": none if summary.acceptance is None else f"{summary.acceptance:.1%}",
        "tokens per verification (tau)": none if summary.tau is None else f"{summary.tau:.2f}",
        "time by mode": ", ".join(
            f"{mode} {time / seconds:.0%}" for mode, time in summary.seconds_by_mode.items()
        ),
        "switches": ", ".join(f"{reason} {times:,}" for reason, times in summary.switches.items()) or "none",
    }


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#22272e;background:#fff;max-width:1180px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem;margin:0 0 .3rem}h2{font-size:1.05rem;margin:2rem 0 .5rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:.8rem 1.5rem;margin:1.2rem 0}
dt{color:#6b7480;font-size:.85rem}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.saved{border-left:4px solid #3572c6;background:#f3f6fa;padding:.7rem 1rem;margin:1rem 0}
img{width:100%;height:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th{text-align:left;color:#6b7480;font-weight:600}th,td{padding:.3rem .8rem .3rem 0;border-bottom:1px solid #e3e7ec}
.n{text-align:right;font-variant-numeric:tabular-nums}
"""


def _page(trace: Trace, summary: Summary, picture: str) -> str:
    cards = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in figures(summary).items()
    )
    longest = sorted(trace.requests, key=lambda request: -request.output_tokens)[:LONGEST_REQUESTS]
    requests = [
        (
            r.request,
            f"{r.prompt_tokens:,}",
            f"{r.output_tokens:,}",
            f"{r.started:.3f}",
            f"{r.finished:.3f}",
            f"{r.output_tokens / (r.finished - r.started):,.1f}" if r.finished > r.started else "–",
            f"{r.accepted / r.drafted:.1%}" if r.drafted else "–",
        )
        for r in longest
    ]
    turns = [(f"{s.time:.3f}", s.before, s.after, s.reason) for s in switches(trace.steps)[:FIRST_SWITCHES]]
    switched = sum(summary.switches.values())
    about = [(str(key), str(value)) for key, value in trace.about.items()]
    events = [(f"{when:.3f}", text) for when, text in trace.events]
    tables = [
        _table(f"The {len(requests)} longest of {len(trace.requests):,} finished samples", requests,
               "sample", "#prompt tokens", "#output tokens", "#from, s", "#to, s", "#tokens/s", "#acceptance"),
        _table(f"The first {len(turns)} of {switched:,} switches", turns, "#at, s", "from", "to", "because"),
        _table("Events", events, "#at, s", "what"),
        _table("About", about, "", ""),
    ]  # fmt: skip
    title = escape(_headline(trace, summary))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
        f'<p class="saved">{escape(summary.saved.text)}</p>\n<dl>{cards}</dl>\n'
        f'<img alt="Timeline of the rollout: mode, live batch, longest K, acceptance, tokens per second" '
        f'src="data:image/png;base64,{picture}">\n{"".join(tables)}</body></html>\n'
    )


def _table(title: str, rows: Sequence[Sequence[str]], *columns: str) -> str:
    """A table, or nothing without rows; columns named with a leading # are numbers."""
    if not rows:
        return ""
    kinds = [' class="n"' if name.startswith("#") else "" for name in columns]
    head = "".join(f"<th{kind}>{escape(name.lstrip('#'))}</th>" for kind, name in zip(kinds, columns))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row)) + "</tr>\n"
        for row in rows
    )
    return f"<h2>{escape(title)}</h2>\n<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n"
