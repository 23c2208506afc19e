"""The card in words: how an image becomes the input and what the output means, for another program to repeat it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsl_node.train.bundle import EXAMPLE_FILE, ONNX_FILE, REFERENCE, SUMS_FILE, WEIGHTS_FILE, Card, positive
from hsl_node.train.data.preprocessing import Preprocessing


@dataclass(frozen=True)
class Example:
    """What this model makes of the example's picture."""

    square: NDArray[np.uint8]  # (S, S, 3)
    probabilities: dict[str, float]


def card_text(card: Card, facts: Mapping[str, Any], example: Example) -> str:
    """Markdown. `facts`: all of model.json."""
    return "\n".join(
        [
            "# What this model is, and how to feed it\n",
            *_origin(card, facts),
            "\n## From a file to the network's input\n",
            *(f"{number}. {step}" for number, step in enumerate(_steps(card.preprocessing), 1)),
            f"\n`{ONNX_FILE}`, if it is here, takes what step 5 gives, float32 (N, 3, S, S), and normalises by itself.",
            "\n## From the output to a decision\n",
            *_output(card),
            "\n## A worked example\n",
            *_worked(card.preprocessing, example),
            "\n## To use it\n",
            f"    sha256sum -c {SUMS_FILE}          # is every file the one that was exported?",
            "    hsl-node predict --model . IMAGES   # images, folders, tables; needs no node and no network\n",
            "For research: this is no medical device, and not cleared for diagnosis. Ask the hospitals that trained it",
            "before you pass it on: weights can tell something about the images that they were trained on.\n",
        ]
    )  # fmt: skip


def _origin(card: Card, facts: Mapping[str, Any]) -> list[str]:
    plan, federation = card.plan, facts.get("federation") or {}
    lines = [f"- Task: {plan.task}. Classes in this order: {', '.join(card.classes)}."]
    if federation:
        lines.append(f"- Federation: {federation['name']}; hospitals: {', '.join(federation['peers'])}.")
    by = f", exported by {facts['trained_by']}" if "trained_by" in facts else ""
    if data := facts.get("data"):
        lines.append(f"- Images at {facts['trained_by']}, which made this card: {_counted(data)}.")
    lines += [
        f"- {_model(card, facts)}{by}.",
        *([f"- Why this one: {card.why}."] if card.why else []),
        f"- Method {plan.method}, backbone {plan.backbone}; all settings are in model.json under `plan`.",
        f"- sha256 of {_file(card)}: `{card.source_weights_sha256}`. `{WEIGHTS_FILE}`"
        f" holds {_tensors(card)}{_and_reference(facts)}; its own sha256 is in {SUMS_FILE}.",
        f"- Computed with {card.hardware.precision} on {card.hardware.threads} threads ({card.hardware.device}, "
        f"{card.hardware.processor}). Another kind of machine may differ in the last digits.",
    ]
    return lines


def _model(card: Card, facts: Mapping[str, Any]) -> str:
    where = facts.get("trained_by", "one hospital")
    return {
        "own": f"The own model of {where} of round {card.round}: trained on there from the fused model before",
        "fused": f"The fused model of round {card.round}",
        "recalibrated": f"The fused model of round {card.round}, with BatchNorm statistics of the training images of "
        f"{where}",
    }[card.kind]


def _file(card: Card) -> str:
    return "the hospital's own file" if card.kind == "own" else "the fused weights, as the federation knows them"


def _tensors(card: Card) -> str:
    if card.kind == "recalibrated" or (card.kind == "fused" and card.plan.card.keeps):
        return "these tensors, with the hospital's own ones in their place where it has any,"
    return "the same tensors"


def _counted(data: Mapping[str, Any]) -> str:
    patients = data["patients"] or {}
    known = any(patients.values())
    said = [f"{kind} {n}" + (f" of {patients[kind]} patients" if known else "") for kind, n in data["images"].items()]
    return ", ".join(said) + ("" if known else "; no patient is known, so one may stand on both sides of the split")


def _and_reference(facts: Mapping[str, Any]) -> str:
    return f" and `{REFERENCE}`, the mean anchor embedding" if facts["anchor_reference"] else ""


def _steps(p: Preprocessing) -> list[str]:
    size = f"{p.image_size} x {p.image_size} pixels"
    grey = (
        f"every grey DICOM image and all of more than 8 bits go through the window with centre {p.window.center:g} and"
        f" width {p.window.width:g} (DICOM PS3.3 C.11.2.1.2, {p.window.shape}), whatever the file says"
        if p.window
        else "a grey DICOM image goes through its own VOI LUT, else its first window (DICOM PS3.3 C.11.2); without"
        " either, and unless it is 8 unsigned bits without a rescale, its smallest value becomes 0 and its largest 255,"
        " as those of any other image of more than 8 bits do"
    )
    fit = {
        "squeeze": f"The whole image is squeezed into {size}: the aspect ratio is not kept, nothing is cut off.",
        "pad": f"The image is scaled until its longer side is {p.image_size} pixels, and centred on black of {size}.",
    }[p.fit]
    frame = "middle one (n // 2, counted from 0)" if p.frame == "middle" else "first one"
    return [
        f"Read the file; of several frames or pages take the {frame}. A picture is turned as its EXIF orientation says,"
        " and what is transparent is blended over black. A DICOM file's stored values go through its modality LUT, or"
        " rescale slope and intercept.",
        f"Make bytes of it. 8 bits of a picture stay as they are; {grey}. The result is 0..255, rounded to the nearest."
        " MONOCHROME1 and white-is-zero are inverted; a DICOM file's padding is black, and no value of its own range.",
        "Colour whose three channels differ nowhere by 8 or more is grey: take its green channel.",
        f"{fit} Bilinear with antialiasing, as Pillow's `resize(..., BILINEAR)` does it: bilinear without antialiasing,"
        " or bicubic, gives other probabilities.",
        "Red, green, blue; grey goes into all three. Divide by 255: pixels from 0 to 1.",
        f"Subtract the mean {p.mean} and divide by the deviation {p.std}, for red, green and blue.",
    ]


def _output(card: Card) -> list[str]:
    two, decision = positive(card.classes), card.decision
    if two is None:
        return [f"One probability for each class, in the order {', '.join(card.classes)}. Threshold: none."]
    chosen = f"{decision.threshold:.6f}. {decision.rule}" if decision else "none. No evaluation has chosen one."
    return [
        f"The probability of `{two}`, the positive class; that of `{card.classes[0]}` is one less it.",
        f"Threshold: {chosen}"
        + (f" From it on an image counts as `{two}`, below as `{card.classes[0]}`." if decision else ""),
        "Probabilities are not calibrated.",
    ]


def _worked(p: Preprocessing, example: Example) -> list[str]:
    last = p.image_size - 1
    points = [(0, 0), (p.image_size // 2, p.image_size // 3), (last, last)]
    rows = [f"| {y}, {x} | {', '.join(str(v) for v in example.square[y, x].tolist())} |" for y, x in points]
    chances = ", ".join(f"{name} {chance:.6f}" for name, chance in example.probabilities.items())
    square = {"squeeze": "image.resize", "pad": "ImageOps.pad"}[p.fit]
    arguments = f"({p.image_size}, {p.image_size}), Image.Resampling.BILINEAR"
    resized = f"{square}({'image, ' * (p.fit == 'pad')}{arguments})"
    code = [
        "import numpy as np",
        "from PIL import Image, ImageOps",
        "",
        "def prepare(path):  # an opaque picture of 8 bits -> bytes (S, S, 3), step 4",
        "    image = ImageOps.exif_transpose(Image.open(path))",
        '    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")',
        '    if image.mode == "RGB":',
        "        channels = np.asarray(image).astype(int)",
        "        if (channels.max(axis=2) - channels.min(axis=2)).max() < 8:",
        "            image = image.getchannel(1)",
        f'    return np.asarray({resized}.convert("RGB"))',
        "",
        "def network_input(path):  # step 6: float32 (1, 3, S, S)",
        "    pixels = prepare(path) / 255",
        f"    return ((pixels - {p.mean}) / {p.std}).transpose(2, 0, 1)[None].astype(np.float32)",
    ]
    sha256 = hashlib.sha256(example.square.tobytes()).hexdigest()
    return [
        f"`{EXAMPLE_FILE}` is 50 x 35 pixels in colour. After step 4 its bytes (rows from the top, red, green, blue)"
        f" have the sha256 `{sha256}`, among them:\n",
        "| row, column | red, green, blue |",
        "|---|---|",
        *rows,
        f"\nThis model's probabilities of it: {chances}.\n",
        "```python",
        *code,
        "```",
    ]
