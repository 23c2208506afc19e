"""What is wrong with a value, in our words: a sentence for each kind of problem that a model of ours can find. Pure.

The library's own words ("valid tuple", "after validation", "match pattern") are for programmers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hsl_node.errors import escaped

SHA256 = r"^[0-9a-f]{64}$"
PATTERNS = {  # what a text has to look like
    SHA256: "64 digits 0-9 and a-f, as sha256sum prints them",
    r"^(auto|cpu|cuda(:\d+)?)$": '"auto", "cpu", "cuda" or "cuda:0"',
    r"^[A-Za-z0-9._/{}-]*$": "a folder's name of letters, digits and . _ - / { }",
}
_EXPECTED = {  # what a value has to be
    "string_type": "a text in quotes",
    "path_type": "a path in quotes",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number that is finite",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": 'a list, as ["a", "b"]',
    "list_type": 'a list, as ["a", "b"]',
    "dict_type": 'a table, as { key = "value" }',
    "mapping_type": 'a table, as { key = "value" }',
    "model_type": "a table of settings",
    "model_attributes_type": "a table of settings",
    "invalid_key": "a key that is a word",
}
_BOUNDS = {  # ctx key -> words
    "greater_than": ("gt", "more than {}"),
    "greater_than_equal": ("ge", "{} or more"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "{} or less"),
    "string_too_long": ("max_length", "{} characters or fewer"),
    "string_too_short": ("min_length", "{} characters or more"),
    "too_short": ("min_length", "{} or more of them"),
    "too_long": ("max_length", "{} or fewer of them"),
}
KINDS = {*_EXPECTED, *_BOUNDS, "missing", "extra_forbidden", "value_error", "literal_error", "string_pattern_mismatch"}


def in_words(error: Mapping[str, Any]) -> str:
    """One error of a model, as pydantic's `errors()` lists it; without the key."""
    kind, context = str(error["type"]), error.get("ctx", {})
    if kind == "value_error":
        return str(context.get("error", error["msg"]))  # ours
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is not known here"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{_given(error)}needs {words.format(context[name])}"
    if kind == "literal_error":
        return f"{_given(error)}one of {context['expected']} is expected"
    if kind == "string_pattern_mismatch":
        return f"{_given(error)}expected is {PATTERNS.get(str(context['pattern']), 'another form')}"
    return f"{_given(error)}{_EXPECTED.get(kind, 'another value')} is expected"


def _given(error: Mapping[str, Any]) -> str:
    value = error.get("input")
    if isinstance(value, list | tuple | dict):
        return f"{len(value)} given, "
    return f"{escaped(repr(value), 60)} given, "
