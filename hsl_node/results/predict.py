"""`hsl-node predict` and `export`: probabilities for images, a model to take away and a card that says what it is."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsl_node.errors import DataError
from hsl_node.federation.config import load_federation
from hsl_node.federation.names import Round
from hsl_node.federation.node_toml import load_node
from hsl_node.host.files import write_new
from hsl_node.host.layout import Layout
from hsl_node.results.evaluate import find_evaluation
from hsl_node.results.models import find_model
from hsl_node.sync.store.journal import Journal


def predict(state: Path, images: Sequence[Path], *, round: Round | None = None) -> dict[str, Any]:
    """Probabilities of each class: `{"round", "sha256", "classes", "images": [{"image", "probabilities"}]}`.

    Raises:
        DataError: images that cannot be read, each with its name: this goes to the operator's own terminal.
    """
    import numpy as np

    from hsl_node.train import scoring
    from hsl_node.train.data.cache import as_colour
    from hsl_node.train.data.dataset import window_of
    from hsl_node.train.data.images import decode
    from hsl_node.train.data.pixels import UnreadableImage
    from hsl_node.train.data.preprocessing import Preprocessing
    from hsl_node.train.site import open_anchor, open_hardware

    plan = load_federation(state).plan
    preprocessing = Preprocessing.of(plan, window_of(load_node(state).data))
    model = find_model(state, round)
    pixels, unreadable = [], []
    for path in images:
        try:
            pixels.append(as_colour(decode(path, preprocessing)))
        except UnreadableImage as exc:
            unreadable.append(f"{path}: {exc.message}")
    if unreadable:
        raise DataError("\n".join(unreadable), remedy="mend or leave out these files; nothing was predicted")
    hardware, anchor = open_hardware(state, plan), open_anchor(state)
    weights = Layout(state).fused(model.round)
    found = scoring.predict(weights, np.stack(pixels), plan, hardware, anchor=anchor)
    rows = np.stack([1 - found, found], axis=1) if found.ndim == 1 else found
    return {
        "round": model.round,
        "sha256": model.sha256,
        "classes": list(plan.classes),
        "images": [
            {"image": str(path), "probabilities": dict(zip(plan.classes, row.tolist(), strict=True))}
            for path, row in zip(images, rows, strict=True)
        ],
    }


def write_csv(found: Mapping[str, Any], out: Path | None) -> None:
    """Predictions as CSV: the image, a column of probabilities per class, the model's sha256.

    Bytes of a file name that are no UTF-8 stand there as in every output: `M\\udcfcller.png`.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("image", *found["classes"], "model_sha256"))
    for row in found["images"]:
        chances = (f"{row['probabilities'][c]:.6f}" for c in found["classes"])
        rows.writerow((row["image"], *chances, found["sha256"]))
    content = text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")
    if out is None:
        print(content, end="")
    else:
        write_new(out, content, mode=0o600, replace=True)  # names of images are names of patients, often


def export(state: Path, out: Path, *, round: Round | None = None, onnx: bool = False) -> tuple[tuple[Path, ...], str]:
    """Write the model into the folder `out`: its files, and why there is no ONNX file ("" where there is one)."""
    from hsl_node.train.export import export_model
    from hsl_node.train.site import open_anchor, open_hardware

    federation = load_federation(state)
    model = find_model(state, round)
    with Journal.read_only(Layout(state).journal) as journal:
        record = find_evaluation(journal)
        inputs = {r["peer"]: r["sha256"] for r in journal.rows("manifests", model.round)}
    scored = record is not None and record["weights"].get("fused") == model.sha256
    facts = {
        "trained_by": load_node(state).name,
        "federation": {"name": federation.name, "sha256": federation.digest, "peers": list(federation.peers)},
        "round": model.round,
        "fused_from": inputs,
        "anchor": federation.anchor.model_dump(mode="json") if federation.anchor else None,
        "test": {k: v for k, v in record["test"]["fused"].items() if k != "roc"} if record and scored else None,
    }
    hardware, anchor, plan = open_hardware(state, federation.plan), open_anchor(state), federation.plan
    weights = Layout(state).fused(model.round)
    return export_model(weights, out, plan=plan, hardware=hardware, anchor=anchor, facts=facts, onnx=onnx)
