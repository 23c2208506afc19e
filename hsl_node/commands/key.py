"""This node's own key: rotate it, write what announces it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hsl_node.commands.shared import ENROL, own_state_of
from hsl_node.host.hints import command


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="This node's own key.")
    group.command(epilog="Example: hsl-node key rotate --finish")(rotate)
    group.command(epilog="Example: hsl-node key updates")(updates)
    app.add_typer(group, name="key", rich_help_panel=ENROL, no_args_is_help=True)


def rotate(
    context: typer.Context,
    finish: Annotated[bool, typer.Option("--finish", help="All peers took the update: use the new key alone.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --finish: do not ask the peers first.")] = False,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the node's key is, if not in the state directory.")
    ] = None,
) -> None:
    """Replace this node's key while the run goes on.

    First a new key and an update file for every other peer, signed by the old key; no round is lost. With --finish
    the new key takes over and the old one is deleted. Exit code 12: a peer does not let the new key in yet.
    """
    from hsl_node.admin import rotate as change
    from hsl_node.federation import node_toml, strings

    state = own_state_of(context)
    change.require_key(state, key)
    if finish:
        live = change.finish(state, key, force=force)
        print("this node uses its new key now" if live and key is None else "start the daemon again to use the new key")
        print("tell the others: hsl-node peer update --finish " + node_toml.load_node(state).name)
        return
    begun = change.begin(state, key)
    update = begun.update
    again = f"{command(state)} key rotate --finish" + (f" --key {shlex.quote(str(key))}" if key else "")
    print(
        f"old key  {strings.fingerprint(update.old)}   goes on signing\n"
        f"new key  {strings.fingerprint(update.new)}   {strings.read_aloud(update.new)}\n\n"
        f"1. mail {begun.file} to every other peer; read the new key's line to them over the phone\n"
        f"2. each of them: hsl-node peer update {begun.file.name} --fingerprint {strings.fingerprint(update.new)}\n"
        f"3. here: {again}\n"
        f"4. each of them: hsl-node peer update --finish {update.peer}\n"
        "5. everybody: a new backup; an older one does not know the new key"
    )


def updates(context: typer.Context) -> None:
    """Write this node's update files again, one for each change of its key.

    For a peer that missed one, or lost it. It takes them in their order; read it each new key's line over the phone.
    """
    from hsl_node.admin import rotate as change
    from hsl_node.federation import strings

    state = own_state_of(context)
    written = change.updates(state)
    if not written:
        print("this node's key was never changed in this federation")
    for update, file in written:
        print(f"{file}\n  new key  {strings.fingerprint(update.new)}   {strings.read_aloud(update.new)}")
