"""Write a model to take away: the folder that `bundle.py` describes, and reads."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from hsl_node.errors import UsageError
from hsl_node.train.batches import normalise
from hsl_node.train.bundle import (
    CARD_FILE,
    EXAMPLE_FILE,
    FORMAT,
    ONNX_FILE,
    REFERENCE,
    SUMS_FILE,
    WEIGHTS_FILE,
    WORDS_FILE,
    positive,
    sums_text,
)
from hsl_node.train.card import Example, card_text
from hsl_node.train.data.files import replacing
from hsl_node.train.data.images import decode
from hsl_node.train.method import Method
from hsl_node.train.predictor import Predictor
from hsl_node.train.site import versions
from hsl_node.train.start import place
from hsl_node.train.state_dict import all_tensors, to_weights
from hsl_node.train.tasks.classification import probabilities
from hsl_node.weights.checkpoint_file import Array, write_weights
from hsl_node.weights.whole import sha256_of


def export_model(
    folder: Path, *, predictor: Predictor, facts: Mapping[str, Any], onnx: bool
) -> tuple[tuple[Path, ...], str]:
    """Write the files; gives them, and why there is no ONNX file that was asked for ("" where there is none).

    `facts` (federation, round, anchor fingerprint, metrics, ...) go into the card. An export into the folder of an
    earlier one leaves nothing of that behind; one that is cut short leaves a folder that nobody predicts with.

    Raises:
        UsageError: the folder holds sums of something else.
    """
    if (folder / SUMS_FILE).exists() and not (folder / CARD_FILE).exists():
        raise UsageError(f"{folder / SUMS_FILE} is of no exported model", remedy="name another folder, or a new one")
    predictor = _without_what_stays(predictor)
    card, reference = predictor.card, predictor.reference
    tensors: dict[str, Array] = to_weights(predictor.model, all_tensors(predictor.model))
    if reference is not None:
        tensors[REFERENCE] = reference.numpy()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for stale in (SUMS_FILE, ONNX_FILE):
        (folder / stale).unlink(missing_ok=True)
    digests = {WEIGHTS_FILE: write_weights(folder / WEIGHTS_FILE, tensors)}
    (folder / WEIGHTS_FILE).chmod(0o600)  # as all that comes of the images: its owner decides who gets it
    missing = _export_onnx(predictor, folder / ONNX_FILE) if onnx else ""
    if onnx and not missing:
        digests[ONNX_FILE] = sha256_of(folder / ONNX_FILE)
    _write(folder / EXAMPLE_FILE, example_picture())
    example = _example(folder / EXAMPLE_FILE, predictor)
    two = positive(card.classes)
    content = {
        "format": FORMAT,
        **card.model_dump(mode="json"),
        "positive": two,
        "output": f"probability of {two!r}" if two else "probability of each class",
        "onnx": "pixels in 0..1 of this size, red, green, blue -> probabilities; it normalises by itself; float32",
        "anchor_reference": None if reference is None else "mean anchor embedding over the whole anchor set",
        "example": {"file": EXAMPLE_FILE, "probabilities": example.probabilities},
        "versions": versions(),
        **facts,
    }
    _write(folder / WORDS_FILE, card_text(card, content, example).encode("utf-8"))
    digests |= {name: sha256_of(folder / name) for name in (WORDS_FILE, EXAMPLE_FILE)}
    text = json.dumps({**content, "files": digests}, indent=2, allow_nan=False)
    _write(folder / CARD_FILE, text.encode("ascii") + b"\n")
    digests[CARD_FILE] = sha256_of(folder / CARD_FILE)
    _write(folder / SUMS_FILE, sums_text(digests).encode("ascii"))
    return tuple(folder / name for name in (*digests, SUMS_FILE)), missing


def _without_what_stays(predictor: Predictor) -> Predictor:
    names = predictor.method.network.at_home(predictor.model)
    if not names:
        return predictor
    model = copy.deepcopy(predictor.model)
    state = model.state_dict()
    for name in names:
        state[name].zero_()
    return replace(predictor, model=model)


def example_picture() -> bytes:
    """A PNG of 50 x 35 px in three colours, the same each time: a ramp down, a ramp across, and stripes."""
    y, x = np.mgrid[0:35, 0:50]
    pixels = np.stack([y * 7, x * 5, (x // 5 + y // 5) % 2 * 200], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _example(path: Path, predictor: Predictor) -> Example:
    square: NDArray[np.uint8] = decode(path, predictor.card.preprocessing)
    (row,) = predictor([square]).tolist()
    return Example(square, dict(zip(predictor.card.classes, row, strict=True)))


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


class _Portable(nn.Module):
    """The whole prediction as one graph: normalise, the method's logits beside its reference, probabilities."""

    def __init__(self, method: Method, model: nn.Module, reference: Tensor | None) -> None:
        super().__init__()
        self.method = method
        self.model = model
        self.reference = reference

    def forward(self, pixels: Tensor) -> Tensor:
        image = normalise(pixels.permute(0, 2, 3, 1) * 255)
        return probabilities(self.method.network.ask(self.model, image, self.reference))


def _export_onnx(predictor: Predictor, path: Path) -> str:
    """Write the ONNX file; the reason in words where it can't be done."""
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed: pip install 'hsl-node[onnx]', then export again with --onnx"
    plain = replace(
        predictor.hardware,
        device=torch.device("cpu"),
        precision="float32",
        memory_format=torch.contiguous_format,
    )
    model = place(copy.deepcopy(predictor.model), plain)
    portable = _Portable(predictor.method, model, predictor.reference).eval()
    side = predictor.card.plan.image_size
    example = torch.rand(2, 3, side, side)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's deprecations are not the operator's
            torch.onnx.export(
                portable,
                (example,),
                path,
                input_names=["pixels"],
                output_names=["probabilities"],
                dynamic_shapes={"pixels": {0: torch.export.Dim("images")}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as exc:  # the exporter follows torch's internals and fails in many ways; the rest is written
        path.unlink(missing_ok=True)
        said = " ".join(str(exc).split())[:200]
        return f"torch's exporter failed: {type(exc).__name__}: {said}; model.safetensors and model.json are whole"
    path.chmod(0o600)
    return ""
