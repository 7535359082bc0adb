"""What was made from what: the artifacts as a drawn graph, and as a list with their keys."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.report.document import Cell, Figure, Table
from pipeline.report.made import EVALUATE, TRAINED, Made
from pipeline.report.words import day, duration, plural

DATASET = "dataset/"
DATASETS = "data sets"  # drawn as one box: every mixture reads many of them
BOX, GAP = (148, 42), (26, 40)  # width and height in pixels, and the room between boxes
SWEEPS = 6  # over the layers, to untangle lines
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
FILL = {"data": "#f1f5f9", "model": "#ccece6", "evaluate": "#fef3c7"}


@dataclass
class Node:
    """A box of the drawing; one without a name is a bend of a line that passes a layer."""

    name: str
    detail: str = ""
    kind: str = "data"
    makers: set[str] = field(default_factory=set)
    layer: int = 0
    at: float = 0.0  # place within the layer


def lineage_figure(made: Sequence[Made]) -> Figure | None:
    """None when there is nothing to draw a line between."""
    nodes = _nodes(made)
    if not any(node.makers for node in nodes.values()):
        return None
    for node in nodes.values():
        node.makers = _without_implied(node.makers, nodes)
    layers = _layers(nodes)
    return Figure("lineage", _draw(nodes, layers), "What was made from what; lines that others imply are left out")


def lineage_table(made: Sequence[Made]) -> Table:
    """Every artifact by name, with its key and when it was made, and what was only read, with its key."""
    rows: list[list[Cell | str]] = []
    for m in made:
        record = m.record
        git = str(record.get("git") or "")[:10] + ("+" if record.get("dirty_diff") else "")
        rows.append([m.stage, f"{m.module}/{m.key}", day(record.get("finished")), git or "-"])
    known = {m.key for m in made}
    read = {key: name for m in made for name, key in m.inputs.items() if key not in known}
    rows += [[name, key, "", ""] for key, name in sorted(read.items(), key=lambda item: item[1])]
    changed = any(m.record.get("dirty_diff") for m in made)
    notes = ["A + after a commit: made with changes that were not committed."] if changed else []
    return Table(["artifact", "key", "made", "commit"], rows, left=3, notes=notes)


def _nodes(made: Sequence[Made]) -> dict[str, Node]:
    """Boxes by key; data sets share one."""
    nodes: dict[str, Node] = {}
    datasets = {k for m in made for n, k in m.inputs.items() if n.startswith(DATASET)}
    for m in made:
        for name, key in m.inputs.items():
            if not name.startswith(DATASET):
                nodes.setdefault(key, Node(name, key[:8]))
    if datasets:
        nodes[DATASETS] = Node(DATASETS, plural(len(datasets), "artifact"))
    for m in (m for m in made if not m.stage.startswith(DATASET)):
        kind = "evaluate" if m.stage.startswith(EVALUATE) else "data"
        kind = "model" if m.module in TRAINED else kind
        makers = {DATASETS if n.startswith(DATASET) else k for n, k in m.inputs.items()}
        nodes[m.key] = Node(m.stage, f"{m.key[:8]} · {duration(m.seconds)}", kind, makers)
    return nodes


def _without_implied(makers: set[str], nodes: dict[str, Node]) -> set[str]:
    """Makers that are not behind another of them (transitive reduction)."""
    behind: set[str] = set()
    waiting = [key for maker in makers for key in nodes[maker].makers]
    while waiting:
        key = waiting.pop()
        if key not in behind:
            behind.add(key)
            waiting += nodes[key].makers
    return makers - behind


def _layers(nodes: dict[str, Node]) -> list[list[Node]]:
    """Boxes from top to bottom, each below its makers, with bends where a line passes; sorted to cross little."""

    def depth(key: str) -> int:
        return 1 + max((depth(maker) for maker in nodes[key].makers), default=-1)

    for key, node in nodes.items():
        node.layer = depth(key)
    for node in nodes.values():  # what only others start from moves down to them
        readers = [reader.layer for reader in nodes.values() if any(nodes[m] is node for m in reader.makers)]
        if not node.makers and readers:
            node.layer = min(readers) - 1
    for key, node in list(nodes.items()):
        for maker in sorted(node.makers):
            _add_bends(nodes, key, maker)
    layers: list[list[Node]] = [[] for _ in range(1 + max(node.layer for node in nodes.values()))]
    for node in nodes.values():
        layers[node.layer].append(node)
    _place(layers, nodes)
    return layers


def _add_bends(nodes: dict[str, Node], key: str, maker: str) -> None:
    node, above = nodes[key], maker
    for layer in range(nodes[maker].layer + 1, node.layer):
        bend = f"{maker}>{key}@{layer}"
        nodes[bend] = Node("", makers={above}, layer=layer)
        above = bend
    node.makers = (node.makers - {maker}) | {above}


def _place(layers: list[list[Node]], nodes: dict[str, Node]) -> None:
    """Order each layer by the mean place of its neighbours, down and up some times (Sugiyama's barycentres)."""
    above = {id(node): [nodes[m] for m in sorted(node.makers)] for node in nodes.values()}
    below: dict[int, list[Node]] = {id(node): [] for node in nodes.values()}
    for node in nodes.values():
        for maker in above[id(node)]:
            below[id(maker)].append(node)
    for layer in layers:
        _spread(layer)
    for sweep in range(SWEEPS):
        neighbours = above if sweep % 2 == 0 else below
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            for node in layer:
                near = neighbours[id(node)]
                node.at = sum(n.at for n in near) / len(near) if near else node.at
            layer.sort(key=lambda node: node.at)
            _spread(layer)


def _spread(layer: list[Node]) -> None:
    """Places one apart, centred on 0."""
    for i, node in enumerate(layer):
        node.at = i - (len(layer) - 1) / 2


def _draw(nodes: dict[str, Node], layers: list[list[Node]]) -> str:
    width = max(len(layer) for layer in layers) * (BOX[0] + GAP[0]) + GAP[0]
    height = len(layers) * (BOX[1] + GAP[1]) - GAP[1] + 4

    def centre(node: Node) -> tuple[float, float]:
        return width / 2 + node.at * (BOX[0] + GAP[0]), node.layer * (BOX[1] + GAP[1]) + BOX[1] / 2 + 2

    lines = [_line(centre(nodes[maker]), centre(node)) for node in nodes.values() for maker in sorted(node.makers)]
    lines += [_bend(centre(node)) for node in nodes.values() if not node.name]
    boxes = [_box(node, *centre(node)) for node in nodes.values() if node.name]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="{FONT}">' + "".join(lines + boxes) + "</svg>"
    )


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = (start[0], start[1] + BOX[1] / 2), (end[0], end[1] - BOX[1] / 2)
    middle = (y1 + y2) / 2
    path = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}"
    return f'<path d="{path}" fill="none" stroke="#94a3b8" stroke-width="1.4"/>'


def _bend(centre: tuple[float, float]) -> str:
    x, y = centre
    top, bottom = y - BOX[1] / 2, y + BOX[1] / 2
    return f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="#94a3b8" stroke-width="1.4"/>'


def _box(node: Node, x: float, y: float) -> str:
    w, h = BOX
    return (
        f'<rect x="{x - w / 2:.1f}" y="{y - h / 2:.1f}" width="{w}" height="{h}" rx="8" fill="{FILL[node.kind]}" '
        f'stroke="#cbd5e1"/>'
        f'<text x="{x:.1f}" y="{y - 3:.1f}" text-anchor="middle" font-size="13" font-weight="600" fill="#0f172a">'
        f"{html.escape(node.name)}</text>"
        f'<text x="{x:.1f}" y="{y + 13:.1f}" text-anchor="middle" font-size="11" fill="#64748b">'
        f"{html.escape(node.detail)}</text>"
    )
