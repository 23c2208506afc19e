"""Backup, restore, recover: what to do before and after a disk is lost."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from hsl_node.commands.shared import RUN, own_state_of, state_of
from hsl_node.errors import UsageError
from hsl_node.host.hints import command
from hsl_node.host.wrong_paths import require_folder


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=RUN, epilog="Example: hsl-node backup --to /srv/backups")(backup)
    app.command(rich_help_panel=RUN, epilog="Example: hsl-node restore mercy.tar")(restore)
    app.command(rich_help_panel=RUN, epilog="Example: hsl-node recover --from-peers")(recover)


def backup(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help="The file to write; it must not exist.")] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Write into this folder, named by node and time.")
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Leave the private key out; keep it elsewhere.")] = False,
) -> None:
    """Write what cannot be made anew into one file.

    Keys, settings, split ledger, journal, the last and the best models, own and fused. The daemon may run. Whoever has
    the file can act as this node, unless --no-key left the key out.
    """
    from hsl_node.admin import backup as backups
    from hsl_node.federation import node_toml
    from hsl_node.host import files
    from hsl_node.host.units import size

    state = state_of(context)
    files.require_initialised(state)
    if (file is None) == (to is None):
        raise UsageError("name one file, or a folder with --to", remedy="e.g. `hsl-node backup --to /srv/backups`")
    if to is not None:
        require_folder(to)
        if not to.exists():
            raise UsageError(f"{to}: there is no such folder", remedy=f"make it first: mkdir -p {shlex.quote(str(to))}")
        file = to / f"hsl-node-{node_toml.load_node(state).name}-{time.strftime('%Y%m%dT%H%M%S')}.tar"
    assert file is not None
    made, left_out = backups.backup(state, file.absolute(), with_key=not no_key)
    print(f"{file.absolute()}: {len(made.files)} files, {size(made.bytes)}")
    for what in left_out:
        print(f"not in it: {what}")
    if any(name.startswith("keys/") for name in made.files):
        print(
            "It holds this node's PRIVATE KEY: whoever has the file can act as this hospital. Keep it as you keep keys."
        )
    else:
        print("It holds no private key: keep the folder keys/ elsewhere. Without it the node cannot come back.")


def restore(context: typer.Context, file: Annotated[Path, typer.Argument(help="A file of `hsl-node backup`.")]) -> None:
    """Make a state directory from a backup.

    The directory must be empty or new. Before it signs anything, the restored node asks all peers what it has signed
    since: an old backup is as good as a new one while they run, except that it knows no key that was changed later.
    """
    from hsl_node.admin import backup as backups
    from hsl_node.admin.archive import KEY

    state = own_state_of(context)
    made = backups.restore(state, file)
    joined = made.federation[:8] if made.federation else "not joined"
    print(f"restored {made.node} (federation {joined}), backup of {made.written}")
    if not made.has_key:
        print(f"The backup holds no key: put it at {state / KEY}, mode 0600.")
    print(
        "Make sure that no other copy of this node runs. Then: "
        f"{command(state)} start\nIt asks its peers what it has signed, and signs nothing before all have answered."
    )


def recover(
    context: typer.Context,
    from_peers: Annotated[
        bool, typer.Option("--from-peers", help="Take from the peers what is needed to go on.")
    ] = False,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="PEER", help="Don't wait for this one; after a word with that hospital."),
    ] = None,
    documents: Annotated[
        list[Path] | None,
        typer.Option("--documents", metavar="DIR", help="What it knows of us: `verify --export` there, sent by hand."),
    ] = None,
) -> None:
    """Go on after the disk was lost, from what the peers keep.

    Needed here: keys/, node.toml, federation.toml, the anchor set (any other hospital has the same file), and, where
    keys were changed, keyring.toml or the update files (`peer update`), this node's own included. Also after a machine
    was rolled back. The next start asks all peers, fetches what they keep of this node and of themselves, and goes on
    bit for bit where the federation waits.
    """
    from hsl_node.admin.recover import prepare

    if not from_peers:
        raise UsageError("where from?", remedy="`hsl-node recover --from-peers`")
    state = state_of(context)
    asked = prepare(state, tuple(without or ()), tuple(documents or ()))
    if asked:
        print(f"The next start asks {', '.join(asked)} and signs nothing before all have answered.")
    else:
        print("The next start asks nobody: it goes on from what is here alone.")
    if without and not documents:
        names = ", ".join(without)
        print(f"Not asked: {names}. What this node signed and only {names} holds, it will sign a second time. If that")
        print(
            f"comes out otherwise than before, {names} has proof against this node, and all halt. To be sure, get the"
        )
        print("folder that hsl-node verify --export DIR makes there, and say this again with --documents DIR.")
    print(f"Make sure that no other copy of this node runs. Then: {command(state)} start")
