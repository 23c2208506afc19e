"""demo: a federation of real daemons on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsl_node.commands.shared import START_HERE


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=START_HERE,
        epilog="Example: hsl-node demo --data busbra/images.csv --group-by scanner --anchor chest_xray",
    )(demo)


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where it is made; an earlier demo there is replaced.")
    ] = Path("hsl-demo"),
    hospitals: Annotated[
        int, typer.Option(min=2, max=8, help="How many; with --group-by as many as there are groups.")
    ] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to train.")] = 3,
    data: Annotated[Path | None, typer.Option(metavar="PATH", help="Real images instead of synthetic ones.")] = None,
    group_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of that table: a hospital per value.")
    ] = None,
    anchor: Annotated[
        Path | None, typer.Option(metavar="PATH", help="With --data: the anchor set's images or file.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=16, help="Pixels.")] = None,
) -> None:
    """Train a small federation on this machine.

    Real daemons, real SFTP; synthetic ultrasound-like images unless --data is given. Takes about 3 minutes.
    """
    from hsl_node import demo

    raise typer.Exit(
        demo.run(
            out, hospitals=hospitals, rounds=rounds, data=data, group_by=group_by, anchor=anchor, image_size=image_size
        )
    )
