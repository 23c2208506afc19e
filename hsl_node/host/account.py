"""A process whose user has no account (a container's `--user`, OpenShift) and no HOME. Loads fast.

asyncssh asks for the local user's name and home at every connection, torch and matplotlib for the latter, and none of
them goes on without an answer. The environment answers before anybody looks up an account.
"""

from __future__ import annotations

import os

NO_HOME = "/nonexistent"  # what Debian gives to users that have none


def need_none() -> None:
    """From here on no library needs an account of this user, also in the processes that this one starts."""
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        os.environ["LOGNAME"] = f"uid{os.geteuid()}"
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)
        home = os.path.expanduser("~")
        os.environ["HOME"] = home if home != "~" else NO_HOME
