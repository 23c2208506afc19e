"""What the commands share: where the state is, and how their help is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

# The help's panels, in the order of a node's life.
START_HERE = "Start here"
ENROL = "Enrol"
DATA = "Images"
RUN = "Run"
RESULTS = "Results"
PANELS = (START_HERE, ENROL, DATA, RUN, RESULTS)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@dataclass(frozen=True)
class Context:
    """What the options before the command's name say."""

    state: Path


def state_of(context: typer.Context) -> Path:
    found: Context = context.obj
    return found.state


def own_state_of(context: typer.Context) -> Path:
    """To write into. Raises: UsageError: it is another user's."""
    from hsl_node.host.files import require_owner

    state = state_of(context)
    require_owner(state)
    return state
