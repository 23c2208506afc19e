"""Enrolment of this node: init and card."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsl_node.commands.shared import ENROL, Json, own_state_of, state_of
from hsl_node.errors import ConfigError, DataError, UsageError
from hsl_node.host.hints import command
from hsl_node.host.layout import Layout
from hsl_node.host.terminal import print_json

if TYPE_CHECKING:
    from hsl_node.admin.first_look import Answers

KEYS = (
    "name, address, listen, anchor, client, data.path, data.filter, data.columns, data.labels, data.exclude, "
    "data.window_center, data.window_width, train.device, train.gpus, train.threads, train.micro_batch, "
    "train.backbone_weights, train.generator, inbox.kind, inbox.directory, inbox.quota_mib"
)


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel=ENROL,
        epilog="Example: hsl-node init --name mercy --address hsl.mercy.example.org:8922 --data /srv/images",
        help="Make state directory, key, node.toml and the peer card.\n\n"
        f"node.toml explains each of its keys: {KEYS}. A second init changes nothing.",
    )(init)
    app.command(rich_help_panel=ENROL, epilog="Example: hsl-node card > mercy.card")(card)


def init(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="Name in the federation: lower-case letters, digits and '-'.")],
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the other hospitals reach this node.")],
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the inbox listens. Default: the port of --address.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Images: a folder, a table, or an .npz file.")
    ] = None,
) -> None:
    from hsl_node.admin import enrol
    from hsl_node.federation import config

    state = own_state_of(context)
    try:
        asked = _asked(state, data)
        made = enrol.init(
            state, name=name, address=address, listen=listen, data=data, columns=asked.columns, labels=asked.labels
        )
    except ConfigError as exc:  # no file says so, but the command line
        raise UsageError(exc.message, remedy=exc.remedy) from exc
    print(config.card_text(made), end="")
    us, classes = command(state), shlex.quote(",".join(asked.classes)) if asked.classes else "negative,positive"
    words = "" if asked.classes else " with your own classes in the federation's order"
    if data is not None and not data.exists():
        print(f"\nWarning: there is nothing at {data.absolute()} yet: no images to train on.", file=sys.stderr)
    print(
        f"\nMade {state}. Next:\n"
        f"  1. mail {Layout(state).card(made.name)} (the lines above) to whoever makes the federation,\n"
        f"     and read the last line to them over the phone\n"
        f"  2. look through {Layout(state).node_toml}, then{words}:\n"
        f"     {us} data check --classes {classes}\n"
        f"  3. when federation.toml comes back: {us} federation join federation.toml",
        file=sys.stderr,
    )


def _asked(state: Path, data: Path | None) -> Answers:
    """At a terminal what the images are; in a script, and where nothing is to be looked at, nothing."""
    from hsl_node.admin.first_look import Answers, ask
    from hsl_node.host.files import is_initialised

    if data is None or not data.exists() or is_initialised(state) or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return Answers()

    def answer(question: str) -> str:
        print(question, end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.rstrip("\n")

    try:
        return ask(data, lambda text: print(text, file=sys.stderr), answer)
    except EOFError:
        print("\nNot answered: columns and labels stay as they are; node.toml holds them.", file=sys.stderr)
        return Answers()
    except DataError as exc:
        print(f"{exc.message}: columns and labels are not asked for. `data check` says more.", file=sys.stderr)
        return Answers()


def card(
    context: typer.Context,
    host_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Where the inbox is an existing SFTP server: its ssh-ed25519 host key."),
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="There: the login name of a sender; {sender} stands for its peer name.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="There: the folder that holds parts/, inbox/ and receipts/.")] = None,
    json: Json = False,
) -> None:
    """Print this node's peer card again. It holds no secret."""
    from hsl_node.admin import enrol
    from hsl_node.federation import config, strings

    found = enrol.card_of(state_of(context), host_key=host_key, user=user, root=root)
    if json:
        print_json(
            {
                **found.model_dump(mode="json"),
                "fingerprint": found.fingerprint,
                "read_aloud": strings.read_aloud(found.key),
            }
        )
    else:
        print(config.card_text(found), end="")
