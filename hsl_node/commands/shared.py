"""What the commands share: where the state is, how their help is laid out, how they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hsl_node.host.terminal import print_json

# The help's panels, in the order of a node's life.
START_HERE = "Start here"
ENROL = "Enrol"
DATA = "Images"
RUN = "Run"
RESULTS = "Results"
PANELS = (START_HERE, ENROL, DATA, RUN, RESULTS)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def state_of(context: typer.Context) -> Path:
    state: Path = context.obj  # app.py puts it there
    return state


def own_state_of(context: typer.Context) -> Path:
    """To write into. Raises: UsageError: it is another user's."""
    from hsl_node.host.files import require_owner

    state = state_of(context)
    require_owner(state)
    return state


def answer(json: bool, value: Any, text: str) -> None:
    """Print what was found: `value` for programs, or `text` for people."""
    if json:
        print_json(value)
    else:
        print(text)
