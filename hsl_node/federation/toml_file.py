"""TOML files of people, checked: every problem at once, each with its line and, for a misspelt key, the nearest one.

The models are in `config.py`; nothing else reads TOML.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hsl_node.errors import ConfigError, escaped
from hsl_node.federation.methods import of_methods
from hsl_node.federation.problems import in_words
from hsl_node.host import wrong_paths

FILE_MAX_BYTES = 1024 * 1024  # a node.toml that leaves 20 000 images out by name; federations are far smaller
PROBLEMS_MAX = 25  # shown of one file: each is looked for in the whole text, and nobody reads more
PROBLEM_MAX_CHARS = 500  # of one of them
# Our longest key has three parts. tomllib's time grows with the square of the parts: 64 KB of "a.a.a..." take it 10 s.
KEY_PARTS_MAX = 64
# The words of TOML, in one pass: nothing is taken back ("*+"), and a text that does not end takes all that it may.
_WORDS = re.compile(
    r"""
      ["]{3} (?: [^"\\] | \\. | "{1,2}(?!") )*+ "{0,5}   # a text of many lines; quotes stand before its end, up to two
    | [']{3} (?: [^'] | '{1,2}(?!') )*+ '{0,5}
    | "(?: [^"\\\n] | \\[^\n] )*+ "?
    | '[^'\n]*+ '?
    | \#[^\n]*+
    | [^"'\#\n=,\[\]{}]++
    | .
    """,
    re.DOTALL | re.VERBOSE,
)

# A model's name: what people call its file, the keys that tell it from the others, what to give instead of another.
_KINDS = {
    "Federation": (
        "federation file",
        {"peer", "plan"},
        "give the federation.toml that came back: `hsl-node federation create` makes it of all cards",
    ),
    "NodeConfig": ("settings file of a node", {"name", "data"}, "put this node's own settings there, out of a backup"),
    "PeerCard": ("peer card", {"name", "address", "key"}, "give the *.card that each hospital mailed"),
    "Plan": (
        "plan",
        {"rounds"},
        "a plan has a line `key = value` for each setting, and the method's in its table: `hsl-node federation plan` "
        "lists them",
    ),
}

Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: Path, model: type[Model]) -> Model:
    """Read and check one file.

    Raises:
        ConfigError: every problem of the file, each with line and key.
    """
    text = read_text(path)
    return validate(path, text, parse(path, text), model)


def check(content: Mapping[str, Any], model: type[Model], source: str) -> Model:
    """Values that came from elsewhere than a file; `source` stands in the errors where a file's path would.

    Raises:
        ConfigError: every problem, each with its key.
    """
    return validate(Path(source), "", content, model)


def read_text(path: Path, max_bytes: int = FILE_MAX_BYTES) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ConfigError(f"{path}: larger than {max_bytes // 1024} KiB", remedy="is it the right file?")
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as exc:
        said = wrong_paths.explained(exc, path=path)
        raise ConfigError(said.message, remedy=said.remedy) from exc
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError(
            f"{path}:{line}: no UTF-8 text", remedy="is it the right file? Else save it as UTF-8"
        ) from exc


def parse(path: Path, text: str) -> dict[str, Any]:
    try:
        _require_short_keys(text)
        return tomllib.loads(text)
    except ValueError as exc:  # TOMLDecodeError is one; a number of 5000 digits gives a bare one
        at = re.search(r" \(at line (\d+), column (\d+)\)$", str(exc))
        where = f"{path}:{at[1]}" if at else str(path)
        said = str(exc)[: at.start()] + f" (column {at[2]})" if at else str(exc)
        line = text.split("\n")[int(at[1]) - 1] if at else ""
        if quotes := re.search("[\u201c\u201d\u201e\u2018\u2019\u201a\u00ab\u00bb]", line):
            said = f'{quotes[0]} is a quotation mark for print; a plain " is needed'
        text = f"{where}: not valid TOML: {escaped(said)}"
        raise ConfigError(text, remedy="mend that line; or is it another file?") from exc
    except RecursionError as exc:
        raise ConfigError(f"{path}: nested too deeply", remedy="no setting here is a list of lists") from exc


def _require_short_keys(text: str) -> None:
    """Raises: RecursionError: a dotted key of more parts than any parser of TOML should be given."""
    parts = 0
    for found in _WORDS.finditer(text):
        word = found[0]
        if word in "\n=,[]{}":
            parts = 0
        elif word[0] not in "\"'#":
            parts += word.count(".")
            if parts > KEY_PARTS_MAX:
                raise RecursionError


def validate(path: Path, text: str, raw: Mapping[str, Any], model: type[Model]) -> Model:
    try:
        return model.model_validate(raw)
    except ValidationError as exc:
        found = next((kind for kind, (_, keys, _) in _KINDS.items() if keys <= raw.keys() and text), "")
        if found and found != model.__name__ in _KINDS:
            wanted, _, give = _KINDS[model.__name__]
            whose = f", that of {escaped(str(raw['name']), 60)}, and" if found == "PeerCard" else ","
            raise ConfigError(f"{path} is a {_KINDS[found][0]}{whose} no {wanted}", remedy=give) from exc
        lines = [_explain(path, text, model, dict(e)) for e in exc.errors()[:PROBLEMS_MAX]]
        if exc.error_count() > PROBLEMS_MAX:
            lines.append(f"{path}: and {exc.error_count() - PROBLEMS_MAX} more")
        lists = {"NodeConfig": "init --help", "Plan": "federation plan"}.get(model.__name__, "")
        remedy = "mend what is named above"
        if lists and (text.strip() or str(path) == "--set"):
            remedy += f"; `hsl-node {lists}` lists all keys"
        if path.name and not text.strip() and path.is_file():
            lines, remedy = [f"{path}: the file is empty"], "is it the right one? Ask for it again"
        raise ConfigError("\n".join(lines), remedy=remedy) from exc


def _explain(path: Path, text: str, model: type[BaseModel], error: dict[str, Any]) -> str:
    keys = [str(k) for k in error["loc"]]
    line = _line_of(text, keys) or _line_of(text, keys[:-1])  # what is missing: the table it is missing from
    where = f"{path}:{line}: " if line else f"{path}: "
    return where + escaped(_problem(model, keys, error), PROBLEM_MAX_CHARS)


def _problem(model: type[BaseModel], keys: list[str], error: dict[str, Any]) -> str:
    dotted = escaped(".".join(keys))
    if error["type"] == "extra_forbidden":
        known, asked = _known_keys(model, keys[:-1]), keys[-1]
        near = [k for k in known if (len(asked) > 3 and asked in k) or k.endswith(f".{asked}")]  # epochs; a method's mu
        near = near or [k for k in known if "".join(word[0] for word in k.split("_")) == asked]  # lr
        near = near or difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        return f"unknown key '{dotted}'{hint}"
    if error["type"] == "missing":
        return f"'{dotted}' is missing"
    return f"{dotted}: {in_words(error)}" if dotted else in_words(error)


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for key in path:
        if key.isdigit():
            continue
        field = model.model_fields.get(key)
        nested = [t for t in _types_in(field.annotation)] if field else []
        if not nested:
            return []
        model = nested[0]
    known = [key for key in model.model_fields if key != "settings"]  # in a file that is the table of a method's name
    return [*known, *(of_methods() if model.__name__ == "Plan" else ())]


def _types_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _types_in(inner)


def _line_of(text: str, keys: list[str]) -> int | None:
    """The line of a key, found by following table headers; None where it can't be found."""
    index = next((int(k) for k in keys if k.isdigit()), 0)
    names = [k for k in keys if not k.isdigit()]
    table: list[str] = []
    seen = -1
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[{1,2}\s*([A-Za-z0-9_.\"-]+)\s*\]{1,2}", line)
        if header:
            table = header[1].replace('"', "").split(".")
            seen += line.lstrip().startswith("[[") and table == names[: len(table)]
            if table == names and seen in (-1, index):
                return number
        key = re.match(r"\s*([A-Za-z0-9_.\"-]+)\s*=", line)
        here = [*table, *key[1].replace('"', "").split(".")] if key else []
        if here and here == names[: len(here)] and len(names) <= len(here) + 1 and seen in (-1, index):
            return number
    return None
