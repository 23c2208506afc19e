"""Run a program under a unit file's system call filter, limits and umask and without capabilities; needs no systemd.

    python confine.py UNIT PROGRAM [ARGUMENT...]

The groups of the filter are expanded by `systemd-analyze syscall-filter`, the filter is loaded with libseccomp. Mount
namespaces, device and address rules need the real service manager and are not covered. The user stays, since a checkout
may lie where only its owner can read.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
SCMP_ACT_ALLOW, SCMP_ACT_ERRNO_EPERM = 0x7FFF0000, 0x00050001


def directives(unit: Path) -> Iterator[tuple[str, str]]:
    """Each `Key=value` of a unit file, in order."""
    for line in unit.read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"(\w+)=(.*)", line)
        if found:
            yield found[1], found[2]


def allowed_calls(unit: Path) -> set[str]:
    """What is left after every SystemCallFilter= line: names add, a leading ~ takes away."""
    allowed: set[str] = set()
    for key, value in directives(unit):
        if key == "SystemCallFilter":
            named = {call for name in value.removeprefix("~").split() for call in _expand(name)}
            allowed = allowed - named if value.startswith("~") else allowed | named
    return allowed


def _expand(name: str) -> Iterator[str]:
    if not name.startswith("@"):
        yield name
        return
    shown = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    for line in shown.stdout.splitlines()[1:]:
        if line.strip() and not line.strip().startswith("#"):
            yield from _expand(line.strip())


def load_filter(allowed: set[str]) -> None:
    seccomp = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(SCMP_ACT_ERRNO_EPERM)))
    for name in sorted(allowed):
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # negative: a call of other architectures
            code = seccomp.seccomp_rule_add(context, ctypes.c_uint32(SCMP_ACT_ALLOW), number, 0)
            if code != 0:
                raise OSError(-code, f"seccomp_rule_add({name})")
    code = seccomp.seccomp_load(context)
    if code != 0:
        raise OSError(-code, "seccomp_load")


def drop_capabilities() -> None:
    """CapabilityBoundingSet= of the unit, empty: the next exec leaves even root with none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.getuid() == 0:
        capability = 0
        while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:  # until the kernel knows no such number
            capability += 1


def main(unit: Path, command: list[str]) -> None:
    wanted = dict(directives(unit))
    allowed = allowed_calls(unit)  # starts processes: before the filter
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(wanted["LimitNOFILE"]),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (int(wanted["LimitCORE"]),) * 2)
    os.umask(int(wanted["UMask"], 8))
    drop_capabilities()
    if ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError("no_new_privs")
    load_filter(allowed)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
