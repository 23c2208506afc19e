"""The other hospitals: list them, ping them, cut one off, take its new key."""

from __future__ import annotations

from typing import Annotated

import typer

from hsl_node.commands.shared import ENROL, Json, answer, own_state_of, state_of
from hsl_node.errors import UsageError
from hsl_node.host.hints import command
from hsl_node.host.terminal import print_json
from hsl_node.host.units import table


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The other hospitals' nodes.")
    group.command("list", epilog="Example: hsl-node peer list")(list_peers)
    group.command(epilog="Example: hsl-node peer ping mercy")(ping)
    group.command(epilog="Example: hsl-node peer revoke mercy")(revoke)
    group.command(epilog="Example: hsl-node peer update mercy_1.update")(update)
    app.add_typer(group, name="peer", rich_help_panel=ENROL, no_args_is_help=True)


def list_peers(context: typer.Context, json: Json = False) -> None:
    """Name, address and fingerprint of every peer of the federation.

    Also which keys are revoked or being changed.
    """
    from hsl_node.federation import config, keyring, node_toml, strings

    state = state_of(context)
    federation, me = config.load_federation(state), node_toml.load_node(state).name
    ring = keyring.load(state, federation)
    if json:
        print_json(
            [
                {
                    **p.model_dump(mode="json"),
                    "fingerprint": strings.fingerprint(ring.newest(p.name)),
                    "me": p.name == me,
                    "revoked": ring.is_revoked(p.name),
                    "keys": [{"key": k, "fingerprint": strings.fingerprint(k)} for k in ring.keys(p.name)],
                }
                for p in federation.peer
            ]
        )
        return
    rows = []
    for p in federation.peer:
        name, newest = p.name + (" (this node)" if p.name == me else ""), strings.fingerprint(ring.newest(p.name))
        rows.append((name, p.address, newest, "revoked" if ring.is_revoked(p.name) else ""))
        rows += [("", "", strings.fingerprint(key), "until the change is finished") for key in ring.keys(p.name)[1:]]
    marked = any(row[3] for row in rows)
    print(table(("peer", "address", "fingerprint", "")[: 4 if marked else 3], [r[: 4 if marked else 3] for r in rows]))


def ping(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[PEER]...", help="Default: all others.")] = None,
    json: Json = False,
) -> None:
    """Log in at a peer's inbox and out again.

    Shows that its address, its key and ours are right.

    Exit code 12: a key is refused. 13: not reachable.
    """
    from hsl_node.admin import ping

    answers = ping.ping(state_of(context), names or [])
    answer(json, [vars(a) for a in answers], "\n".join(ping.text(a) for a in answers))
    raise typer.Exit(max((a.exit_code for a in answers), default=0))


def revoke(
    context: typer.Context,
    peer: Annotated[str, typer.Argument(help="Whom to cut off.")],
    undo: Annotated[bool, typer.Option("--undo", help="Take it back; needs --fingerprint.")] = False,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256:...",
            help="With --undo: the key's, as that hospital reads it aloud; either form, in quotes.",
        ),
    ] = None,
) -> None:
    """Cut a peer off: a stolen key, a hospital that left.

    Its sessions end within a second, its keys are refused from then on, also after a restart. The run waits for it:
    what to do about that is printed.
    """
    from hsl_node.admin import keys
    from hsl_node.federation.names import Peer

    state = own_state_of(context)
    if undo:
        live = keys.pardon(state, peer, fingerprint).live
        print(f"{peer} may log in again" + ("" if live else " from the next start on"))
    elif fingerprint is not None:
        raise UsageError("--fingerprint belongs to --undo", remedy="see `hsl-node peer revoke --help`")
    else:
        print("\n".join(keys.consequences(state, Peer(peer), keys.revoke(state, peer))))


def update(
    context: typer.Context,
    card: Annotated[str, typer.Argument(help="The update file; with --finish the peer's name.")],
    fingerprint: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256:...", help="The new key's, as that hospital reads it aloud; either form, in quotes."
        ),
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="The change is over: the old key counts no more.")] = False,
) -> None:
    """Take a peer's new key, announced by `hsl-node key rotate` there.

    Shows both fingerprints; nothing changes until the new one is given, as SHA256:... or as "0123 4567 89ab cdef
    0123". Then both keys count until --finish, which needs that hospital's daemon once the run is over.
    """
    from pathlib import Path

    from hsl_node.admin import rotate
    from hsl_node.federation import strings

    state = own_state_of(context)
    if finish:
        live = rotate.end(state, card).live
        print(f"the old key of {card} is refused " + ("now" if live else "from the next start on"))
        return
    found = rotate.read_update(state, Path(card))
    print(f"{found.peer}: signed by  {strings.fingerprint(found.old)}")
    print(f"{'':{len(found.peer)}}  new key    {strings.fingerprint(found.new)}   {strings.read_aloud(found.new)}")
    live = rotate.take(state, Path(card), fingerprint).live
    print(
        "both count "
        + ("now" if live else "from the next start on")
        + f", until: {command(state)} peer update --finish {found.peer}"
    )
