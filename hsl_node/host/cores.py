"""How many processor cores this process may use: by its affinity, and by its container's or unit's quota."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
HIERARCHY = Path("/sys/fs/cgroup")


def available_cores(membership: Path = MEMBERSHIP, hierarchy: Path = HIERARCHY) -> int:
    """At least 1. A quota of two and a half cores gives 2: threads that wait for each other are as slow as the one that
    the kernel holds back.

    Quotas are those of `docker --cpus`, Kubernetes limits and systemd's CPUQuota: control groups, version 2 (cpu.max)
    and 1 (cpu.cfs_quota_us), of this group and of all above it. Elsewhere than on Linux there are none.
    """
    allowed = len(os.sched_getaffinity(0))
    return max(1, min([allowed, *(int(quota) for quota in _quotas(membership, hierarchy))]))


def _quotas(membership: Path, hierarchy: Path) -> list[float]:
    """In cores. A container sees its own group as the root, whatever path its membership names: each is looked for."""
    found: list[float] = []
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = hierarchy / controllers
            folder = top / path.strip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(top):
                    found += _v1(group) if controllers else _v2(group)
    return found


def _v2(group: Path) -> list[float]:
    with suppress(OSError, ValueError):  # no such group here, or "max": no quota
        quota, period = (group / "cpu.max").read_text().split()
        return [int(quota) / int(period)]
    return []


def _v1(group: Path) -> list[float]:
    with suppress(OSError, ValueError):
        quota, period = (int((group / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
        return [quota / period] if quota > 0 else []  # -1: none
    return []
