"""deploy/example: federation.toml of its plan.toml, and the inbox scripts of that. `make docs` writes them."""

from __future__ import annotations

from pathlib import Path

from hsl_node.admin.provision import provision
from hsl_node.federation.config import Federation, federation_text
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.plan import load_plan
from hsl_node.federation.toml_file import read_toml
from hsl_node.train.site import checkpoint_bytes

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "example"
HOMES = Path("/srv/hsl")


def written() -> dict[str, str]:
    """File name -> its text."""
    federation = read_toml(EXAMPLE / "federation.toml", Federation)
    federation = federation.model_copy(update={"plan": load_plan(EXAMPLE / "plan.toml")})
    ring, size = Keyring.of(federation), checkpoint_bytes(federation.plan)
    return {
        "federation.toml": federation_text(federation),
        "openssh-inbox.sh": provision(ring, "harbour", "openssh", HOMES, size) + "\n",
        "sftpgo-inbox.sh": provision(ring, "harbour", "sftpgo", HOMES, size) + "\n",
    }


if __name__ == "__main__":
    for name, text in written().items():
        (EXAMPLE / name).write_text(text, encoding="utf-8")
