"""demo: a federation of real daemons on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsl_node.commands.shared import START_HERE


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=START_HERE,
        epilog="Example: hsl-node demo --data busbra --group-by device --anchor cxr_pneumonia",
    )(demo)


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where it is made; an earlier demo there is replaced.")
    ] = Path("hsl-demo"),
    hospitals: Annotated[
        int, typer.Option(min=2, max=8, help="How many; with --group-by as many as there are groups.")
    ] = 3,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Real images instead: a table (.csv), or the folder it is in.")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of that table: a hospital per value.")
    ] = None,
    anchor: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The anchor set's images or file. Default: digits, a stand-in.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to train.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs a round.")] = None,
    image_size: Annotated[int | None, typer.Option(min=16, help="Pixels.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="tiny, resnet18, efficientnet_lite0 or another that a plan may name.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Images in a batch.")] = None,
    method: Annotated[str | None, typer.Option(help="hsl, or another that `federation plan` lists.")] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Another setting of the plan, as in `federation create`."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the phantoms, the splits and the initial weights.")] = 1,
) -> None:
    """Train a small federation on this machine.

    Real daemons, real SFTP on the loopback; synthetic ultrasound-like images unless --data is given. About 3 minutes;
    with real images and a large backbone hours.
    """
    from hsl_node.demo import demo

    raise typer.Exit(
        demo.run(
            out,
            hospitals=hospitals,
            data=data,
            group_by=group_by,
            anchor=anchor,
            seed=seed,
            plan={
                "rounds": rounds,
                "epochs_per_round": epochs,
                "image_size": image_size,
                "backbone": backbone,
                "batch_size": batch_size,
                "method": method,
            },
            more=set or (),
        )
    )
