"""The command line: parse, call, exit code. Each noun's commands are in commands/; nothing slow is imported here.

Exit codes: errors.py. `Error: ...` and `What to do: ...` on stderr; a bug shows its plain traceback.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hsl_node.commands import data, demo, enrol, federation, inbox, node, peer, results, rounds
from hsl_node.commands.shared import SYSTEM_STATE, Context, default_state
from hsl_node.errors import HslError, LocalStateError

OPERATORS_ERRNO = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # not bugs of ours

app = typer.Typer(
    name="hsl-node",
    help="One hospital's node for HeteroSync Learning: trains on local images, exchanges checkpoints with the other "
    "hospitals over SFTP, fuses without a server. No image leaves the hospital.",
    epilog="Try it on this machine: hsl-node demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, which may hold data
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    context: typer.Context,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="HSL_NODE_STATE",
            show_envvar=True,
            help=f"State directory of the node. Default: {SYSTEM_STATE} if it is ours, else ~/.local/state/hsl-node.",
        ),
    ] = None,
) -> None:
    context.obj = Context(state=(state or default_state()).absolute())


for noun in (demo, enrol, federation, peer, inbox, data, node, rounds, results):  # the order of the help
    noun.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Always ends in SystemExit."""
    try:
        app(_state_first(list(sys.argv[1:] if arguments is None else arguments)), prog_name="hsl-node")
    except HslError as exc:
        sys.exit(_explain(exc))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as exc:
        if exc.errno not in OPERATORS_ERRNO:
            raise
        where = f"{exc.filename}: " if exc.filename else ""
        remedy = "check the disk, and that this user may read and write there (`hsl-node doctor`)"
        sys.exit(_explain(LocalStateError(f"{where}{exc.strerror}", remedy=remedy)))


def _explain(error: HslError) -> int:
    print(f"Error: {error.message}", file=sys.stderr)
    if error.remedy:
        print(f"What to do: {error.remedy}", file=sys.stderr)
    return error.exit_code


def _state_first(arguments: list[str]) -> list[str]:
    """`hsl-node status --state DIR` means `hsl-node --state DIR status`: people write both."""
    front: list[str] = []
    rest: list[str] = []
    while arguments:
        word = arguments.pop(0)
        if word == "--":
            return [*front, *rest, word, *arguments]
        if word == "--state" and arguments:
            front += [word, arguments.pop(0)]
        elif word.startswith("--state="):
            front.append(word)
        else:
            rest.append(word)
    return front + rest


if __name__ == "__main__":
    main()
