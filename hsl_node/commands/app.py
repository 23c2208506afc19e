"""All commands as one typer application. Only what is slow to import waits until its command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hsl_node.commands import (  # fmt: skip
    bundle,
    data,
    demo,
    enrol,
    federation,
    inbox,
    key,
    node,
    peer,
    recovery,
    results,
    rounds,
    verify,
)
from hsl_node.commands.shared import PANELS
from hsl_node.host import versions
from hsl_node.host.hints import STATE_VARIABLE, SYSTEM_STATE, state_directory
from hsl_node.host.wrong_paths import require_state


class InPanels(TyperGroup):
    """Lists the commands under their panels, in plain text: rich would draw boxes, for 0.1 s of processor time."""

    def invoke(self, ctx: Any) -> Any:
        """A wrong value of an option is told in our words, as one of a file is; a word too many with what mends it."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as exc:
            cause = exc.__cause__ or exc.__context__
            if (errors := getattr(cause, "errors", None)) is not None:
                from hsl_node.federation.problems import in_words

                exc.message = in_words(errors()[0])
            raise
        except typer.TyperException as exc:
            if exc.message.startswith("Got unexpected extra argument"):
                exc.message += '\nWhat to do: leave that out; a value with spaces in it stands in quotes, "A B"'
            elif exc.message.startswith("No such option") and not getattr(exc, "possibilities", None):
                exc.message += "\nWhat to do: leave it out; a file whose name begins with - is given as ./-NAME"
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        width = max(len(name) for name, _ in commands)
        room = formatter.width - 6 - width  # as in the base class
        for panel in PANELS:
            rows = [(f"{n:{width}}", c.get_short_help_str(room)) for n, c in commands if c.rich_help_panel == panel]  # type: ignore[attr-defined]
            with formatter.section(panel):
                formatter.write_dl(rows)


app = typer.Typer(
    name="hsl-node",
    cls=InPanels,
    help="One hospital's node for HeteroSync Learning: trains on local images, exchanges checkpoints with the other "
    "hospitals over SFTP, fuses without a server. No image leaves the hospital.",
    epilog="Try it on this machine: hsl-node demo",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they print local variables, which may hold data
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(versions.this_program())
        raise typer.Exit()


@app.callback()
def root(
    context: typer.Context,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar=STATE_VARIABLE,
            readable=False,  # our own words, and exit codes, say whose it is
            show_envvar=True,
            help=f"State directory of the node. Default: {SYSTEM_STATE} or ~/.local/state/hsl-node, the first that "
            f"holds a node; else {SYSTEM_STATE} if it is there and ours.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = state_directory(state)
    require_state(context.obj)


# the order of the help
for noun in (demo, enrol, federation, peer, key, inbox, data, node, recovery, rounds, results, verify, bundle):
    noun.register(app)
