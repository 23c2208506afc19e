"""What hostile inputs found, one test each: the smallest input, and what became of it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from federations import make_federation

from hsl_node.errors import ConfigError
from hsl_node.federation.config import CARD_MAX_BYTES, Federation, card_text, federation_text, load_card
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.federation.plan import load_plan
from hsl_node.federation.toml_file import FILE_MAX_BYTES, PROBLEM_MAX_CHARS, PROBLEMS_MAX, read_toml

MEMBERS = make_federation(2)
MINUTE = pytest.mark.timeout(60)  # a bound for what would take hours; it takes two seconds


def written(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, model: type[Federation] | type[NodeConfig] = Federation) -> str:
    with pytest.raises(ConfigError) as caught:
        read_toml(path, model)
    return caught.value.message


def test_a_number_of_5000_digits_in_a_card_is_refused(tmp_path: Path) -> None:
    """Python reads no such number and says so with a bare ValueError."""
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_card(written(tmp_path, f"name = {'9' * 5000}\n"))
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_plan(written(tmp_path, f"rounds = {'9' * 5000}\n"))


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000], ids=["digits", "brackets"])
def test_a_setting_on_the_command_line_that_no_parser_takes_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="rounds"):
        load_plan(None, [f"rounds={value}"])


@MINUTE
def test_a_file_of_unknown_keys_is_refused_with_the_first_of_them_and_their_number(tmp_path: Path) -> None:
    """Each was looked for in the whole file: 15 s of processor time for 31 KB, four times that for 62."""
    count = 50_000
    message = refusal(written(tmp_path, "".join(f"k{n} = 1\n" for n in range(count))))
    lines = message.splitlines()
    assert len(lines) == PROBLEMS_MAX + 1
    assert ":1: unknown key 'k0'" in message
    assert f"{count + 2 - PROBLEMS_MAX} more" in lines[-1]  # name and peer are missing, too


@MINUTE
@pytest.mark.parametrize(
    "text",
    ["{} = 1", "[{}]", "x = {{ {} = 1 }}", "[[{}]]"],
    ids=["key", "table", "inline table", "array of tables"],
)
@pytest.mark.parametrize("part", ["a", '"a"', "'a'", " a "], ids=["bare", "quoted", "literal", "spaced"])
def test_a_dotted_key_of_100_000_parts_is_refused_before_it_costs_anything(
    tmp_path: Path, text: str, part: str
) -> None:
    """The standard library's reader needs time with the square of the parts: 10 s for 64 KB."""
    assert "nested too deeply" in refusal(written(tmp_path, text.format(".".join([part] * 100_000))))


def test_dots_in_texts_and_comments_are_no_parts_of_a_key(tmp_path: Path) -> None:
    dots = "." * 200
    text = f"# {dots}\n" + federation_text(MEMBERS.federation).replace('"primary task"', f'"a {dots[:100]} b"')
    assert read_toml(written(tmp_path, text), Federation).plan.task == f"a {dots[:100]} b"
    names = ", ".join(f'"{n}.png"' for n in range(500))
    node = read_toml(written(tmp_path, f'name = "ash"\naddress = "a.b:1"\n[data]\nexclude = [{names}]\n'), NodeConfig)
    assert len(node.data.exclude) == 500


@MINUTE
@pytest.mark.parametrize("text", ['"', "'", '"""', "'''", "#"])
@pytest.mark.parametrize("inside", ['\\"', "\\\\", '""a', "''a", "\\\n", '"', "'", "a", "."], ids=repr)
def test_a_text_without_end_is_read_once(tmp_path: Path, text: str, inside: str) -> None:
    """Each of its quotes began the text anew: 23 s for a file of 64 KiB, so two hours for this one."""
    count = (FILE_MAX_BYTES - 10) // len(inside)
    refusal(written(tmp_path, f"a = {text}{inside * count}\n"))


@MINUTE
@pytest.mark.parametrize(
    "text",
    [
        '"""x" y"""',
        '"""x""y"""',
        '"""x"""""',
        '"""\\"""""',
        "'''x' y'''",
        "'''x'''''",
        '"\\""',
        "'\"'",
        '"""\n"\n"""',
        '""',
    ],
)
def test_no_quotes_hide_a_dotted_key_behind_them(tmp_path: Path, text: str) -> None:
    """What the counting of its parts takes for text must be text for the parser too."""
    tomllib.loads(f"x = {{ y = {text}, a.b.c = 1 }}")
    assert "nested too deeply" in refusal(written(tmp_path, f"x = {{ y = {text}, {'.'.join(['a'] * 100_000)} = 1 }}"))


def test_dots_in_a_text_of_many_lines_are_no_parts_of_a_key(tmp_path: Path) -> None:
    text = federation_text(MEMBERS.federation).replace('"primary task"', f'"""{"." * 90} "quoted\\\n " end"""')
    assert read_toml(written(tmp_path, text), Federation).plan.task == f'{"." * 90} "quoted" end'


@pytest.mark.parametrize(
    ("read", "max_bytes"), [(load_card, CARD_MAX_BYTES), (lambda path: read_toml(path, Federation), FILE_MAX_BYTES)]
)
def test_a_file_larger_than_any_right_one_is_not_read(
    tmp_path: Path, read: Callable[[Path], object], max_bytes: int
) -> None:
    path = written(tmp_path, "a = 1\n")
    for size in (max_bytes + 1, 1 << 40):
        with path.open("r+b") as file:
            file.truncate(size)  # sparse
        with pytest.raises(ConfigError, match=f"larger than {max_bytes // 1024} KiB"):
            read(path)


def test_a_card_of_everything_a_card_may_hold_is_small_enough(tmp_path: Path) -> None:
    card = MEMBERS.federation.peer[0]
    full = card.model_copy(
        update={"host_key": card.key, "user": "\U0001f332" * 64, "root": "r" * 200, "name": "a" * 32}
    )
    assert load_card(written(tmp_path, card_text(full))) == full


@pytest.mark.parametrize(
    "text", ['"\\u001b[31mred" = 1\n', "{} = 1\n".format("k" * 100_000), 'name = "{}"\n'.format("n" * 200_000)]
)
def test_what_stands_in_a_message_is_short_and_shows_no_control_characters(tmp_path: Path, text: str) -> None:
    message = refusal(written(tmp_path, text))
    assert all(len(line) <= len(str(tmp_path)) + 20 + PROBLEM_MAX_CHARS for line in message.splitlines())
    assert all(c.isprintable() or c == "\n" for c in message)
