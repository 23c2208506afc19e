"""inbox provision: an existing SFTP server as this node's inbox."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hsl_node.commands.shared import ENROL, state_of


class Server(StrEnum):
    OPENSSH = "openssh"
    SFTPGO = "sftpgo"


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="An existing OpenSSH or SFTPGo server as this node's inbox.")
    group.callback()(_group)
    group.command(epilog="Example: hsl-node inbox provision --for openssh --homes /srv/hsl > inbox.sh")(provision)
    app.add_typer(group, name="inbox", rich_help_panel=ENROL, no_args_is_help=True)


def _group() -> None:
    pass  # keeps `provision` a command of the group while it is the only one


def provision(
    context: typer.Context,
    server: Annotated[Server, typer.Option("--for", help="Which server.")],
    homes: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the senders' homes.")] = Path("/srv/hsl"),
) -> None:
    """Print a shell script that makes the other peers' accounts and folders.

    Nothing is changed: read it, then run it as root.
    """
    from hsl_node.admin import provision as script
    from hsl_node.federation import config, keyring, node_toml
    from hsl_node.train.site import checkpoint_bytes

    state = state_of(context)
    node = node_toml.load_node(state)
    ring = keyring.load(state, config.load_federation(state))
    print(script.provision(ring, node.name, server.value, homes, checkpoint_bytes(ring.federation.plan)))
