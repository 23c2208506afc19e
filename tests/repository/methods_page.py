"""docs/researcher/methods.md, below its mark: every method, from its card and its file. `make docs` writes it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from hsl_node.federation.methods import CARDS, Card, Need
from hsl_node.federation.plan import Plan
from hsl_node.results.method import from_preset

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "researcher" / "methods.md"
MARK = "<!-- from here on written by `make docs` from the cards and the methods' files -->\n"


def page() -> str:
    kept, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark, "the mark is missing"
    return kept + mark + "\n" + "\n".join([*_table(), "", *(line for card in CARDS.values() for line in _entry(card))])


def told(card: Card) -> str:
    """The docstring of the file that the card's code is in."""
    source = ROOT.joinpath(*card.code.partition(":")[0].split(".")).with_suffix(".py")
    return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""


def _table() -> Iterator[str]:
    yield "| method | here | fusion | all tensors travel | says | needs | own settings |"
    yield "|---|---|---|---|---|---|---|"
    for card in CARDS.values():
        needs = [str(need) for need in Need if need in card.needs and need != Need.LABELS]
        needs += [f"`optimizer = {card.optimizer}`"] * bool(card.optimizer)
        cells = [
            f"[{card.name}](#{card.name})",
            "in simulations only" if card.simulation_only else card.faith + " by `preset`" * bool(card.presets),
            "" if card.simulation_only else f"`{card.fusion}`",
            "no" if card.private else "yes",
            ", ".join(said.name for said in card.says),
            ", ".join(needs),
            ", ".join(f"`{key}`" for key in card.settings),
        ]
        yield "| " + " | ".join(cells) + " |"


def _entry(card: Card) -> Iterator[str]:
    yield from (f"### {card.name}", "", f"{card.title[:1].upper()}{card.title[1:]}: {card.compared}.")
    if card.simulation_only:
        yield f"In simulations only: {card.simulation_only}."
    if card.cite:
        yield f"Cite: {card.cite}."
    if card.differs:
        yield f"Other than published: {card.differs}."
    if card.presets:
        usual = "; ".join(from_preset(Plan(method=card.name)))
        yield f'Unless the plan has `{card.name}.preset = "published"`: {usual}.'
    yield from ("", "```text", told(card), "```", "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
