"""From the source's own words to the classes of the plan. Nothing here guesses what a word means.

A guess that is followed can turn every diagnosis round ("M" = "benign"; abnormal, the nearest word to normal).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence

from hsl_node.errors import DataError
from hsl_node.train.data.sources import SPLIT_WORDS, Source, first_few, toml_table

_NUMBER = re.compile(r"([+-]?)0*(\d+?)(?:[.,]0*)?")
WORDS_MAX = 20  # of a line to copy; a source with more labels than this is hardly one


def labels_of(
    source: Source, classes: Sequence[str], mapping: Mapping[str, str], *, select: bool = False
) -> list[int | None]:
    """Index into `classes` per item; None where `mapping` says "" (leave this label out).

    A word counts as it is written, but for the spellings of one whole number (1, 01, 1.0). `select`: other labels are
    left out too, instead of being an error (an anchor set picks two classes of many).

    Raises:
        DataError: labels that are no class, each with the first place it stands at; the line to fill in.
    """
    spelt = {number: name for word, name in mapping.items() if (number := _number(word))}
    meant = {label: mapping.get(label, spelt.get(_number(label), label)) for label in {i.label for i in source.items}}
    unknown: dict[str, str] = {}
    for item in source.items:
        if meant[item.label] != "" and meant[item.label] not in classes:
            unknown.setdefault(item.label, item.where)
    if unknown and not select:
        listed = (_told(where, label, meant[label], classes) for label, where in unknown.items())
        line = toml_table({**mapping, **dict.fromkeys(list(unknown)[:WORDS_MAX], "?")})
        raise DataError(
            "\n".join(first_few(listed)),
            remedy=_deeper(source, unknown, classes)
            or f"classes of the plan: {', '.join(classes)} (before joining, `data check --classes A,B` "
            'names yours). Say for each word which of these it means, or "" to leave its images out:'
            f" labels = {line} under [data] in node.toml, a class in the place of each ?",
        )
    return [classes.index(meant[i.label]) if meant[i.label] in classes else None for i in source.items]


def same_letters(word: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?` where it differs in case, blanks or forms of letters alone; else nothing."""
    near = [k for k in known if _letters(k) == _letters(word)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _told(where: str, label: str, name: str, classes: Sequence[str]) -> str:
    what = f"label {label!r}" if name == label else f"label {label!r} = {name!r} in data.labels"
    return f"{where}: {what} is no class{same_letters(name, classes)}"


def _deeper(source: Source, unknown: Collection[str], classes: Sequence[str]) -> str:
    """What to do where folders called as the classes lie inside of those that were taken for classes, else ""."""
    if source.unit != "files":
        return ""
    names, tops = {_letters(name) for name in classes}, set()
    for item in source.items:
        parts = item.path.relative_to(source.root).parts[:-1]
        depth = next((n for n, part in enumerate(parts) if _letters(part) in names), 0)
        if item.label in unknown and depth:
            tops.add(parts[: depth - 1] if parts[depth - 1].casefold() in SPLIT_WORDS else parts[:depth])
    if not tops:
        return ""
    if tops == {()}:
        return (
            "the class folders lie in train/ and test/, which count as a split where no other folder is beside them:"
            " move the others out"
        )
    if len(tops) == 1:
        return f"the class folders lie deeper: write data.path with /{'/'.join(tops.pop())} at its end"
    return (
        "the class folders lie deeper, in several folders: let a folder per class come first, or train/, validation/,"
        " test/ and nothing else; or use a table, which can name the patients too"
    )


def _letters(word: str) -> str:
    return "".join(unicodedata.normalize("NFKC", word).casefold().split())


def _number(word: str) -> str:
    """The one spelling of a whole number; of other words nothing."""
    found = _NUMBER.fullmatch(word)
    return found[1].replace("+", "") + found[2] if found else ""
