"""What was: round history, round show. Both read the journal, also while the daemon is down."""

from __future__ import annotations

from typing import Annotated

import typer

from hsl_node.commands.shared import RUN, Json, answer, state_of


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The rounds so far.")
    group.command(epilog="Example: hsl-node round history")(history)
    group.command(epilog="Example: hsl-node round show 7")(show)
    app.add_typer(group, name="round", rich_help_panel=RUN, no_args_is_help=True)


def history(context: typer.Context, json: Json = False) -> None:
    """One line per round.

    Duration of each phase, the loss's terms in the last epoch, bytes sent and received, AUCs, digest of the fusion.
    """
    from hsl_node.status import history as past

    rounds = past.rounds(state_of(context))
    answer(json, rounds, past.text(rounds))


def show(
    context: typer.Context, number: Annotated[int, typer.Argument(metavar="N", min=0)], json: Json = False
) -> None:
    """One round in full.

    Each peer's checkpoint, receipt and transfer; the epochs with each term of the loss.
    """
    from hsl_node.status import history as past

    found = past.round_of(state_of(context), number)
    answer(json, found, past.round_text(found))
