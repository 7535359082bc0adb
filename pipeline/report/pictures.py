"""The pictures of a report: small, light, legible, and told apart by more than colour."""

import io
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.numbers import count, duration, plural
from pipeline.report.made import DATASET, DATASETS, EVALUATE, TRAINED, Made
from pipeline.report.render import render

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

# Okabe and Ito's palette: distinct also for the colour-blind.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
STYLE = Path(__file__).with_name("charts.mplstyle")
POINTS = 240  # of a curve; more do not show
PANEL = (3.3, 2.35)  # inches

# Panels of the curves of a stage: title, and patterns of the names of what is drawn together.
TRAINING = {
    "Training loss (nats per token)": ["loss"],
    "Validation bits per byte": ["val_bpb"],
    "Tokens per second": ["tok_s"],
}
REINFORCEMENT = {
    "Reward": ["reward", "pass@*"],
    "Held-out accuracy with 95% interval": ["eval/*"],
    "Answer length (tokens)": ["response_tokens"],
    "Groups with signal": ["signal"],
    "Entropy (nats per token)": ["entropy"],
    "Divergence from the start (nats)": ["kl"],
}
LOSSES = ("loss", "val_bpb")  # their axes do not start at zero, which they never reach

Points = list[tuple[float, float]]  # step and value


class Picture(NamedTuple):
    """An SVG drawing; `name` is its file's."""

    name: str
    svg: str
    caption: str


def curves(made: Made) -> Picture | None:
    """What a training stage logged, over its steps; None when it logged nothing to draw."""
    lines = made.json_lines("metrics.jsonl")
    measured = {name: _series(lines, name) for name in dict.fromkeys(name for line in lines for name in line)}
    # What equals another is drawn once: pass@1 is often the reward.
    known = {n: points for n, points in measured.items() if n == "reward" or points != measured.get("reward")}
    panels = {}
    for title, patterns in (REINFORCEMENT if made.module == "rl" else TRAINING).items():
        names = [name for pattern in patterns for name in known if fnmatchcase(name, pattern)]
        if drawn := {name: known[name] for name in names if len(known[name]) > 1}:
            panels[title] = drawn

    def draw(axes: "list[Axes]") -> None:
        for axis, (title, drawn) in zip(axes, panels.items()):
            _draw_panel(axis, title, drawn, measured)

    return Picture(f"curves-{made.stage}", _svg(len(panels), draw), f"{made.stage}, by step") if panels else None


def _series(lines: Sequence[dict[str, Any]], name: str) -> Points:
    values = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    return [(float(step), float(value)) for step, value in values if abs(value) < float("inf")]


def _draw_panel(axis: "Axes", title: str, drawn: dict[str, Points], measured: dict[str, Points]) -> None:
    for i, (name, points) in enumerate(drawn.items()):
        steps, low, mean, high = _thinned(points)
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)] if len(steps) <= 25 else None
        if (low != high).any():
            axis.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        ends = [measured.get(name.replace("eval/", f"eval_{end}/", 1)) for end in ("low", "high")]
        if name.startswith("eval/") and all(ends):
            (at, lowest, _, _), (_, _, _, highest) = (_thinned(end) for end in ends if end)
            axis.fill_between(at, lowest, highest, color=color, alpha=0.12, linewidth=0)
        label = name.removeprefix("eval/")
        axis.plot(steps, mean, color=color, linewidth=1.5, marker=marker, markersize=3.5, label=label)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.margins(x=0.02)
    if drawn.keys().isdisjoint(LOSSES):
        room = 1.3 if len(drawn) > 1 else 1.06  # for the legend
        axis.set_ylim(0, room * max(value for points in drawn.values() for _, value in points) or 1.0)
    elif "loss" in drawn:  # the first steps fall so far that the rest would look flat: show the last 95%
        values = sorted(value for _, value in drawn["loss"][len(drawn["loss"]) // 20 :])
        if room := 0.06 * (values[-1] - values[0]):
            axis.set_ylim(values[0] - room, values[-1] + room)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(lambda value, _: count(value) if abs(value) >= 1000 else f"{value:g}")
    axis.locator_params(nbins=5)
    if len(drawn) > 1:
        axis.legend(loc="upper left", ncols=2, handlelength=1.4, columnspacing=1.0, borderaxespad=0.2)


def _thinned(points: Points) -> "np.ndarray":
    """(steps, lowest, mean, highest) of at most POINTS groups of neighbours."""
    import numpy as np

    groups = np.array_split(np.array(points), min(POINTS, len(points)))
    return np.array([(g[-1, 0], g[:, 1].min(), g[:, 1].mean(), g[:, 1].max()) for g in groups]).T


def accuracies(tested: Sequence[Made]) -> Picture | None:
    """Each task's accuracy by stage, with intervals; None without tasks."""
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for made in tested:
        for name, result in (made.results.get("chat") or {}).items():
            if "accuracy" in result:
                tasks.setdefault(name, {})[made.short] = result
    if not tasks:
        return None
    stages = [made.short for made in tested if made.results.get("chat")]
    svg = _svg(1, lambda axes: _draw_accuracies(axes[0], tasks, stages), (8.6, 0.75 + 0.42 * len(tasks)))
    return Picture("accuracies", svg, "Accuracy by task and stage with 95% intervals; a grey line marks guessing")


def _draw_accuracies(axis: "Axes", tasks: dict[str, dict[str, dict[str, Any]]], stages: list[str]) -> None:
    for i, stage in enumerate(stages):
        shift = 0.16 * (i - (len(stages) - 1) / 2)
        there = [(row + shift, by_stage[stage]) for row, by_stage in enumerate(tasks.values()) if stage in by_stage]
        at = [100 * result["accuracy"] for _, result in there]
        below = [max(0.0, x - 100 * result["ci"][0]) for x, (_, result) in zip(at, there)]
        above = [max(0.0, 100 * result["ci"][1] - x) for x, (_, result) in zip(at, there)]
        rows, color, marker = [row for row, _ in there], COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        axis.errorbar(at, rows, None, [below, above], marker, color=color, markersize=5, elinewidth=1.3, label=stage)
    for row, by_stage in enumerate(tasks.values()):
        if guessing := 100 * (next(iter(by_stage.values())).get("baseline") or 0.0):
            axis.plot([guessing] * 2, [row - 0.35, row + 0.35], color="#94a3b8", linewidth=2)
    axis.set_yticks(range(len(tasks)), list(tasks))
    axis.invert_yaxis()
    axis.set_xlim(-2, 102)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _svg(panels: int, draw: "Callable[[list[Axes]], None]", size: tuple[float, float] | None = None) -> str:
    """What `draw` draws in panels side by side, at most three in a row; no global state is touched."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    across = min(panels, 3)
    down = -(-panels // across)
    out = io.StringIO()
    with rc_context(fname=STYLE):
        figure = Figure(figsize=size or (PANEL[0] * across, PANEL[1] * down), layout="constrained")
        draw([figure.add_subplot(down, across, i + 1) for i in range(panels)])
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    return re.sub(r"font-family: 'DejaVu Sans'[^;\"]*", f"font-family: {FONT}", drawn[drawn.index("<svg") :])


class Box(NamedTuple):
    """An artifact in the picture of the lineage. makers: the rows of what it was made from."""

    name: str
    detail: str
    kind: str = "data"
    makers: tuple[int, ...] = ()


def lineage(made: Sequence[Made]) -> Picture | None:
    """What was made from what; None when there is no line to draw.

    Each box is a row further down and a step further to the right than the one before, and makers come before readers:
    the line down from a box to its readers passes no other box.
    """
    datasets = {key for m in made for name, key in m.inputs.items() if name.startswith(DATASET)}
    boxes = [Box(DATASETS, plural(len(datasets), "artifact"))] if datasets else []
    rows = dict.fromkeys(datasets, 0)
    for m in (m for m in made if not m.stage.startswith(DATASET)):
        for name, key in m.inputs.items():
            if key not in rows:  # known by its key alone
                rows[key] = len(boxes)
                boxes.append(Box(name, key[:8]))
        kind = "model" if m.module in TRAINED else "evaluation" if m.stage.startswith(EVALUATE) else "data"
        makers = tuple(sorted({rows[key] for key in m.inputs.values()}))
        rows[m.key] = len(boxes)
        boxes.append(Box(m.stage, f"{m.key[:8]} · {duration(m.record['seconds'])}", kind, makers))
    last_reader = {maker: row for row, box in enumerate(boxes) for maker in box.makers}
    if not last_reader:
        return None
    caption = "What was made from what: the dots in a row mark what its artifact was made from"
    return Picture("lineage", render("lineage.svg", boxes=boxes, last_reader=last_reader), caption)
