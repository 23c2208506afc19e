"""What lies between a file and the network's input, as a value: it names a cache, and goes out with a model.

file -> one frame -> grey 0..255 or colour -> square, S × S px -> 0..1 -> normalised (3, S, S)
        `frame`      `window`, `grey`         `fit`, `resize`              `mean`, `std`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from hsl_node.errors import DataError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.plan import Plan
from hsl_node.federation.strings import Frozen

Three = tuple[float, float, float]  # red, green, blue
IMAGENET_MEAN: Three = (0.485, 0.456, 0.406)  # of pixels in [0, 1]: what published backbone weights were trained with
IMAGENET_STD: Three = (0.229, 0.224, 0.225)


class Window(Frozen):
    """Which grey values become black and white."""

    center: float
    width: float = Field(gt=0)
    shape: Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"] = "LINEAR"  # DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3


class Preprocessing(Frozen):
    """How any image file becomes the network's input. What a version does not leave open stands here all the same."""

    version: Literal[2] = 2  # raise it when the same file would give other pixels
    image_size: int = Field(ge=1, le=1024)  # S, px
    fit: Literal["squeeze", "pad"] = "squeeze"  # pad: black bars beside the picture keep its shape
    frame: Literal["middle", "first"] = "middle"  # of a file that holds several
    window: Window | None = None  # one for all grey DICOM and all of more than 8 bits; None: `grey` says which
    grey: Literal["own VOI LUT, own window, else own range"] = "own VOI LUT, own window, else own range"
    resize: Literal["bilinear, antialiased"] = "bilinear, antialiased"
    channels: Literal["RGB; grey in all three"] = "RGB; grey in all three"
    value_range: Literal["0..1"] = "0..1"  # bytes / 255, before mean and std
    mean: Three = IMAGENET_MEAN
    std: Three = IMAGENET_STD

    @model_validator(mode="after")
    def _of_this_version(self) -> Self:
        if (self.mean, self.std) != (IMAGENET_MEAN, IMAGENET_STD):
            raise ValueError("mean and std: version 2 normalises as ImageNet")
        return self

    @classmethod
    def of(cls, plan: Plan, window: Window | None = None) -> Self:
        return cls(image_size=plan.image_size, fit=plan.fit, frame=plan.frame, window=window)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Raises: DataError: it describes what this version does not do."""
        try:
            return cls.model_validate_json(canonical_json(content))
        except (ValidationError, ValueError, TypeError) as exc:
            raise DataError(
                "the model's preprocessing is not one that this version of hsl-node carries out",
                remedy="use the version that exported the model, or export the model again with this one",
            ) from exc

    def words(self) -> str:
        """For a person, in one line."""
        shape = "squeezed into" if self.fit == "squeeze" else "padded with black to"
        window = f"window {self.window.center:g}/{self.window.width:g}" if self.window else self.grey
        return (
            f"{shape} {self.image_size} × {self.image_size} px ({self.resize}); {self.frame} frame of several;"
            f" grey of DICOM and of more than 8 bits: {window}"
        )
