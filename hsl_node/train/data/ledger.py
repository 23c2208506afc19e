"""The split ledger: remembers, over years, on which side each patient and image is, and what a run began with.

One private JSON file of hashes: `splits`, a page for each kind of split, and `begun`, of the run that is on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsl_node.errors import LocalStateError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.plan import Plan
from hsl_node.host.durable import Step
from hsl_node.train.data.files import replacing

LEDGER_VERSION = 1
SHORT = 16  # hex digits of a sha256 by which `begun` knows an image


# A page for each kind of split (`title_of`: another seed or another ratio is another split): hashed key -> 0, 1, 2.
Pages = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Begun:
    """The images and labels that a run began with."""

    run: str  # digest of the federation
    images: Mapping[str, tuple[str, ...]] = field(repr=False)  # class -> the first SHORT digits of each sha256


@dataclass(frozen=True)
class Since:
    """What is other than when the run began. Numbers of images."""

    began: dict[str, int]  # class -> images
    gone: dict[str, int]  # class -> images that were there then
    relabelled: dict[str, int]  # "benign -> malignant" -> images
    new: int

    def __bool__(self) -> bool:
        return bool(self.gone or self.relabelled)

    def __str__(self) -> str:
        parts = [f"{n} images were {change}" for change, n in self.relabelled.items()]
        parts += [f"{n} of {self.began[name]} images of {name} are gone" for name, n in self.gone.items()]
        return "; ".join(parts)


def title_of(plan: Plan) -> str:
    return f"seed {plan.seed}, " + "/".join(str(p) for p in plan.split_percent)


def read_ledger(path: Path) -> Pages:
    """Raises LocalStateError where the file is damaged: making a new split silently would leak test patients."""
    try:
        pages = {str(title): dict(page) for title, page in _read(path).get("splits", {}).items()}
        if any(split not in (0, 1, 2) for page in pages.values() for split in page.values()):
            raise ValueError("a split that is none")
    except (ValueError, TypeError, AttributeError) as exc:
        raise _damaged(path, exc) from exc
    return pages


def read_begun(path: Path) -> Begun | None:
    """None: nothing is known of a run. Raises: LocalStateError."""
    try:
        begun = _read(path).get("begun")
        return Begun(str(begun["run"]), {c: tuple(i) for c, i in begun["images"].items()}) if begun else None
    except (KeyError, TypeError, AttributeError) as exc:
        raise _damaged(path, exc) from exc


def write_ledger(path: Path, pages: Pages, begun: Begun | None = None) -> None:
    """`begun` None: of no run."""
    content: dict[str, Any] = {"version": LEDGER_VERSION, "splits": pages}
    if begun:
        content["begun"] = {"run": begun.run, "images": begun.images}
    with replacing(path, Step.TRAINER_LEDGER) as file:
        file.write(canonical_json(content))


def begun_with(run: str, digests: Mapping[str, list[str]]) -> Begun:
    """`digests`: class -> sha256 of its images."""
    return Begun(run, {name: tuple(sorted(d[:SHORT] for d in those)) for name, those in digests.items()})


def since(begun: Begun | None, run: str, digests: Mapping[str, list[str]]) -> Since | None:
    """Compare what there is with what this run began with; None: nothing is known of it."""
    if begun is None or begun.run != run:
        return None
    before = {image: name for name, images in begun.images.items() for image in images}
    now = {image[:SHORT]: name for name, images in digests.items() for image in images}
    gone: dict[str, int] = {}
    relabelled: dict[str, int] = {}
    for image, name in before.items():
        if image not in now:
            gone[name] = gone.get(name, 0) + 1
        elif now[image] != name:
            change = f"{name} and are now {now[image]}"
            relabelled[change] = relabelled.get(change, 0) + 1
    began = {name: len(images) for name, images in begun.images.items()}
    return Since(began, gone, relabelled, len(now.keys() - before.keys()))


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        if content["version"] != LEDGER_VERSION or "splits" not in content:
            raise ValueError(f"version {content['version']}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise _damaged(path, exc) from exc
    return content


def _damaged(path: Path, exc: Exception) -> LocalStateError:
    return LocalStateError(
        f"the split ledger {path} cannot be read ({type(exc).__name__})",
        remedy="restore it from your backup; without it patients may move between train and test."
        " To start a new split knowingly, move the file away",
    )
