"""File names of the exchange: one regular expression, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsl_node.errors import PeerDataError, escaped
from hsl_node.federation.names import (
    PEER_PATTERN,
    ROUND_MAX,
    Digest,
    FileName,
    Kind,
    Peer,
    is_digest,
    parse_file_name,
    parse_peer,
)

SHA = "ab" * 32
GOOD = f"hsl1_0123abcd_r000012_mercy-north_{SHA}.safetensors"

peers = st.from_regex(PEER_PATTERN, fullmatch=True)
file_names = st.builds(
    FileName,
    fed8=st.text("0123456789abcdef", min_size=8, max_size=8),
    round=st.integers(0, ROUND_MAX),
    peer=peers,
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    kind=st.sampled_from(Kind),
    part=st.booleans(),
)


def test_a_name_says_federation_round_peer_digest_and_kind():
    name = parse_file_name(GOOD)
    assert name == FileName("0123abcd", 12, Peer("mercy-north"), Digest(SHA), Kind.DATA)
    assert str(name) == GOOD


def test_a_part_is_the_same_name_with_part_behind_it():
    part = parse_file_name(GOOD).as_part()
    assert str(part) == GOOD + ".part"
    assert parse_file_name(GOOD + ".part") == part
    assert str(part.of(Kind.RECEIPT)) == GOOD.replace("safetensors", "receipt")


@given(file_names)
def test_every_name_that_is_built_is_read_back_the_same(name):
    assert parse_file_name(str(name)) == name


@given(file_names)
def test_every_name_fits_a_file_system_and_needs_no_quoting(name):
    assert len(str(name).encode()) <= 200
    assert set(str(name)) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")


@given(st.text() | st.text(alphabet=GOOD + "/\\.\0\u202e", max_size=160))
def test_threat_01_whatever_is_accepted_is_exactly_a_name_we_would_build(text):
    try:
        name = parse_file_name(text)
    except PeerDataError as error:
        assert error.code == "name"
    else:
        assert str(name) == text


@pytest.mark.parametrize(
    "hostile",
    [
        "",
        ".",
        "..",
        "../" + GOOD,
        "/" + GOOD,
        GOOD + "/",
        "inbox/" + GOOD,
        GOOD + "\0",
        GOOD + "\n",
        "\n" + GOOD,
        GOOD + " ",
        GOOD.upper(),
        GOOD.replace("hsl1", "hsl2"),
        GOOD.replace("r000012", "r12"),
        GOOD.replace("r000012", "r0000012"),
        GOOD.replace("r000012", "r-00012"),
        GOOD.replace("r000012", "r\u0660\u0660\u0660\u0660\u0661\u0662"),  # digits of another script
        GOOD.replace("mercy", "Mercy"),
        GOOD.replace("mercy-north", "m"),
        GOOD.replace("mercy-north", "mercy_north"),
        GOOD.replace("mercy-north", "mercy-"),
        GOOD.replace("mercy-north", "-mercy"),
        GOOD.replace("mercy-north", ".."),
        GOOD.replace("mercy-north", "m\u0435rcy"),  # a Cyrillic letter
        GOOD.replace("mercy-north", "a" * 33),
        GOOD.replace(SHA, SHA[:-1]),
        GOOD.replace(SHA, SHA + "a"),
        GOOD.replace(SHA, SHA.upper()),
        GOOD.replace("safetensors", "pkl"),
        GOOD.replace(".safetensors", ""),
        GOOD + ".part.part",
        GOOD + ".tmp",
        "\u202e" + GOOD,
    ],
    ids=repr,
)
def test_threat_01_a_name_from_outside_that_differs_in_one_thing_is_refused(hostile):
    with pytest.raises(PeerDataError) as refusal:
        parse_file_name(hostile)
    assert refusal.value.code == "name"


def test_threat_01_a_refused_name_is_shown_escaped_and_short():
    with pytest.raises(PeerDataError) as refusal:
        parse_file_name("\x1b[31m\n" * 10_000)
    assert "\x1b" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("broken", [{"peer": "../x"}, {"round": ROUND_MAX + 1}, {"round": -1}, {"fed8": "xyz"}])
def test_a_bad_name_of_our_own_making_is_a_bug(broken):
    fields = {"fed8": "0123abcd", "round": 1, "peer": "ash", "sha256": SHA, "kind": Kind.DATA}
    with pytest.raises(ValueError, match="not a file name"):
        str(FileName(**{**fields, **broken}))


@pytest.mark.parametrize("name", ["ab", "a1", "mercy", "mercy-north", "st-josephs-2", "a" * 32])
def test_peer_names_are_lower_case_login_names(name):
    assert parse_peer(name) == name


@pytest.mark.parametrize(
    "name", ["", "a", "a" * 33, "Mercy", "1st", "-a", "a-", "a_b", "a b", "a.b", "ä1", "ab\n", "root/"]
)
def test_threat_01_other_peer_names_are_refused_with_an_example(name):
    with pytest.raises(ValueError, match="mercy-north"):
        parse_peer(name)


def test_a_digest_is_64_lower_case_hex_digits():
    assert is_digest(SHA)
    assert not any(is_digest(d) for d in ("", SHA[1:], SHA.upper(), SHA + "\n", "g" * 64))


# ------------------------------------------------------------------ strings from peers


@given(st.text())
def test_threat_20_escaped_strings_hold_nothing_a_terminal_would_obey(text):
    shown = escaped(text)
    assert shown.isprintable()
    assert len(shown) <= 200


def test_threat_20_escaping_keeps_plain_text_and_caps_the_rest():
    assert escaped("St. Joseph's – ward 3") == "St. Joseph's – ward 3"
    assert escaped("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert escaped("\u202eevil") == "\\u202eevil"
    assert escaped("x" * 300, limit=10) == "x" * 9 + "…"
