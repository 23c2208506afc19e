"""Figures of the report: matplotlib, drawn without a display, as SVG that takes its colours from the page's style.

A figure never holds a string that came from a file or a peer, only numbers and peer names: captions are HTML.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Stand-ins that matplotlib draws with -> the page's own colours, which differ in the light, in the dark and on paper.
INK, GRID, MUTED = "#010101", "#020202", "#030303"
ALONE, LOCAL, OWN, FUSED, AGAIN = "#040404", "#050505", "#0c0c0c", "#060606", "#0b0b0b"
PHASES = {"agree": "#070707", "train": "#080808", "collect": "#090909", "fuse": "#0a0a0a"}
_COLOURS = {
    **{INK: "--ink", GRID: "--grid", MUTED: "--muted", ALONE: "--alone", LOCAL: "--local"},
    **{OWN: "--own", FUSED: "--fused", AGAIN: "--recalibrated"},
    **{colour: f"--phase-{name}" for name, colour in PHASES.items()},
}
PANEL_IN = (3.5, 2.7)
SQUARE_IN = (2.9, 2.7)  # where both axes go from 0 to 1
MARKED_MAX = 60  # rounds: with more, marks run into each other
WIDE_IN = 10.4
STYLES: dict[str, tuple[str, float, Any]] = {  # of the models: colour, width, dashes
    "alone": (ALONE, 1.4, "-"),
    "local": (LOCAL, 1.2, (0, (2, 1.5))),
    "own": (OWN, 2.0, "-"),
    "fused": (FUSED, 2.0, "-"),
    "recalibrated": (AGAIN, 2.0, "-"),
}
LABELS_MAX = 24  # of rounds in the timeline
ROW_IN = 0.42  # of a hospital in the timeline

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One phase of one hospital in the timeline; seconds since the run began."""

    row: int
    phase: str
    start_s: float
    seconds: float


def auc_panel(
    name: str,
    local: Mapping[int, float],
    fused: Mapping[int, float],
    again: Mapping[int, float],
    rounds: int,
    low: float,
) -> str:
    """Validation AUC of one hospital per round: its own checkpoint, the fused model, and that recalibrated (`again`).
    `rounds`: that were trained; `low`: foot of the scale."""
    figure, axes = _figure(PANEL_IN)
    marker = "o" if rounds <= MARKED_MAX else ""
    for values, colour, face in ((local, LOCAL, "none"), (fused, FUSED, FUSED), (again, AGAIN, AGAIN)):
        known = sorted(values.items())
        axes.plot(
            [r for r, _ in known], [a for _, a in known], color=colour, marker=marker, markersize=4.5,
            markerfacecolor=face, linewidth=1.6, clip_on=False,
        )  # fmt: skip
    axes.set_xlim(0.7, max(rounds, 2) + 0.3)
    axes.set_ylim(low, 1.0)
    step = max(1, -(-rounds // 8))
    axes.set_xticks(range(1, rounds + 1, step))
    axes.set_xlabel("round")
    axes.set_ylabel("validation AUC")
    return _svg(figure, f"auc-{name}", f"Validation AUC per round at {name}")


def roc_panel(name: str, curves: Mapping[str, Sequence[Points]]) -> str:
    """ROC of one hospital's test set: kind of model -> its curves (one, or one per class)."""
    figure, axes = _figure(SQUARE_IN)
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1, linestyle=(0, (4, 3)))
    for kind, (colour, width, dashes) in STYLES.items():
        for curve in curves.get(kind, ()):
            axes.plot([x for x, _ in curve], [y for _, y in curve], color=colour, linewidth=width, linestyle=dashes)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.005)
    axes.set_aspect("equal")
    axes.set_xlabel("1 − specificity")
    axes.set_ylabel("sensitivity")
    return _svg(figure, f"roc-{name}", f"ROC curves on the test set of {name}")


def calibration_panel(name: str, bins: Mapping[str, Sequence[tuple[float, float, int]]]) -> str:
    """Of what a model calls so probable, how many are: kind of model -> (mean probability, share, images) per bin."""
    figure, axes = _figure(SQUARE_IN)
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1, linestyle=(0, (4, 3)))
    for kind, (colour, width, dashes) in STYLES.items():
        found = bins.get(kind, ())
        axes.plot(
            [p for p, _, _ in found], [share for _, share, _ in found], color=colour, linewidth=width,
            linestyle=dashes, marker="o", markersize=3.5, clip_on=False,
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.005)
    axes.set_aspect("equal")
    axes.set_xlabel("probability that the model gives")
    axes.set_ylabel("share that is positive")
    return _svg(figure, f"calibration-{name}", f"Calibration on the test set of {name}")


def timeline(
    names: Sequence[str], bars: Sequence[Bar], round_starts: Sequence[tuple[int, float]], since: str = ""
) -> str:
    """What every hospital did when: one row each, a bar per phase, a thin line where a round begins."""
    figure, axes = _figure((WIDE_IN, 0.75 + ROW_IN * len(names)))
    end_s = max((b.start_s + b.seconds for b in bars), default=1.0)
    scale, unit = (3600.0, "hours") if end_s > 3 * 3600 else (60.0, "minutes") if end_s > 300 else (1.0, "seconds")
    spans = defaultdict(list)
    for bar in bars:
        # The shortest phases (a fusion of a few milliseconds) stay visible.
        spans[bar.row, bar.phase].append((bar.start_s / scale, max(bar.seconds, end_s / 600) / scale))
    for (row, phase), found in spans.items():  # one thing to draw for each, not one for each bar
        axes.broken_barh(found, (row - 0.31, 0.62), facecolors=PHASES[phase])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, end_s / scale)
    axes.set_xlabel(f"{unit} since {since or 'the first daemon'} began; above, the rounds")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for round, at in round_starts[:: -(-len(round_starts) // LABELS_MAX) or 1]:
        axes.axvline(at / scale, color=INK, linewidth=0.6, alpha=0.5)
        axes.text(at / scale, -0.56, f" {round}", color=MUTED, fontsize=8, va="bottom", ha="left")
    return _svg(figure, "timeline", "Timeline of the rounds: phases of every hospital")


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=8, length=3)
    axes.xaxis.label.set(color=MUTED, fontsize=8.5)
    axes.yaxis.label.set(color=MUTED, fontsize=8.5)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, name: str, label: str) -> str:
    """The figure as an <svg> element for a page: no size, no colour and no name of its own."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.S)  # it would reach the whole page
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows; and no address of any kind stays in the file
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's own font
    svg = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
    for stand_in, variable in _COLOURS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return _private_ids(svg, name)


def _private_ids(svg: str, name: str) -> str:
    """Many figures share a page: ids that nothing refers to go, the others get the figure's name."""
    reference = r"(url\(#|href=\"#)([\w.-]+)"
    used = {found[1] for found in re.findall(reference, svg)}
    svg = re.sub(r'\sid="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(reference, lambda m: f"{m[1]}{name}-{m[2]}", svg)
