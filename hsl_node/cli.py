"""The command line: parse, call, exit code. The commands are in commands/, a file per noun.

`status`, which a monitoring system asks for every minute, is answered without loading the parser in its plain forms:
typer, and pydantic with it, takes longer than the answer. Every other form is parsed.

Exit codes: errors.py. `Error: ...` and `What to do: ...` on stderr; a bug shows its plain traceback.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hsl_node.errors import HslError, UsageError, escaped
from hsl_node.host import bare_host, wrong_paths
from hsl_node.host.hints import addressed, state_directory

LINE_MAX_CHARS = 10_000  # of an error; the longest that we write lists a few dozen file names


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Always ends in SystemExit."""
    bare_host.complete()
    states, rest = _states_apart(list(sys.argv[1:] if arguments is None else arguments))
    state = state_directory(Path(states[-1]) if states else None)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may be no text, or none that this terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if rest[-1:] == ["--state"] and "--" not in rest:
            raise UsageError("--state needs a folder after it", remedy="e.g. --state /var/lib/hsl-node")
        if (asked := plain_status(rest)) is not None:
            wrong_paths.require_state(state)
            from hsl_node.commands.status import show

            sys.exit(show(state, **asked))
        from hsl_node.commands.app import app

        app([*(word for given in states for word in ("--state", given)), *rest], prog_name="hsl-node")
    except HslError as exc:
        sys.exit(_explain(exc, state))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # who read our output has left: `hsl-node status | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains on leaving
        sys.exit(1)
    except OSError as exc:
        if exc.errno not in wrong_paths.OF_THE_DISK and not _of_an_argument(exc, [str(state), *rest]):
            raise  # a bug of ours
        sys.exit(_explain(wrong_paths.explained(exc, state), state))


def plain_status(words: Sequence[str]) -> dict[str, bool] | None:
    """The options of a `status` that needs no parser; None: it does. A test compares both ways for every form."""
    match words:
        case ["status"]:
            return {"json": False}
        case ["status", "--json"]:
            return {"json": True}
        case ["status", "--check"]:
            return {"check": True}
        case _:
            return None


def _of_an_argument(error: OSError, words: Sequence[str]) -> bool:
    """Is it about a path that a person gave, or one beside or below it?"""
    if error.errno not in wrong_paths.OF_THE_PATH or not isinstance(error.filename, str):
        return False
    folders = [Path(error.filename).absolute(), *Path(error.filename).absolute().parents]
    return any(Path(given).absolute().parent in folders for word in words if (given := word.rpartition("=")[2]))


def _explain(error: HslError, state: Path) -> int:
    print(f"Error: {_lines(error.message)}", file=sys.stderr)
    if error.remedy:
        print(f"What to do: {_lines(addressed(error.remedy, state))}", file=sys.stderr)
    return error.exit_code


def _lines(text: str) -> str:
    """A message may quote what somebody else wrote, and have several lines."""
    return "\n".join(escaped(line, LINE_MAX_CHARS) for line in text.split("\n"))


def _states_apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The values of `--state`, and all other words: it may stand before or after the command, people write both."""
    states: list[str] = []
    rest: list[str] = []
    while arguments:
        word = arguments.pop(0)
        if word == "--":
            return states, [*rest, word, *arguments]
        if word == "--state" and arguments:
            states.append(arguments.pop(0))
        elif word.startswith("--state="):
            states.append(word.removeprefix("--state="))
        else:
            rest.append(word)
    return states, rest


if __name__ == "__main__":
    main()
