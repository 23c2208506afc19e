"""docs/researcher/methods.md is what the cards and the methods' files say now."""

from __future__ import annotations

import pytest
from methods_page import PAGE, page, told

from hsl_node.federation.methods import CARDS


def test_the_methods_page_is_as_the_cards_are() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs"


@pytest.mark.parametrize("name", CARDS)
def test_each_methods_file_says_how_true_it_is_to_what_was_published(name: str) -> None:
    words = {"exact": "Exact", "adapted": "Adapted", "assumed": "Assumed"}
    text = told(CARDS[name])
    assert text and (CARDS[name].simulation_only or words[CARDS[name].faith].lower() in text.lower())


def test_a_data_protection_officer_reads_of_each_method_that_sends_more_than_weights_what_it_tells() -> None:
    _, _, told_there = (PAGE.parents[1] / "security.md").read_text(encoding="utf-8").partition("sends beside weights\n")
    rows = {line.split("`")[1] for line in told_there.partition("\n## ")[0].splitlines() if line.startswith("| `")}
    assert rows <= CARDS.keys()
    says_more = {name for name, card in CARDS.items() if (card.says or card.beside) and not card.simulation_only}
    assert says_more <= rows, "numbers, or more than weights in its checkpoints"
