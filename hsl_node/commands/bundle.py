"""support-bundle: what somebody who helps needs to see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsl_node.commands.shared import START_HERE, state_of


def register(app: typer.Typer) -> None:
    app.command("support-bundle", rich_help_panel=START_HERE, epilog="Example: hsl-node support-bundle --list")(bundle)


def bundle(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")] = Path("hsl-support.tar.gz"),
    listed: Annotated[bool, typer.Option("--list", help="Print all that would be in it; write nothing.")] = False,
) -> None:
    """Pack versions, settings, status and log for whoever helps.

    No keys, images, weights, paths, file names, table columns or addresses: only what is on a list of harmless fields.
    Look through it with --list before you send it.
    """
    from hsl_node.admin import support_bundle as packing
    from hsl_node.host.files import require_initialised, require_new

    state = state_of(context)
    require_initialised(state)
    if not listed:
        require_new(out)
    files = packing.collect(state)
    if listed:
        for name, content in files.items():
            print(f"==> {name} ({len(content)} bytes)\n{content.decode()}")
        return
    packing.write(files, out)
    print(f"wrote {out}: {', '.join(files)}; `tar -xOf {out} | less` shows all of it")
