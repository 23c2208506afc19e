"""What a process may lack on a bare host: an account, a HOME, open standard streams. Loads fast."""

from __future__ import annotations

import os
import sys

NO_HOME = "/nonexistent"  # what Debian gives to users that have none


def complete() -> None:
    """From here on nobody needs more than there is, also in the processes that this one starts. To be called first.

    asyncssh asks for the local user's name and home at every connection, torch and matplotlib for the latter, and none
    of them goes on without an answer: a container's `--user` and OpenShift have none. The environment answers before
    anybody looks up an account. Where a standard stream is closed (`2>&-`), the next file or socket that is opened gets
    its number, and every word meant for people goes into it.
    """
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        os.environ["LOGNAME"] = f"uid{os.geteuid()}"
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)
        home = os.path.expanduser("~")
        os.environ["HOME"] = home if home != "~" else NO_HOME
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
