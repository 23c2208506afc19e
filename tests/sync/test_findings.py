"""What a list says against what is known here, case by case; of any list, what a finding may name at most."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.sync.findings import (
    differing,
    forgotten,
    givers_of_document,
    givers_of_file,
    lacking,
    newer_of_mine,
    unread,
)
from hsl_node.sync.offer import Listed, Offer

ASH, BIRCH, CEDAR = Peer("ash"), Peer("birch"), Peer("cedar")
A, B, C = "a" * 64, "b" * 64, "c" * 64


def listed(peer: str, round: int, document: str = A) -> Listed:
    return Listed(peer=peer, round=round, sha256="0" * 64, document=document)


def offer(
    *manifests: Listed, round: int = 5, recovering: bool = False, peer: Peer = BIRCH, files: Sequence[str] = ()
) -> Offer:
    return Offer(
        federation="f" * 64, peer=peer, asker=ASH, nonce="0" * 16, recovering=recovering, round=round, phase="collect",
        twice=False, manifests=list(manifests), files=list(files),
    )  # fmt: skip


LISTS = st.builds(
    lambda manifests, round, recovering: offer(*manifests, round=round, recovering=recovering),
    st.lists(
        st.builds(listed, st.sampled_from((ASH, BIRCH, CEDAR, "nobody")), st.integers(0, 9), st.sampled_from((A, B, C)))
    ),
    st.integers(0, 9),
    st.booleans(),
)
ROUNDS = st.integers(0, 9).map(Round)
DOCUMENTS = st.sets(st.sampled_from((A, B, C)))


@pytest.mark.parametrize(
    ("last_signed", "rounds"), [(None, [6, 7, 7]), (Round(0), [6, 7, 7]), (Round(6), [7, 7]), (Round(7), [])]
)
def test_a_signature_of_mine_is_newer_where_its_round_is_above_the_last_that_i_know(
    last_signed: Round | None, rounds: list[int]
) -> None:
    """Not the opening statement, which may be corrected, and nobody else's."""
    one = offer(listed(ASH, 6), listed(BIRCH, 8), listed(ASH, 7), listed(ASH, 7, B), listed(ASH, 0))
    assert [m.round for m in newer_of_mine(one, ASH, last_signed)] == rounds


@given(LISTS, st.none() | ROUNDS)
def test_of_any_list_all_and_only_mine_above_the_last_are_newer(one: Offer, last: Round | None) -> None:
    newer = newer_of_mine(one, ASH, last)
    assert all(m.peer == ASH and m.round > (last or 0) for m in newer)
    assert all(m.peer != ASH or m.round <= (last or 0) for m in one.manifests if m not in newer)


@given(LISTS, ROUNDS, st.sets(st.sampled_from((ASH, BIRCH, CEDAR))))
def test_lacking_is_what_is_waited_for_of_this_round_and_listed(one: Offer, round: Round, missing: set[Peer]) -> None:
    found = lacking(one, round, missing)
    assert {m.peer for m in found} == {m.peer for m in one.manifests if m.round == round} & missing
    assert {m.round for m in found} <= {round}


def test_two_of_one_peer_and_round_are_both_lacking_in_the_lists_order() -> None:
    one = offer(listed(CEDAR, 5, B), listed(CEDAR, 4), listed(CEDAR, 5, A), listed(ASH, 5))
    assert lacking(one, Round(5), (CEDAR,)) == [listed(CEDAR, 5, B), listed(CEDAR, 5, A)]


@given(LISTS, DOCUMENTS)
def test_unread_is_every_document_of_a_member_that_is_not_known(one: Offer, known: set[str]) -> None:
    found = unread(one, known, (ASH, BIRCH, CEDAR))
    assert not {m.document for m in found} & known and "nobody" not in {m.peer for m in found}
    assert all(m.document in known or m.peer == "nobody" for m in one.manifests if m not in found)


def test_what_differs_is_of_a_round_and_peer_of_which_another_document_is_here() -> None:
    """What is disputed comes first, then the newest; what is not here at all does not differ."""
    ours = {(Round(r), p): A for r, p in ((3, ASH), (4, CEDAR), (5, CEDAR), (6, CEDAR))}
    one = offer(
        listed(ASH, 3, B), listed(CEDAR, 4, B), listed(CEDAR, 5, A), listed(CEDAR, 6, C), listed(CEDAR, 7, C)
    )  # fmt: skip
    assert [(m.round, m.peer) for m in differing(one, ours, {(Round(4), CEDAR)})] == [(4, CEDAR), (6, CEDAR), (3, ASH)]
    assert [m.round for m in differing(one, ours)] == [6, 4, 3]


@given(LISTS)
def test_a_list_of_nothing_but_ours_differs_in_nothing(one: Offer) -> None:
    first = {(Round(m.round), Peer(m.peer)): m.document for m in one.manifests}
    same = one.model_copy(
        update={"manifests": [m for m in one.manifests if first[Round(m.round), Peer(m.peer)] == m.document]}
    )
    assert differing(same, first) == [] and differing(one, {}) == []
    assert {m.document for m in differing(one, dict.fromkeys(first, "d" * 64))} == {m.document for m in one.manifests}


@pytest.mark.parametrize(
    ("one", "acknowledged", "lost"),
    [
        (offer(), {4, 5, 6, 7}, {5, 6}),
        (offer(listed(ASH, 5)), {5, 6}, {6}),
        (offer(listed(CEDAR, 5), listed(CEDAR, 6)), {5, 6}, {5, 6}),
        (offer(listed(ASH, 5), listed(ASH, 6)), {5, 6}, set()),
        (offer(), set(), set()),
        (offer(recovering=True), {5, 6}, set()),
    ],
)
def test_forgotten_is_what_it_acknowledged_and_needs_and_does_not_list(
    one: Offer, acknowledged: set[Round], lost: set[int]
) -> None:
    """It is in round 5: older rounds it has fused, and needs no more."""
    assert forgotten(one, ASH, acknowledged) == lost


def test_givers_are_all_that_list_it_and_a_file_is_no_document() -> None:
    offers = {
        str(peer): offer(*documents, peer=peer, files=files)
        for peer, documents, files in (
            (CEDAR, [listed(ASH, 3, A), listed(ASH, 4, A)], [B]),
            (ASH, [listed(CEDAR, 3, B)], [A, B]),
            (BIRCH, [listed(ASH, 3, A)], []),
        )
    }
    assert givers_of_document(A, offers) == [BIRCH, CEDAR] and givers_of_document(C, offers) == []
    assert givers_of_file(Digest(B), offers) == [ASH, CEDAR] and givers_of_file(Digest(C), offers) == []
