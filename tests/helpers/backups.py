"""A short run to back up, what a backup file holds, and one in which something was changed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from hsl_node.federation.plan import Plan

PLAN = Plan(method="fedavg", fusion="mean", rounds=2, epochs_per_round=1, plateau_rounds=100)


def repacked(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of a backup in which `change` made each member's content; None leaves it out."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            content = old.extractfile(member)
            assert content is not None
            changed = change(member.name, content.read())
            if changed is not None:
                member.size = len(changed)
                new.addfile(member, io.BytesIO(changed))
    return target


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(m.name, content.read()) for m in tar if (content := tar.extractfile(m))]
