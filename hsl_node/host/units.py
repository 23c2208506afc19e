"""Numbers as people read them: bytes, durations, times of day, scores, aligned columns."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Sequence

from hsl_node.errors import escaped

CELL_MAX = 500  # characters; an address has 253


def size(count: float) -> str:
    """Bytes in decimal units, three digits or so: 94.7 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def progress(done: float, total: float) -> str:
    """`45.2/94.7 MB`, both in the unit of the total."""
    of = size(total)
    number, unit = of.split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    return f"{done / scale:.{len(number.partition('.')[2])}f}/{of}"


def duration(seconds: float) -> str:
    """Two units at most: 42 s, 14 min, 2 h 03 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 2 * 3600:
        return f"{whole // 60} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def age(seconds: float) -> str:
    """One unit, for a narrow column: 119 s, 47 h."""
    whole = max(0, round(seconds))
    for unit, of in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= 2 * of:
            return f"{whole // of} {unit}"
    return f"{whole} s"


def clock(at: float, now: float) -> str:
    """Local wall time; with the date when it is not of the last twenty hours."""
    return time.strftime("%H:%M:%S" if abs(now - at) < 20 * 3600 else "%Y-%m-%d %H:%M", time.localtime(at))


def figure(value: float | None, none: str = "-") -> str:
    """A score. None: undefined, or not known yet."""
    return none if value is None else f"{value:.3f}"


def digits(value: float | None) -> str:
    """Four digits, wherever the point is. None: not known."""
    return "-" if value is None else f"{value:.4g}"


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    """Bytes of a file name that are no UTF-8 stand there as in every output: `M\\udcfcller.png`.

    A cell that a spreadsheet would run as a formula gets an apostrophe, which shows it as text.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_defused(str(cell)) for cell in row] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")


def _defused(cell: str) -> str:
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Aligned columns for a terminal or a pipe; the columns in `right` end flush. What a cell holds is escaped."""
    header, *rows = [[escaped(cell, CELL_MAX) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            f"{cell:>{w}}" if i in right else f"{cell:{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    )
