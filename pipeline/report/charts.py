"""Pictures of measurements: small, light, legible, and told apart by more than colour."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.report.document import Figure
from pipeline.report.made import Made

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's palette: distinct also for the colour-blind.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")
INK, FAINT = "#334155", "#e2e8f0"
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
POINTS = 240  # of a curve; more do not show
PANEL = (3.3, 2.35)  # inches

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "chatmill",  # the same picture for the same numbers
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


Points = list[tuple[float, float]]  # step and value


@dataclass(frozen=True)
class Panel:
    """Which measurements make one picture. NAME* stands for all that begin so. zero: the axis starts there."""

    title: str
    names: tuple[str, ...]
    zero: bool = False


TRAINING = (
    Panel("Training loss (nats a token)", ("loss",)),
    Panel("Validation bits per byte", ("val_bpb",)),
    Panel("Tokens per second", ("tok_s",), zero=True),
)
PRACTICE = (
    Panel("Reward", ("reward", "pass@*"), zero=True),
    Panel("Held-out accuracy and its 95% interval", ("eval/*",), zero=True),
    Panel("Answer length (tokens)", ("response_tokens",), zero=True),
    Panel("Groups with signal", ("signal",), zero=True),
    Panel("Entropy (nats a token)", ("entropy",), zero=True),
    Panel("Divergence from the start (nats)", ("kl",), zero=True),
)


def curves(made: Made) -> Figure | None:
    """What a training stage logged, over its steps; None when it logged nothing to draw."""
    panels = []
    for panel in PRACTICE if made.module == "rl" else TRAINING:
        series = {name: _series(made.lines, name) for name in _names(made.lines, panel.names)}
        drawn = {name: points for name, points in series.items() if len(points) > 1}
        if drawn:
            panels.append((panel, drawn))
    if not panels:
        return None
    with _canvas(len(panels)) as (canvas, axes):
        for axis, (panel, drawn) in zip(axes, panels):
            _draw_panel(axis, panel, drawn, {name: _interval(made.lines, name) for name in drawn})
        svg = _svg(canvas)
    return Figure(f"curves-{made.stage}", svg, f"{made.stage}, by step")


def _names(lines: Sequence[dict[str, Any]], wanted: Sequence[str]) -> list[str]:
    """The measured names that the wanted ones stand for; what equals another (pass@1 is often the reward) once."""
    measured = dict.fromkeys(name for line in lines for name in line)
    found = []
    for pattern in wanted:
        found += [n for n in measured if n == pattern or (pattern.endswith("*") and n.startswith(pattern[:-1]))]
    return [n for n in found if n == "reward" or _series(lines, n) != _series(lines, "reward")]


def _series(lines: Sequence[dict[str, Any]], name: str) -> Points:
    values = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    return [(float(step), float(value)) for step, value in values if abs(value) < float("inf")]


def _interval(lines: Sequence[dict[str, Any]], name: str) -> tuple[Points, Points]:
    """Lower and upper ends beside a held-out accuracy; empty for all else."""
    low, high = (_series(lines, name.replace("eval/", f"eval_{end}/", 1)) for end in ("low", "high"))
    return (low, high) if name.startswith("eval/") else ([], [])


def _draw_panel(
    axis: "Axes", panel: Panel, drawn: dict[str, Points], intervals: dict[str, tuple[Points, Points]]
) -> None:
    for i, (name, points) in enumerate(drawn.items()):
        steps, low, mean, high = _thinned(points)
        marker = MARKERS[i % len(MARKERS)] if len(steps) <= 25 else None
        color = COLORS[i % len(COLORS)]
        if low != high:
            axis.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        if ends := intervals[name][0]:
            (at, lowest, *_), (*_, highest) = _thinned(ends), _thinned(intervals[name][1])
            axis.fill_between(at, lowest, highest, color=color, alpha=0.12, linewidth=0)
        axis.plot(steps, mean, color=color, linewidth=1.5, marker=marker, markersize=3.5, label=_label(name))
    axis.set_title(panel.title)
    axis.set_xlabel("step")
    axis.margins(x=0.02)
    if panel.zero:
        room = 1.3 if len(drawn) > 1 else 1.06  # for the legend
        axis.set_ylim(0, room * max(value for points in drawn.values() for _, value in points) or 1.0)
    elif panel.names == ("loss",):
        _cut_off_start(axis, drawn["loss"])
    axis.yaxis.set_major_formatter(_short)
    axis.xaxis.set_major_formatter(_short)
    axis.locator_params(nbins=5)
    if len(drawn) > 1:
        axis.legend(loc="upper left", ncols=2, handlelength=1.4, columnspacing=1.0, borderaxespad=0.2)


def _label(name: str) -> str:
    return name.removeprefix("eval/")


def _cut_off_start(axis: "Axes", points: Points) -> None:
    """The first steps fall so far that the rest would look flat: show the range of the last 95%."""
    values = sorted(value for _, value in points[len(points) // 20 :])
    spread = values[-1] - values[0]
    if spread > 0:
        axis.set_ylim(values[0] - 0.06 * spread, values[-1] + 0.06 * spread)


def _thinned(points: Points) -> tuple[list[float], list[float], list[float], list[float]]:
    """(steps, lowest, mean, highest) of at most POINTS groups of neighbours."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    steps = [group[-1][0] for group in groups]
    values = [[value for _, value in group] for group in groups]
    return steps, [min(v) for v in values], [sum(v) / len(v) for v in values], [max(v) for v in values]


def accuracies(evaluations: Sequence[Made]) -> Figure | None:
    """Each task's accuracy by stage, with intervals; None without tasks."""
    stages = [made.short for made in evaluations if made.results.get("chat")]
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for made in evaluations:
        for name, result in (made.results.get("chat") or {}).items():
            if "accuracy" in result:
                tasks.setdefault(name, {})[made.short] = result
    if not tasks:
        return None
    with _canvas(1, (8.6, 0.75 + 0.42 * len(tasks))) as (canvas, axes):
        _draw_accuracies(axes[0], tasks, stages)
        svg = _svg(canvas)
    return Figure("accuracies", svg, "Accuracy by task and stage with 95% intervals; a grey line marks guessing")


def _draw_accuracies(axis: "Axes", tasks: dict[str, dict[str, dict[str, Any]]], stages: list[str]) -> None:
    for i, stage in enumerate(stages):
        shift = 0.16 * (i - (len(stages) - 1) / 2)
        there = [(place, by[stage]) for place, by in enumerate(tasks.values()) if stage in by]
        at = [100 * r["accuracy"] for _, r in there]
        below = [a - 100 * r["ci"][0] for a, (_, r) in zip(at, there)]
        above = [100 * r["ci"][1] - a for a, (_, r) in zip(at, there)]
        bars = [[max(0.0, b) for b in below], [max(0.0, a) for a in above]]
        places = [place + shift for place, _ in there]
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        axis.errorbar(at, places, xerr=bars, fmt=marker, color=color, markersize=5, elinewidth=1.3, label=stage)
    for place, by in enumerate(tasks.values()):
        baseline = next(iter(by.values())).get("baseline") or 0.0
        if baseline:
            axis.plot([100 * baseline] * 2, [place - 0.35, place + 0.35], color="#94a3b8", linewidth=2)
    axis.set_yticks(range(len(tasks)), list(tasks))
    axis.invert_yaxis()
    axis.set_xlim(-2, 102)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _short(value: float, _: float | None = None) -> str:
    """Tick labels: 12k rather than 12000."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


@contextmanager
def _canvas(panels: int, size: tuple[float, float] | None = None) -> "Iterator[tuple[Canvas, list[Axes]]]":
    """A drawing of `panels` side by side, at most three in a row, without touching global state."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    across = min(panels, 3)
    down = -(-panels // across)
    with rc_context(STYLE):  # type: ignore[arg-type]
        canvas = Canvas(figsize=size or (PANEL[0] * across, PANEL[1] * down), layout="constrained")
        yield canvas, [canvas.add_subplot(down, across, i + 1) for i in range(panels)]


def _svg(canvas: "Canvas") -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    FigureCanvasSVG(canvas).print_svg(out, metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"font-family: 'DejaVu Sans'[^;\"]*", f"font-family: {FONT}", drawn)
    return drawn.replace('style="fill: #ffffff"', 'style="fill: none"', 1)
