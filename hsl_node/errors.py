"""Every error hsl-node raises on purpose. Each knows its remedy and its exit code. Pure.

HslError                      1   something we name, with what to do now
├─ UsageError                 2   the command line asks for something impossible
├─ NotRunning                 3   the daemon of this state directory is not running
├─ NotInitialised            10   `hsl-node init` has not been run here
├─ AlreadyRunning            11   another daemon holds this state directory
├─ KeyRefused                12   a key is not the pinned one, or a peer refused ours
├─ TransportError            13   a peer cannot be reached or the link broke: a retry may help
├─ PeerDataError             14   what a peer sent fails a check: their file, kept in quarantine
│  └─ Equivocation           14   one peer signed two different checkpoints for one round
├─ LocalStateError           15   our own disk, journal, quota or port: may be right at the next try
│  ├─ Altered                15   a file here is gone, or no longer what it was when it was checked
│  └─ DiskFailed             15   an fsync or the journal failed: never tried again, the process ends
├─ WaitTimeout               16   a wait with a limit ran out
├─ FederationMismatch        17   peers run different plans, anchors, models or fused weights
├─ ConfigError               78   the operator's files: node.toml, federation.toml, data, anchor
│  ├─ DataError              78   the hospital's images or their table
│  │  └─ DataUnavailable     15   nothing to be seen there at all: a share that is not mounted (yet)
│  └─ Diverged               78   training, or a model, gives no finite numbers; the daemon stays up
├─ TrainerError               1   the trainer process failed; it is restarted with back-off
└─ UnexpectedEvent            1   a bug in the round machine; carries the last events
"""

from __future__ import annotations


class HslError(Exception):
    """Base of all our errors: who and what in the message, what to do now in `remedy`."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  What to do: {self.remedy}" if self.remedy else self.message


class UsageError(HslError):
    exit_code = 2


class NotRunning(HslError):
    exit_code = 3


class NotInitialised(HslError):
    exit_code = 10


class AlreadyRunning(HslError):
    exit_code = 11


class KeyRefused(HslError):
    exit_code = 12


class TransportError(HslError):
    exit_code = 13


class PeerDataError(HslError):
    """A check on a peer's file failed.

    `code` is the short, stable word that travels back in the receipt and counts in the metrics.
    """

    exit_code = 14

    def __init__(self, message: str, *, code: str, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


class Equivocation(PeerDataError):
    """Two signed, different statements of one peer about one round: proof, kept in `evidence/`."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message, code="equivocation", remedy=remedy)


class LocalStateError(HslError):
    exit_code = 15


class Altered(LocalStateError):
    """Found before anything was made of it. A daemon marks the journal, so that its next start asks (`damage.py`)."""

    def __init__(self, message: str, *, remedy: str = "") -> None:  # `remedy`: the trainer's, over its pipe
        self_heals = "start it again, where systemd does not: it fetches the right bytes from its peers and goes on; "
        super().__init__(message, remedy=remedy or self_heals + "then look at disk and memory of this machine")


class DiskFailed(LocalStateError):
    """Bytes may be lost that were thought safe: nothing but a restart from the journal is honest."""


class WaitTimeout(HslError):
    exit_code = 16


class FederationMismatch(HslError):
    exit_code = 17


class ConfigError(HslError):
    exit_code = 78


class DataError(ConfigError):
    pass


class DataUnavailable(DataError):
    exit_code = 15


class Diverged(ConfigError):
    pass


class TrainerError(HslError):
    exit_code = 1


class UnexpectedEvent(HslError):
    exit_code = 1


def escaped(text: str, limit: int = 200) -> str:
    """A string from a peer, made safe for logs and terminals: control characters escaped, length capped.

    >>> escaped("a\\x1b[31m\\nb")
    'a\\\\x1b[31m\\\\nb'
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
