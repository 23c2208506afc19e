"""The other hospitals: list them, ping them."""

from __future__ import annotations

from typing import Annotated

import typer

from hsl_node.commands.shared import ENROL, Json, print_json, state_of
from hsl_node.units import table


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The other hospitals' nodes.")
    group.command("list", epilog="Example: hsl-node peer list")(list_peers)
    group.command(epilog="Example: hsl-node peer ping mercy")(ping)
    app.add_typer(group, name="peer", rich_help_panel=ENROL, no_args_is_help=True)


def list_peers(context: typer.Context, json: Json = False) -> None:
    """Name, address and fingerprint of every peer of the federation."""
    from hsl_node import config

    state = state_of(context)
    federation, me = config.load_federation(state), config.load_node(state).name
    if json:
        print_json(
            [{**p.model_dump(mode="json"), "fingerprint": p.fingerprint, "me": p.name == me} for p in federation.peer]
        )
        return
    rows = [(p.name + (" (this node)" if p.name == me else ""), p.address, p.fingerprint) for p in federation.peer]
    print(table(("peer", "address", "fingerprint"), rows))


def ping(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[PEER]...", help="Default: all others.")] = None,
    json: Json = False,
) -> None:
    """Log in at a peer's inbox and out again.

    Shows that its address, its key and ours are right.

    Exit code 12: a key is refused. 13: not reachable.
    """
    from hsl_node import ping

    answers = ping.ping(state_of(context), names or [])
    if json:
        print_json([vars(a) for a in answers])
    else:
        print("\n".join(ping.text(answer) for answer in answers))
    raise typer.Exit(max((a.exit_code for a in answers), default=0))
