"""A model to take away: weights with their anchor reference, a JSON card, and ONNX where the exporter is installed.

model.safetensors   the shared tensors, and `anchor_reference` (512,): no anchor set is needed to predict
model.json          what it is, how to feed it, and all digests
model.onnx          pixels (N, 3, S, S) in 0..1 -> probabilities (N,) of class 1, or (N, C); float32
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsl_node.federation.plan import Plan
from hsl_node.train.batches import normalise
from hsl_node.train.data.anchor import AnchorSet
from hsl_node.train.data.files import replacing
from hsl_node.train.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from hsl_node.train.hardware import Hardware
from hsl_node.train.method import Method
from hsl_node.train.scoring import anchor_embedding, open_model
from hsl_node.train.site import versions
from hsl_node.train.tasks.classification import probabilities
from hsl_node.weights.checkpoint_file import Array, read_weights, write_weights
from hsl_node.weights.whole import sha256_of

WEIGHTS_FILE, CARD_FILE, ONNX_FILE = "model.safetensors", "model.json", "model.onnx"
REFERENCE = "anchor_reference"
FORMAT = 1


def export_model(
    weights: Path,
    folder: Path,
    *,
    plan: Plan,
    hardware: Hardware,
    anchor: AnchorSet | None,
    facts: Mapping[str, Any],
    onnx: bool,
) -> tuple[tuple[Path, ...], str]:
    """Write the files above; gives them, and why there is no ONNX file that was asked for ("" where there is none).

    `facts` (federation, round, anchor fingerprint, metrics, ...) go into the card.
    """
    method, model = open_model(weights, plan, hardware)
    reference = anchor_embedding(method, model, anchor, hardware)
    tensors: dict[str, Array] = dict(read_weights(weights))
    if reference is not None:
        tensors[REFERENCE] = reference.numpy()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    digests = {WEIGHTS_FILE: write_weights(folder / WEIGHTS_FILE, tensors)}
    (folder / WEIGHTS_FILE).chmod(0o600)  # as all that comes of the images: its owner decides who gets it
    missing = _export_onnx(weights, plan, hardware, reference, folder / ONNX_FILE) if onnx else ""
    if onnx and not missing:
        digests[ONNX_FILE] = sha256_of(folder / ONNX_FILE)
    card = {
        "format": FORMAT,
        "classes": list(plan.classes),
        "input": {
            "pixels": [plan.image_size, plan.image_size],
            "range": "0..1, red, green, blue; grey in all three; the ONNX file normalises by itself",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        },
        "output": f"probability of {plan.classes[1]!r}" if len(plan.classes) == 2 else "probability of each class",
        "plan": plan.model_dump(mode="json"),
        "source_weights_sha256": sha256_of(weights),
        "files": digests,
        "anchor_reference": None if reference is None else "mean anchor embedding over the whole anchor set",
        "versions": versions(),
        **facts,
    }
    with replacing(folder / CARD_FILE) as file:
        file.write(json.dumps(card, indent=2, allow_nan=False).encode() + b"\n")
    return tuple(folder / name for name in (*digests, CARD_FILE)), missing


class _Portable(nn.Module):
    """The whole prediction as one graph: normalise, the method's logits beside its reference, probabilities."""

    def __init__(self, method: Method, model: nn.Module, reference: Tensor | None) -> None:
        super().__init__()
        self.method = method
        self.model = model
        self.reference = reference

    def forward(self, pixels: Tensor) -> Tensor:
        image = normalise(pixels.permute(0, 2, 3, 1) * 255)
        return probabilities(self.method.logits(self.model, image, self.reference))


def _export_onnx(weights: Path, plan: Plan, hardware: Hardware, reference: Tensor | None, path: Path) -> str:
    """Write the ONNX file; the reason in words where it can't be done."""
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed: pip install 'hsl-node[onnx]', then export again with --onnx"
    plain = replace(hardware, device=torch.device("cpu"), precision="float32", memory_format=torch.contiguous_format)
    portable = _Portable(*open_model(weights, plan, plain), reference).eval()
    example = torch.rand(2, 3, plan.image_size, plan.image_size)
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
