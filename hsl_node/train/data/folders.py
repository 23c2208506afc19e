"""Images in a folder for each class, perhaps inside train/, validation/ and test/. Every file is accounted for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from hsl_node.errors import DataUnavailable
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.images import looks_like_image
from hsl_node.train.data.sources import SPLIT_WORDS, Item, Source

# What servers, archives and desktops put beside images: their thumbnails, copies and deleted files.
SYSTEM_FOLDERS = frozenset(
    {"@eadir", "#recycle", "@recycle", "@tmp", "#snapshot", "__macosx", "$recycle.bin", "system volume information"}
    | {"lost+found", "__pycache__"}
)
HIDDEN = "hidden, or in a hidden or system folder"
NO_IMAGE = "no images"
BESIDE = "beside the class folders"
UNUSED_SPLIT = (
    "lie in folders train, test or the like inside of the class folders, which is no split: the node makes its own. For"
    " that one to count, put the class folders inside of train/, validation/ and test/"
)


def read_folder(root: Path, data: DataConfig) -> Source:
    """Links to files and folders are followed, each folder once for a class."""
    folders = _folders(root)
    splits = {f: SPLIT_WORDS.get(f.name.casefold()) for f in folders}
    beside = [root]
    if folders and all(s is not None for s in splits.values()):
        classes = [(c, splits[f]) for f in folders for c in _folders(f)]
        beside += folders
    else:
        classes = [(f, None) for f in folders]
    items: list[Item] = []
    left: Counter[str] = Counter()
    for folder, split in classes:
        for path, hidden in _files(folder):
            if hidden:
                left[HIDDEN] += 1
            elif looks_like_image(path):
                given = None if data.columns else split
                items.append(Item(f"folder {folder.name}", folder.name, path, split=given))
            else:
                left[NO_IMAGE] += 1
    for folder in beside:
        for path in folder.iterdir():
            if path.is_dir() and is_hidden(path.name):
                left[HIDDEN] += sum(1 for _ in _files(path))
            elif not path.is_dir():
                left[HIDDEN if is_hidden(path.name) else BESIDE] += 1
    inside = sum(any(part.casefold() in SPLIT_WORDS for part in i.path.relative_to(root).parts[1:-1]) for i in items)
    doubts = (
        (f"{inside} images {UNUSED_SPLIT}",)
        if inside and not data.columns and classes and classes[0][1] is None
        else ()
    )
    return Source(tuple(items), len(items) + left.total(), +left, unit="files", root=root, doubts=doubts)


def _files(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Every file below, in the order of the names, and whether it is hidden.

    Raises:
        DataUnavailable: a folder below cannot be listed: its images would be missing without a word.
    """

    def refuse(exc: OSError) -> None:
        raise DataUnavailable(
            f"folder {folder.name}: a folder in it cannot be listed: {exc.strerror}",
            remedy="let this node's user read and enter it, or move it out of the data",
        ) from exc

    found: list[tuple[Path, bool]] = []
    for here, _, files in walk_once(folder, refuse):
        hidden = any(is_hidden(part) for part in here.relative_to(folder).parts) or is_hidden(folder.name)
        found += [(here / file, hidden or is_hidden(file)) for file in files]
    return iter(sorted(found))


def walk_once(folder: Path, refuse: Callable[[OSError], None]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, through links as well, each folder once. `refuse` hears of one that cannot be listed."""
    seen: set[str] = set()
    for name, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders.sort()
        real = os.path.realpath(name)
        if real in seen:  # a link to a folder that was read, or back to one above it
            folders.clear()
        else:
            seen.add(real)
            yield Path(name), folders, files


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS or name.casefold() in ("thumbs.db", "desktop.ini")
