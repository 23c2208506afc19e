"""The daemon: start, stop, status, pause, resume, logs, doctor, version."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hsl_node.commands.shared import RUN, START_HERE, Json, answer, state_of
from hsl_node.errors import ConfigError, NotRunning, UsageError
from hsl_node.host.hints import addressed
from hsl_node.host.terminal import wants_colour

STOP_WAIT_S = 180.0  # TimeoutStopSec= of the unit


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=RUN, epilog="Example: hsl-node start")(start)
    app.command(rich_help_panel=RUN, epilog="Example: hsl-node stop")(stop)
    app.command(rich_help_panel=RUN, epilog="Example: hsl-node status --watch")(status)
    app.command(rich_help_panel=RUN, epilog="Example: hsl-node pause")(pause)
    app.command(rich_help_panel=RUN, epilog="Example: hsl-node resume")(resume)
    app.command(rich_help_panel=RUN, epilog="Example: hsl-node logs -n 50 --follow")(logs)
    app.command(rich_help_panel=START_HERE, epilog="Example: hsl-node doctor")(doctor)
    app.command(rich_help_panel=START_HERE, epilog="Example: hsl-node version --json")(version)


def start(
    context: typer.Context,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Run the daemon, in the foreground.

    Until `hsl-node stop`, SIGTERM or Ctrl-C. The systemd unit calls this.
    """
    from hsl_node.host import event_log, files
    from hsl_node.node import launch

    state = state_of(context)
    if log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise UsageError(f"no log level {log_level!r}", remedy="DEBUG, INFO, WARNING or ERROR")
    try:
        files.require_owner(state)
    except UsageError as exc:  # no later start by this user goes better: a service stays down
        raise ConfigError(exc.message, remedy=exc.remedy) from exc
    files.require_initialised(state)
    event_log.setup(state, log_level.upper())
    raise typer.Exit(launch.run(state))


def stop(
    context: typer.Context,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Return only when the daemon has left, or at once.")
    ] = True,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to wait until giving up with exit code 16.")
    ] = STOP_WAIT_S,
) -> None:
    """Ask the daemon to save and leave, and wait until it has.

    Nothing is lost: the next start goes on where this one ended.
    """
    from hsl_node.host import control, files

    state = state_of(context)
    try:
        if wait:
            control.stop(state, timeout)
            print("stopped: the daemon has left")
        else:
            control.ask(state, "stop")
            print("stopping: the daemon was asked to leave")
    except NotRunning as exc:
        if not files.is_initialised(state):
            raise
        raise NotRunning(exc.message, remedy="there is nothing to stop; `hsl-node status` says how it ended") from exc


def status(
    context: typer.Context,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Draw it again every second; Ctrl-C leaves.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="One line for a monitor. Exit: 0 well, 1 needs a person, 2 broken, 3 down."),
    ] = False,
) -> None:
    """What the node does, whom it waits for, what is wrong.

    With the daemon down: what the journal knows, and exit code 3.
    """
    from hsl_node.commands.status import look, show

    state = state_of(context)
    if json + watch + check > 1:
        raise UsageError("--json, --watch and --check are three ways to look", remedy="take one of them")
    if watch:
        if not sys.stdout.isatty():
            raise UsageError("--watch needs a terminal", remedy="in a script use `hsl-node status --json`")
        from hsl_node.status.watch import watch as draw

        draw(state, look())
    raise typer.Exit(show(state, json=json, check=check))


def pause(context: typer.Context) -> None:
    """Stop training, go on receiving.

    The running epoch is begun again by `hsl-node resume`. The other hospitals wait for this node meanwhile.
    """
    from hsl_node.host.control import ask

    state = state_of(context)
    told = ask(state, "pause")
    if not told["changed"] and told.get("over"):
        print(f"the run is {told['phase']}: nothing trains here, so there is nothing to pause")
        return
    word = "paused" if told["changed"] else "it is paused already"
    ended = told["phase"] in ("finished", "halted")
    what = "the last fused model is not validated" if ended else "the other hospitals wait for this node"
    print(addressed(f"{word}: {what} until `hsl-node resume`", state))


def resume(context: typer.Context) -> None:
    """Train again after `hsl-node pause`."""
    from hsl_node.host.control import ask

    print("resumed" if ask(state_of(context), "resume")["changed"] else "it was not paused; nothing was changed")


def logs(
    context: typer.Context,
    count: Annotated[int, typer.Option("-n", min=0, help="How many of the last events.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they happen; Ctrl-C leaves.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per line, as in the file.")] = False,
) -> None:
    """The daemon's events.

    From STATE/log/hsl-node.log. With systemd, `journalctl -u hsl-node` has them too.
    """
    from json import dumps

    from hsl_node.host import event_log

    state = state_of(context)

    def show(event: dict[str, object]) -> None:
        print(dumps(event) if json else event_log.human(event), flush=follow)

    for event in event_log.tail(state, count):
        show(event)
    if follow:
        for event in event_log.follow(state):
            show(event)


def doctor(context: typer.Context, json: Json = False) -> None:
    """Check everything this node needs.

    Owners of its files, settings, key, federation, journal, anchor set, images, disk, port, torch and GPU, and a login
    at every peer. Exit code: that of the first check that failed.
    """
    from hsl_node.admin import doctor

    checks = doctor.examine(state_of(context))
    answer(json, [vars(check) for check in checks], doctor.text(checks, colour=wants_colour()))
    raise typer.Exit(doctor.exit_code(checks))


def version(json: Json = False) -> None:
    """Versions of this program and of what results depend on."""
    from hsl_node.host.versions import versions

    found = versions()
    answer(json, found, "\n".join(f"{name:12}  {value}" for name, value in found.items()))
