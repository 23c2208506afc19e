"""A file that is nowhere on the disk, for what an inbox server offers."""

from __future__ import annotations

import os


def in_memory(content: bytes) -> int:
    descriptor = os.memfd_create("offer")
    os.write(descriptor, content)
    return descriptor
