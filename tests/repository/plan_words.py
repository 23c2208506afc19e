"""The sentences of `hsl-node federation plan`, from the table of docs/researcher/plan.md. `make docs` writes them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ROOT / "hsl_node" / "federation" / "plan_keys.py"


def rows() -> list[tuple[str, str, str]]:
    """Key, default, meaning of each setting, without marks and links."""
    page = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", (ROOT / "docs/researcher/plan.md").read_text())
    found = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    return [(key, default.replace("`", ""), text.replace("`", "")) for key, default, text in found]


def written() -> str:
    lines = ["MEANING = {"]
    for key, _, text in rows():
        parts = textwrap.wrap(text, 100, drop_whitespace=False)
        lines += [f'    "{key}": (', *(f"        {part!r}" for part in parts), "    ),"]
    return "\n".join([*lines, "}"])


if __name__ == "__main__":
    CODE.write_text(
        re.sub(r"^MEANING = \{.*?^\}", lambda _: written(), CODE.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
