"""The report: one file, nothing from elsewhere, no string unescaped, and what the journals say."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from federations import FederationOf, Members
from trained_state import evaluation, make_state

from hsl_node.errors import NotInitialised, UsageError
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout
from hsl_node.results import report
from hsl_node.results.facts import agreement, read
from hsl_node.sync.store.journal import Journal

HOSTILE = "<script>alert('x')</script>&\"'"


VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(scope="module")
def members(federation_of: FederationOf) -> Members:
    return federation_of(3, plan=Plan(method="fedavg", rounds=2, classes=("no", "yes")))


class Page(HTMLParser):
    """Reads a page and fails on a tag that is closed in the wrong order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "  # cells touch each other in the source

    def squeezed(self) -> str:
        return " ".join(self.text.split())


def test_page_of_a_federation_parses_and_needs_nothing_from_elsewhere(tmp_path: Path, members: Members) -> None:
    states = [make_state(tmp_path, members, p, record=evaluation(0.9, 0.8)) for p in members.peers]
    page = Page(report.build(states, tmp_path / "report.html"))
    assert page.tags["svg"] == 7  # AUC and ROC of three hospitals, one timeline
    assert not re.search(r"https?:|//\w|@import|\bsrc=", page.source)
    assert not {"script", "link", "img", "iframe", "object"} & page.tags.keys()
    references = [v for k, v in page.attributes if k in ("href", "src", "data", "action")]
    assert all(r.startswith("#") for r in references)
    assert all(u.startswith("#") for u in re.findall(r"url\(([^)]*)\)", page.source))


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path: Path, members: Members) -> None:
    states = [make_state(tmp_path, members, p, record=evaluation(0.9, 0.8)) for p in members.peers]
    page = Page(report.build(states, tmp_path / "report.html"))
    ids = [v for k, v in page.attributes if k == "id"]
    used = {v.removeprefix("#") for k, v in page.attributes if k == "href"}
    used |= set(re.findall(r"url\(#([^)]*)\)", page.source))
    assert len(ids) == len(set(ids))
    assert used  # markers and clips are drawn by reference
    assert used <= set(ids)


def test_figures_take_every_colour_from_the_page(tmp_path: Path, members: Members) -> None:
    """A fixed colour would vanish in the dark, or on paper."""
    state = make_state(tmp_path, members, "ash", record=evaluation(0.9, 0.8))
    source = report.build([state], tmp_path / "report.html").read_text()
    svgs = re.findall(r"<svg.*?</svg>", source, flags=re.S)
    assert len(svgs) == 5  # AUC of three hospitals, the own ROC, the timeline
    used = {c for svg in svgs for c in re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)}
    assert {c for c in used if c != "none" and not c.startswith("var(--")} == set()
    assert {"var(--local)", "var(--fused)", "var(--alone)", "var(--phase-train)"} <= used
    defined = set(re.findall(r"(--[\w-]+):", source))
    assert {re.sub(r"var\((.*)\)", r"\1", c) for c in used if c != "none"} <= defined


def test_threat_20_hostile_strings_arrive_as_text(tmp_path: Path, federation_of: FederationOf) -> None:
    """Whoever writes the federation's name, a manifest's software or a refusal's reason writes no markup here."""
    plan = Plan(method="fedavg", rounds=2, task=HOSTILE, classes=(HOSTILE, "yes"))
    members = federation_of(2, plan=plan, name=HOSTILE)
    record = evaluation(None, 0.8, classes=(HOSTILE, "yes"))
    state = make_state(tmp_path, members, "ash", record=record, software=HOSTILE, halted=HOSTILE)
    with Journal.create(Layout(state).journal) as journal:
        journal.note("warning", HOSTILE, HOSTILE)
    page = Page(report.build([state], tmp_path / "report.html", note=HOSTILE))
    assert page.tags["script"] == 0
    assert "<script" not in page.source
    assert page.text.count(HOSTILE) >= 8  # title, heading, task, classes, software, note, reason, refusal


def test_undefined_auc_is_said_and_explained_never_a_number(tmp_path: Path, members: Members) -> None:
    state = make_state(tmp_path, members, "birch", record=evaluation(None, None))
    page = Page(report.build([state], tmp_path / "report.html"))
    rows = re.search(r"Test results.*?Validation AUC", page.squeezed())
    assert rows is not None
    assert rows[0].count("undefined") == 6  # AUC and AUPRC of both models, the sentence and the explanation
    assert "birch: undefined: the test set holds no image of class no" in page.squeezed()


def test_test_figures_confusions_and_counts_are_those_of_the_journal(tmp_path: Path, members: Members) -> None:
    state = make_state(tmp_path, members, "ash", record=evaluation(0.9, 0.8))
    text = Page(report.build([state], tmp_path / "report.html")).squeezed()
    assert "ash 30 10 trained alone 0.800" in text
    assert "fused, round 2 0.900" in text
    assert "5 of no, 5 of yes; at least 10 of each class are needed" in text
    assert "no 4 80 % 1 20 % yes 1 20 % 4 80 %" in text


def test_transfers_are_added_up_per_pair(tmp_path: Path, members: Members) -> None:
    """Two checkpoints of 1 MB in half a second each; round 2 needed one retry; 4096 and 8192 bytes were sent twice."""
    state = make_state(tmp_path, members, "ash")
    text = Page(report.build([state], tmp_path / "report.html")).squeezed()
    assert "ash birch 2 2.0 MB 1.00 2.0 1 12.3 kB" in text


def test_page_of_one_node_compares_the_peers_by_their_signed_manifests(tmp_path: Path, members: Members) -> None:
    state = make_state(tmp_path, members, "ash", claims={"cedar": "c" * 64})
    first, second = agreement([read(state)])
    assert first.agree
    assert first.digests == {"ash": "1" * 64, "birch": "1" * 64, "cedar": "1" * 64}
    assert not second.agree
    assert second.text == f"ash {'2' * 12}, birch {'2' * 12}, cedar {'c' * 12}"
    page = Page(report.build([state], tmp_path / "report.html"))
    assert "DIFFER" in page.text
    assert "they differ" in page.text


def test_of_the_manifests_a_report_reads_what_it_tells_round_by_round(
    tmp_path: Path, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds a digest of every peer's: all of them, of 64 peers and 1,000 rounds, were a gigabyte."""
    state, queries, opened = make_state(tmp_path, members, "ash"), [], Journal.read_only

    def traced(path: Path) -> Journal:
        journal = opened(path)
        journal._db.set_trace_callback(queries.append)
        return journal

    monkeypatch.setattr(Journal, "read_only", traced)
    facts = read(state)
    assert [(m.round, m.peer) for m in facts.manifests] == [(r, p) for r in (1, 2, 3) for p in members.peers]
    documents = [q for q in queries if "FROM manifests" in q and "DISTINCT" not in q]
    assert len(documents) == 3 and all("json_extract" in q and "WHERE round = " in q for q in documents)


def test_journals_that_hold_different_fused_models_disagree_whatever_manifests_say(
    tmp_path: Path, members: Members
) -> None:
    states = [make_state(tmp_path, members, "ash"), make_state(tmp_path, members, "birch", fused=("1" * 64, "9" * 64))]
    agreed = agreement([read(s) for s in states])
    assert [a.agree for a in agreed] == [True, False]


def test_halted_run_says_so_with_the_reason(tmp_path: Path, members: Members) -> None:
    state = make_state(tmp_path, members, "ash", halted="cedar fused other checkpoints")
    text = Page(report.build([state], tmp_path / "report.html")).squeezed()
    assert "halted after 2 rounds: cedar fused other checkpoints" in text


def test_threat_19_page_names_no_path_of_this_machine(tmp_path: Path, members: Members) -> None:
    state = make_state(tmp_path, members, "ash", record=evaluation(0.9, 0.8))
    source = report.build([state], tmp_path / "report.html").read_text()
    assert str(tmp_path) not in source
    assert members.federation.get("birch").address not in source


def test_node_without_evaluation_says_how_to_make_one(tmp_path: Path, members: Members) -> None:
    text = Page(report.build([make_state(tmp_path, members, "ash")], tmp_path / "report.html")).squeezed()
    assert "Not evaluated yet: hsl-node evaluate" in text


def test_nodes_of_two_federations_make_no_page(tmp_path: Path, members: Members, federation_of: FederationOf) -> None:
    other = federation_of(3, plan=Plan(method="fedavg", rounds=5))
    states = [make_state(tmp_path / "a", members, "ash"), make_state(tmp_path / "b", other, "birch")]
    with pytest.raises(UsageError, match="different federations"):
        report.build(states, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_state_without_a_journal_is_named_as_that(tmp_path: Path, members: Members) -> None:
    state = make_state(tmp_path, members, "ash")
    (state / "journal.sqlite3").unlink()
    with pytest.raises(NotInitialised):
        report.build([state], tmp_path / "report.html")
