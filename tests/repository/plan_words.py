"""The sentences of `hsl-node federation plan`, from the table of docs/researcher/plan.md; there the methods' settings,
from their cards. `make docs` writes both."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from hsl_node.federation import plan_keys
from hsl_node.federation.methods import CARDS, of_methods

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/researcher/plan.md"
HEAD = "| setting of a method | default | values | means |"
CODE = ROOT / "hsl_node" / "federation" / "plan_keys.py"


def rows() -> list[tuple[str, str, str]]:
    """Key, default, meaning of each setting, without marks and links."""
    page = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", PAGE.read_text())
    found = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    return [
        (key, default.replace("`", ""), text.replace("`", ""))
        for key, default, text in found
        if key.partition(".")[0] not in CARDS  # written from the cards
    ]


def methods_table() -> str:
    """The settings of all methods, as docs/researcher/plan.md lists them."""
    lines = [HEAD, "|---|---|---|---|"]
    for key, setting in of_methods().items():
        default = plan_keys.word(setting.default)
        shown = f'"{default}"' if isinstance(setting.default, str) else default
        values = setting.values.replace("|", "or")
        lines.append(f"| `{key}` | `{shown}` | {values} | {setting.does} |")
    return "\n".join(lines)


def page_with_methods() -> str:
    return re.sub(
        rf"^{re.escape(HEAD)}\n(\|.*\n)*", lambda _: methods_table() + "\n", PAGE.read_text(), flags=re.MULTILINE
    )


def written() -> str:
    lines = ["MEANING = {"]
    for key, _, text in rows():
        parts = textwrap.wrap(text, 100, drop_whitespace=False)
        lines += [f'    "{key}": (', *(f"        {part!r}" for part in parts), "    ),"]
    return "\n".join([*lines, "}"])


if __name__ == "__main__":
    PAGE.write_text(page_with_methods())
    CODE.write_text(
        re.sub(r"^MEANING = \{.*?^\}", lambda _: written(), CODE.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
