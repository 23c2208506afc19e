"""Can the inbox listen where node.toml says? Asked by `doctor`, and by `start` before it starts anything else."""

from __future__ import annotations

import socket

from hsl_node.config import NodeConfig, split_address
from hsl_node.errors import LocalStateError


def require_port(listen: str) -> None:
    """Bind it and let go of it again.

    Raises:
        LocalStateError: another program has it, or the address is not this machine's.
    """
    host, port = split_address(listen)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as exc:
        raise LocalStateError(
            f"{listen}: cannot listen there: {exc.strerror}",
            remedy=f"`ss -ltnp 'sport = :{port}'` shows who has the port; or set listen in node.toml",
        ) from exc


def mapping_needed(node: NodeConfig) -> str:
    """Says so where the inbox listens on another port than the one that the others are told; else empty."""
    listens, told = split_address(node.listen)[1], split_address(node.address)[1]
    if node.inbox.kind != "embedded" or listens in (0, told):
        return ""
    return (
        f"the inbox listens on port {listens}, the other hospitals connect to {told}: right only where a router, a "
        "firewall or a container maps the one to the other"
    )


MAPPING_FIX = "if nothing does, make listen and address in node.toml agree, and restart"
