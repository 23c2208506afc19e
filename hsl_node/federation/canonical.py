"""One spelling for each value: what is hashed and signed. Pure."""

from __future__ import annotations

import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def signed_line(content: Any) -> bytes:
    """The line that a signature stands under."""
    return canonical_json(content) + b"\n"
