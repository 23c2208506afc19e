"""`hsl-node predict`: probabilities of each class for images, by the node's own model or one that was taken away."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from hsl_node.errors import DataError, NotInitialised
from hsl_node.federation.names import Round
from hsl_node.host.files import write_new
from hsl_node.host.units import as_csv
from hsl_node.results.asked import Asked
from hsl_node.results.export import own_predictor
from hsl_node.train.bundle import Card, positive
from hsl_node.train.data.sources import Item, first_few

if TYPE_CHECKING:
    from hsl_node.train.predictor import Predictor
    from hsl_node.train.progress import Progress, Report

Array = NDArray[Any]

NAMED = 20  # of the images that cannot be read; the output has them all
BATCH = 64  # images decoded and held at a time; as evaluation takes them, so the figures are the same


def predict(predictor: Predictor, asked: Asked, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Of each image its probabilities, in the order asked for; memory for one batch, however many there are.

        {"round", "sha256", "classes", "positive", "decision": {"threshold", "rule"} | None, "images":
            [{"image", "probabilities": {class: p} | None, "decision": class | None, "note": str}]}

    An image that cannot be read has no probabilities, and its reason as the note.

    Raises:
        DataError: none can be read; each with its name, since this goes to the operator's own terminal.
    """
    card = predictor.card
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], Any]] = []  # rows that still lack their probabilities, and their squares

    def run() -> None:
        if waiting:
            for (row, _), chances in zip(waiting, predictor([square for _, square in waiting]), strict=True):
                row["probabilities"] = dict(zip(card.classes, chances.tolist(), strict=True))
                row["decision"] = decided(row["probabilities"], card)
            waiting.clear()

    for number, (square, note) in enumerate(_decoded(predictor, asked)):
        row = {"image": str(asked.files[number]), "probabilities": None, "decision": None, "note": note}
        rows.append(row)
        if square is not None:
            waiting.append((row, square))
        if len(waiting) == BATCH:
            run()
        progress(number + 1, len(asked.files))
    run()
    if all(row["probabilities"] is None for row in rows):
        raise unreadable_error(rows)
    return {
        "round": card.round,
        "sha256": card.source_weights_sha256,
        "classes": list(card.classes),
        "positive": positive(card.classes),
        "decision": card.decision and card.decision.model_dump(),
        "preprocessing": card.preprocessing.words(),
        "images": rows,
    }


def unreadable_error(rows: list[dict[str, Any]]) -> DataError:
    """Of the images that have no probabilities."""
    bad = [f"{row['image']}: {row['note']}" for row in rows if row["probabilities"] is None]
    none = len(bad) == len(rows)
    return DataError(
        "\n".join([f"{len(bad)} of {len(rows)} images cannot be read", *first_few(bad, NAMED)]),
        remedy="mend or leave out these files; " + ("nothing was" if none else "all others were") + " predicted",
    )


def csv_text(found: Mapping[str, Any]) -> str:
    """The image, a column of probabilities per class, the decision (where a threshold is known), a note, the model."""
    decides = ["decision"] if found["decision"] else []
    rows: list[tuple[str, ...]] = [("image", *found["classes"], *decides, "note", "model_sha256")]
    for row in found["images"]:
        chances = row["probabilities"]
        cells = [f"{chances[c]:.6f}" if chances else "" for c in found["classes"]]
        decision = [row["decision"] or ""] if decides else []
        rows.append((row["image"], *cells, *decision, row["note"], found["sha256"]))
    return as_csv(rows)


def json_text(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def write_out(text: str, out: Path | None) -> None:
    """To a file of this user's alone, since names of images are often names of patients; or to the terminal."""
    if out is None:
        print(text, end="")
    else:
        write_new(out, text, mode=0o600, replace=True)


def open_predictor(
    state: Path, model: Path | None, round: Round | None, report: Report = lambda event: None
) -> Predictor:
    """The one in the folder `model`, which needs no state directory; or this node's own."""
    if model is not None:
        from hsl_node.train.predictor import of_bundle

        return of_bundle(model)
    try:
        return own_predictor(state, round, report)
    except NotInitialised as exc:
        raise NotInitialised(exc.message, remedy=f"for an exported model: --model FOLDER. {exc.remedy}") from exc


def decided(chances: Mapping[str, float], card: Card) -> str | None:
    two = positive(card.classes)
    if two is None or card.decision is None:
        return None
    return two if chances[two] >= card.decision.threshold else card.classes[0]


def _decoded(predictor: Predictor, asked: Asked) -> Iterator[tuple[Array | None, str]]:
    """Of each image its square, or None, and what there is to say of it. A batch is decoded at a time, on all cores."""
    from hsl_node.train.data.digests import in_parallel
    from hsl_node.train.data.images import count_frames, decode
    from hsl_node.train.data.pixels import UnreadableImage

    preprocessing = predictor.card.preprocessing

    def decoded(item: Item, _: Array | None) -> tuple[Array, str]:
        if not os.path.isfile(item.path):  # a pipe would be waited for
            raise UnreadableImage(_why_no_file(item.path))
        square, frames = decode(item.path, preprocessing), count_frames(item.path)
        taken = frames // 2 + 1 if preprocessing.frame == "middle" else 1
        return square, f"frame {taken} of {frames}" if frames > 1 else ""

    items = [Item("", "", path) for path in asked.files]
    for number, found in enumerate(in_parallel(decoded, items)):
        if isinstance(found, UnreadableImage):
            line = asked.lines.get(number)
            yield None, f"{found.message} ({line})" if line else found.message
        else:
            yield found


def _why_no_file(path: Path) -> str:
    if os.path.isdir(path):
        return "is a folder that cannot be listed"
    return "is no file" if os.path.lexists(path) else "no such file"
