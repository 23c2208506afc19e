"""What a demo federation is made of: images per hospital, an anchor set, a plan, nodes enrolled by the real code.

TARGET/.hsl-demo            the marker: without it a folder that is not empty is never touched
TARGET/images/<name>/       generated phantoms, and nothing else (real images are read where they are)
TARGET/anchor.safetensors   the anchor set
TARGET/federation.toml      the federation, as every node has it
TARGET/nodes/<name>/        state directory of a node
TARGET/report.html
"""

from __future__ import annotations

import itertools
import re
import shutil
import socket
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from hsl_node.admin import enrol
from hsl_node.errors import DataError, NotRunning, UsageError
from hsl_node.federation.config import Federation, federation_text
from hsl_node.federation.node_toml import DataConfig
from hsl_node.federation.plan import Plan
from hsl_node.host import files
from hsl_node.host.layout import Layout
from hsl_node.study import phantoms
from hsl_node.train.data.listing import read_source
from hsl_node.train.data.sources import Asked
from hsl_node.train.data.tables import find_likely, read_rows

MARKER = ".hsl-demo"
OURS = ("images", "nodes", "anchor.safetensors", "federation.toml", "report.html")  # what a new demo replaces
HOSPITALS_MAX = 8  # each is a daemon and a trainer: about 0.6 GB of memory
PHANTOM_PX = 96
ANCHORS_EACH = 60  # of the stand-in, per class: about as many as a small hospital has images to train on
REAL_ANCHORS_EACH = 1000  # per class, where there are that many: the published number
# The words of a negative finding, so that class 1 is the one to be found.
NEGATIVE = ("normal", "benign", "negative", "healthy", "no", "control", "0")

ASKED = Asked("--anchor", "a column called {0}", "a table without a column split", "the command line")

Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Hospital:
    """One node of the demo."""

    name: str
    state: Path
    data: DataConfig
    origin: str  # for people: what its images are


# ------------------------------------------------------------------ the folder


def prepare_folder(target: Path, stop: Callable[[Path], None]) -> bool:
    """Make `target` ready for a new demo: what an earlier one made there is removed. True: there was one.

    `stop` ends a daemon that an interrupted demo left behind.

    Raises:
        UsageError: something is there that is not a demo.
    """
    marker = target / MARKER
    earlier = marker.exists()
    if not earlier and target.exists() and not (target.is_dir() and next(target.iterdir(), None) is None):
        raise UsageError(
            f"{target} is or holds something that is not a demo of hsl-node; nothing was changed",
            remedy="name another folder with --out",
        )
    target.mkdir(parents=True, exist_ok=True)
    marker.write_text("hsl-node demo: running it again replaces " + ", ".join(OURS) + " in this folder.\n", "utf-8")
    for state in sorted((target / "nodes").glob("*")):
        with suppress(NotRunning):
            stop(state)
    for name in OURS:
        path = target / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return earlier


# ------------------------------------------------------------------ images


def phantom_hospitals(target: Path, count: int, seed: int, progress: Progress) -> tuple[Hospital, ...]:
    """Generate the pictures of `count` hospitals."""
    made = []
    for hospital in phantoms.hospitals(count, seed):
        table = phantoms.write(
            target / "images" / hospital.name,
            hospital,
            seed=seed,
            size=PHANTOM_PX,
            progress=partial(progress, f"drawing phantoms of {hospital.name}"),
        )
        origin = f"{hospital.patients} synthetic patients, {hospital.prevalence:.0%} malignant"
        made.append(Hospital(hospital.name, target / "nodes" / hospital.name, DataConfig(path=table), origin))
    return tuple(made)


def table_hospitals(target: Path, data: Path, group_by: str) -> tuple[tuple[Hospital, ...], tuple[str, ...]]:
    """A hospital per value of one column of a table of real images; and the classes, the negative one first.

    Raises:
        UsageError: no such column, one group only, or too many.
        DataError: a table that cannot be understood.
    """

    path = find_table(data)
    table = read_rows(path)
    header, rows = table.header, table.rows
    if group_by not in header:
        raise UsageError(f"{path} has no column {group_by!r}", remedy=f"--group-by one of: {', '.join(header)}")
    columns = find_columns(path, header)
    classes = ordered_classes({row[columns["label"]] for _, row in rows})
    groups = Counter(row[group_by] for _, row in rows if row[group_by])
    if not 2 <= len(groups) <= HOSPITALS_MAX:
        raise UsageError(
            f"column {group_by!r} has {len(groups)} different values; a demo has 2 to {HOSPITALS_MAX} hospitals",
            remedy=f"group by another column: {', '.join(header)}",
        )
    names = peer_names(sorted(groups))
    hospitals = [
        Hospital(
            names[group],
            target / "nodes" / names[group],
            DataConfig(path=path.absolute(), filter={group_by: group}, columns=columns),
            f"{groups[group]} images, {group_by} {group}",
        )
        for group in sorted(groups, key=lambda g: names[g])
    ]
    return tuple(hospitals), classes


def find_table(data: Path) -> Path:
    """The table itself, or the one in a folder: metadata.csv, or the only CSV there."""
    if data.is_file():
        return data
    found = [data / "metadata.csv"] if (data / "metadata.csv").is_file() else sorted(data.glob("*.csv"))
    if len(found) != 1:
        raise UsageError(
            f"{data} holds {len(found)} tables (.csv)" if data.is_dir() else f"{data} does not exist",
            remedy="name a table with a row for each image" if data.is_dir() else "check the spelling",
        )
    return found[0]


def find_columns(path: Path, header: Sequence[str]) -> dict[str, str]:
    """Our word -> the table's column, by the names that tables usually have. Splits are the node's own."""
    found = {key: find_likely(key, header) for key in ("path", "label", "patient")}
    missing = [key for key in ("path", "label") if not found[key]]
    if missing:
        raise DataError(
            f"{path.name}:1: no column is recognised as {' or '.join(missing)}",
            remedy=f"rename one to {' or '.join(missing)}; columns here: {', '.join(header)}",
        )
    return {key: column for key, column in found.items() if column} | {"split": ""}


def ordered_classes(labels: set[str]) -> tuple[str, ...]:
    """Classes in the order of their labels 0, 1, ...: a word for "nothing found" comes first."""
    return tuple(sorted(labels, key=lambda c: (c.casefold() not in NEGATIVE, c)))


def peer_names(groups: Sequence[str]) -> dict[str, str]:
    """A valid peer name for each group: "GE Logiq 7 @10-14MHz" -> "ge-logiq-7". Different groups, different names."""
    names: dict[str, str] = {}
    for group in groups:
        short = _slug(re.split(r"[@(,;]", group)[0])
        candidates = itertools.chain((short, _slug(group)), (f"{short[:28]}-{n}" for n in itertools.count(2)))
        names[group] = next(name for name in candidates if name not in names.values())
    return names


def _slug(text: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", text.casefold()).strip("-")[:32].strip("-")
    return slug if len(slug) > 1 and slug[0].isalpha() else f"site-{slug}"[:32].strip("-")


# ------------------------------------------------------------------ the anchor set


def require_anchor(source: Path, image_size: int) -> None:
    """Before an earlier demo is replaced, and pictures are drawn. Raises: as `make_anchor`."""
    from hsl_node.train.data import anchor

    if source.suffix != ".safetensors":
        _two_classes(source)
    elif (found := anchor.load(source).image_size) != image_size:
        raise DataError(
            f"{source} has images of {found} px, the demo of {image_size}",
            remedy=f"give its images instead, or --image-size {found}",
        )


def make_anchor(target: Path, source: Path | None, image_size: int, seed: int, progress: Progress) -> Path:
    """Build the anchor set, or take one that is built already. `source` None: the digits stand-in.

    Raises:
        DataError: it has not two classes, or a built one is of another size.
    """
    from hsl_node.train.data import anchor

    out = target / "anchor.safetensors"
    if source is None:
        anchor.save(anchor.digits_standin(image_size, n=ANCHORS_EACH, seed=seed), out)
    elif source.suffix == ".safetensors":
        require_anchor(source, image_size)
        shutil.copyfile(source, out)
    else:
        data, counts, classes = _two_classes(source)
        made = anchor.build(
            data,
            name=source.name if source.is_dir() else source.stem,
            classes=(classes[0], classes[1]),
            image_size=image_size,
            n=REAL_ANCHORS_EACH if min(counts.values()) >= REAL_ANCHORS_EACH else None,  # None: as many as there are
            seed=seed,
            progress=partial(progress, "building the anchor set"),
        )
        anchor.save(made, out)
    return out


def _two_classes(source: Path) -> tuple[DataConfig, Counter[str], tuple[str, ...]]:
    data = DataConfig(path=source.absolute())
    if (source.is_dir() and any(source.glob("*.csv"))) or source.suffix in (".csv", ".tsv"):
        path = find_table(source)
        columns = find_columns(path, read_rows(path).header)
        data = DataConfig(path=path.absolute(), columns=columns)
    counts = Counter(item.label for item in read_source(data, ASKED).items)
    classes = ordered_classes(set(counts))
    if len(classes) != 2:
        raise DataError(f"{source} has {len(classes)} classes; an anchor set has two", remedy="name another source")
    return data, counts, classes


# ------------------------------------------------------------------ enrolment, by the code that hospitals use


def enrol_all(target: Path, hospitals: Sequence[Hospital], plan: Plan, anchor: Path | None, threads: int) -> Federation:
    """init at every hospital, its card to the one who makes the federation, the file back to everybody: join."""
    cards = []
    for hospital, port in zip(hospitals, free_ports(len(hospitals)), strict=True):
        address = f"127.0.0.1:{port}"
        enrol.init(hospital.state, name=hospital.name, address=address, listen=address, data=hospital.data.path)
        _configure(hospital, threads)
        cards.append(Layout(hospital.state).card(hospital.name))
    federation = enrol.create(name="demo", cards=cards, plan=plan, anchor=anchor)
    path = target / "federation.toml"
    files.write_new(path, federation_text(federation))
    for hospital in hospitals:
        enrol.join(hospital.state, path, anchor=anchor)
    return federation


def _configure(hospital: Hospital, threads: int) -> None:
    """node.toml as `init` wrote it, plus what this demo needs of it."""
    path = Layout(hospital.state).node_toml
    content: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    content["data"] = hospital.data.model_dump(mode="json", exclude_defaults=True)
    content["train"] = {"threads": threads}
    files.write_new(path, tomli_w.dumps(content), mode=0o600, replace=True)


def free_ports(count: int) -> list[int]:
    """Ports on the loopback that are free now; held open together, so that no two are the same."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in held]
