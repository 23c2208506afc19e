"""Enrolment through the real command line: key, settings, card, federation; a refusal leaves things as they were."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from command_line import federation_file, made, run
from faulty_disk import Fsync, Name, Recorder
from pydantic import BaseModel

from hsl_node.admin import enrol
from hsl_node.commands.federation import _text
from hsl_node.errors import ConfigError, FederationMismatch, HslError, LocalStateError, UsageError
from hsl_node.federation import config, identity, keyring, node_toml, strings, toml_file
from hsl_node.federation.config import Federation
from hsl_node.federation.methods import CARDS
from hsl_node.federation.names import Digest, Peer
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.federation.plan import Plan
from hsl_node.host import durable, files
from hsl_node.host.layout import Layout
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.store import Store
from hsl_node.train.data import anchor


@pytest.fixture
def ash(tmp_path: Path) -> Path:
    return made(tmp_path / "ash")


@pytest.fixture
def birch(tmp_path: Path) -> Path:
    return made(tmp_path / "birch", "birch", 9002)


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


# ------------------------------------------------------------------ init


def test_init_makes_a_private_state_with_a_private_key(ash: Path) -> None:
    assert ash.stat().st_mode & 0o777 == 0o700
    assert Layout(ash).key.stat().st_mode & 0o777 == 0o600
    assert (ash / "node.toml").stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in (ash / "keys").iterdir()) == ["node_ed25519"]


def test_init_prints_the_card_on_stdout_and_what_to_do_next_on_stderr(tmp_path: Path) -> None:
    done = run("--state", tmp_path / "ash", "init", "--name", "ash", "--address", "ash.example.org:8922")
    card = tmp_path / "ash.card"
    card.write_text(done.stdout)
    loaded = config.load_card(card)
    assert (loaded.name, loaded.address) == ("ash", "ash.example.org:8922")
    assert loaded.key == identity.load(Layout(tmp_path / "ash").key).public
    assert strings.read_aloud(loaded.key) in done.stdout
    assert "federation join" in done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_init_warns_of_images_that_are_not_there_and_goes_on(tmp_path: Path, there: bool) -> None:
    images = tmp_path / "images"
    if there:
        images.mkdir()
    options = ("--name", "ash", "--address", "127.0.0.1:9001", "--data", images)
    done = run("--state", tmp_path / "ash", "init", *options)
    assert done.exit_code == 0 and node_toml.load_node(tmp_path / "ash").data.path == images
    assert (f"Warning: there is nothing at {images} yet" in done.stderr) is not there


def test_a_name_that_is_refused_is_told_what_is_allowed(tmp_path: Path) -> None:
    done = run("--state", tmp_path / "s", "init", "--name", "St. Mary", "--address", "127.0.0.1:9001")
    assert isinstance(done.exception, UsageError)
    assert "'St. Mary' is not a peer name: use 2 to 32 lower-case letters, digits and \"-\"" in done.exception.message


def test_card_prints_the_same_card_again(ash: Path) -> None:
    assert run("--state", ash, "card").stdout == (ash / "ash.card").read_text()


def test_a_card_for_an_existing_server_names_its_host_key_and_login(ash: Path, birch: Path, tmp_path: Path) -> None:
    host_key = identity.load(Layout(birch).key).public
    done = run("--state", ash, "card", "--host-key", host_key, "--user", "hsl-{sender}", "--root", "in/{sender}")
    (tmp_path / "c").write_text(done.stdout)
    card = config.load_card(tmp_path / "c")
    assert (card.host_key, card.user, card.root) == (host_key, "hsl-{sender}", "in/{sender}")


def test_the_new_node_toml_loads_and_holds_what_was_given(tmp_path: Path) -> None:
    images = tmp_path / 'im"ages\\x'
    enrol.init(tmp_path / "s", name="ash", address="[2001:db8::1]:9001", listen="127.0.0.1:9100", data=images)
    node = node_toml.load_node(tmp_path / "s")
    assert (node.name, node.address, node.listen) == ("ash", "[2001:db8::1]:9001", "127.0.0.1:9100")
    assert node.data.path == images
    assert node == NodeConfig(
        name="ash", address="[2001:db8::1]:9001", listen="127.0.0.1:9100", data=node_toml.DataConfig(path=images)
    )


def test_node_toml_shows_every_key_and_each_line_is_valid_when_its_mark_is_removed(ash: Path) -> None:
    text = re.sub(r"^# (?=[a-z_]+ = )", "", (ash / "node.toml").read_text(), flags=re.MULTILINE)
    (ash / "node.toml").write_text(text)
    node_toml.load_node(ash)
    shown = set(flat(tomllib.loads(text)))
    assert shown == set(keys_of(NodeConfig)), "a key of NodeConfig is not explained in node.toml"


def test_node_toml_shows_the_true_defaults(ash: Path) -> None:
    before = node_toml.load_node(ash)
    pattern = r"^# (?=(client|device|gpus|threads|micro_batch|kind|quota_mib) = )"
    text, count = re.subn(pattern, "", (ash / "node.toml").read_text(), flags=re.MULTILINE)
    (ash / "node.toml").write_text(text)
    assert count == 7 and node_toml.load_node(ash) == before


def flat(value: dict[str, object], prefix: str = "") -> Iterator[str]:
    known = set(keys_of(NodeConfig))
    for key, inner in value.items():
        if prefix + key in known:
            yield prefix + key
        elif isinstance(inner, dict):
            yield from flat(inner, f"{prefix}{key}.")


@pytest.mark.parametrize("model", [NodeConfig, Plan])
def test_the_help_lists_every_key_that_an_error_message_sends_people_to(model: type[BaseModel]) -> None:
    from hsl_node.commands import enrol as enrolment
    from hsl_node.federation.plan_keys import MEANING

    listed = enrolment.KEYS if model is NodeConfig else ", ".join([*MEANING, "settings"])
    assert sorted(listed.split(", ")) == sorted(keys_of(model))


def test_images_under_a_name_that_node_toml_cannot_hold_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller"))
    with pytest.raises(ConfigError, match=r"M\\udcfcller' cannot stand in node.toml"):
        enrol.init(tmp_path / "s", name="ash", address="127.0.0.1:9001", listen=None, data=data)
    assert not (tmp_path / "s").exists()


def test_threat_23_the_name_of_a_new_state_directory_is_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a power loss takes all of it away: also the key, whose card may be on its way to the others."""
    disk = Recorder(tmp_path)
    monkeypatch.setattr(durable, "disk", disk)
    made(tmp_path / "ash")
    disk.close()
    card = next(i for i, o in enumerate(disk.log) if isinstance(o, Name) and o.entries[0][1] == "ash.card.tmp")
    assert Fsync(tmp_path.stat().st_ino) in disk.log[:card], "before the card is there"


def test_a_second_init_refuses_and_keeps_everything(ash: Path) -> None:
    before = {p: p.read_bytes() for p in ash.rglob("*") if p.is_file()}
    done = run("--state", ash, "init", "--name", "other", "--address", "other.example.org:1")
    assert isinstance(done.exception, UsageError) and "initialised already" in str(done.exception)
    assert {p: p.read_bytes() for p in ash.rglob("*") if p.is_file()} == before


def test_an_init_that_was_cut_short_is_completed_with_the_same_key(ash: Path) -> None:
    public = identity.load(Layout(ash).key).public
    (ash / "node.toml").unlink()
    assert enrol.init(ash, name="ash", address="127.0.0.1:9001", listen=None, data=None).key == public


@pytest.mark.parametrize(
    ("name", "address"),
    [("Ash", "a:1"), ("a", "a:1"), ("../x", "a:1"), ("ash", "a"), ("ash", "a:99999"), ("ash", ":1")],
)
def test_a_bad_name_or_address_is_refused_before_anything_is_written(tmp_path: Path, name: str, address: str) -> None:
    with pytest.raises(ConfigError):
        enrol.init(tmp_path / "s", name=name, address=address, listen=None, data=None)
    assert not (tmp_path / "s").exists()


def test_a_state_directory_of_somebody_else_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 54321)
    with pytest.raises(UsageError, match="belongs to user") as caught:
        files.require_owner(tmp_path)
    assert "sudo -u" in caught.value.remedy


# ------------------------------------------------------------------ configuration typos


def mutations(key: str) -> set[str]:
    middle = len(key) // 2
    return {key + "s", key[:middle] + key[middle + 1 :], key[:middle] + key[middle] + key[middle:]} - {key}


@pytest.mark.parametrize("key", sorted(keys_of(NodeConfig)))
def test_threat_27_a_misspelt_key_is_named_with_file_line_and_the_nearest_key(ash: Path, key: str) -> None:
    """THREATS 27: mutate each key; exit 78, file, line and key named."""
    *table, leaf = key.split(".")
    commented = (ash / "node.toml").read_text()
    path = ash / "node.toml"
    for wrong in mutations(leaf):
        lines = commented.splitlines()
        start = lines.index(next(line for line in lines if line.startswith(f"[{table[0]}]"))) if table else 0
        number = next(i for i in range(start, len(lines)) if re.match(rf"(# )?{leaf} = ", lines[i]))
        lines[number] = lines[number].removeprefix("# ").replace(leaf, wrong, 1)
        path.write_text("\n".join(lines))
        with pytest.raises(ConfigError) as caught:
            node_toml.load_node(ash)
        assert caught.value.exit_code == 78
        assert f"{path}:{number + 1}: unknown key '{'.'.join([*table, wrong])}'" in caught.value.message
        known = [k.split(".")[-1] for k in keys_of(NodeConfig) if k.split(".")[:-1] == table]
        nearest = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
        assert nearest == [leaf] and f"did you mean '{leaf}'?" in caught.value.message


def test_threat_27_all_errors_of_a_file_are_reported_at_once(ash: Path) -> None:
    (ash / "node.toml").write_text('nam = "ash"\naddress = "nowhere"\n[train]\nthreads = -1\n')
    with pytest.raises(ConfigError) as caught:
        node_toml.load_node(ash)
    for part in (":1: unknown key 'nam'", "'name' is missing", ":2: address", ":4: train.threads"):
        assert part in caught.value.message


# ------------------------------------------------------------------ the federation


def test_cards_and_a_plan_become_one_file_with_a_hash_to_read_aloud(ash: Path, birch: Path, tmp_path: Path) -> None:
    out = tmp_path / "federation.toml"
    (tmp_path / "plan.toml").write_text('method = "fedavg"\nrounds = 7\nseed = 4\n')
    done = run(
        "federation", "create", "--name", "trees", "--card", ash / "ash.card", "--card", birch / "birch.card",
        "--plan", tmp_path / "plan.toml", "--set", "rounds=3", "--set", "classes=benign,malignant",
        "--set", "split_percent=50,25,25", "--set", "task=lesions", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    federation = toml_file.read_toml(out, Federation)
    plan = federation.plan
    assert (plan.method, plan.rounds, plan.seed, plan.task) == ("fedavg", 3, 4, "lesions")
    assert (plan.classes, plan.split_percent) == (("benign", "malignant"), (50, 25, 25))
    assert federation.fed8 in done.stdout and enrol.read_aloud(federation) in done.stdout
    assert enrol.read_aloud(federation).replace(" ", "").startswith(federation.fed8)


def test_the_order_of_the_cards_does_not_matter(ash: Path, birch: Path, tmp_path: Path) -> None:
    one = toml_file.read_toml(federation_file(tmp_path, ash, birch), Federation)
    other = toml_file.read_toml(federation_file(tmp_path, birch, ash), Federation)
    assert one.digest == other.digest


def test_an_anchor_set_enters_the_federation_by_its_fingerprint(ash: Path, birch: Path, tmp_path: Path) -> None:
    path = tmp_path / "anchor.safetensors"
    done = run("anchor", "build", "--digits", "-n", "4", "--image-size", "16", "--out", path)
    assert done.exit_code == 0, done.output
    made = enrol.create(
        name="trees", cards=[ash / "ash.card", birch / "birch.card"], plan=Plan(image_size=16), anchor=path
    )
    assert made.anchor is not None
    assert (made.anchor.fingerprint, made.anchor.images) == (anchor.fingerprint(path), 8)
    (tmp_path / "f.toml").write_text(config.federation_text(made))
    enrol.join(ash, tmp_path / "f.toml", anchor=path)
    assert Layout(ash).anchor.read_bytes() == path.read_bytes()
    assert run("--state", ash, "anchor", "verify").exit_code == 0


def test_threat_28_a_wrong_anchor_file_is_refused_and_nothing_joined(ash: Path, birch: Path, tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for path, n in ((right, 4), (wrong, 5)):
        anchor.save(anchor.digits_standin(16, n=n), path)
    made = enrol.create(
        name="trees", cards=[ash / "ash.card", birch / "birch.card"], plan=Plan(image_size=16), anchor=right
    )
    (tmp_path / "f.toml").write_text(config.federation_text(made))
    with pytest.raises(FederationMismatch, match="is not the anchor set"):
        enrol.join(ash, tmp_path / "f.toml", anchor=wrong)
    assert not (ash / "federation.toml").exists() and not Layout(ash).anchor.exists()


def test_hsl_without_an_anchor_is_refused(ash: Path, birch: Path) -> None:
    with pytest.raises(ConfigError, match="hsl-node anchor build"):
        enrol.create(name="t", cards=[ash / "ash.card", birch / "birch.card"], plan=Plan(), anchor=None)


def test_a_card_that_was_changed_on_its_way_is_refused(ash: Path, birch: Path) -> None:
    stolen = identity.load(Layout(birch).key).public
    text = re.sub(r'key = ".*"', f'key = "{stolen}"', (ash / "ash.card").read_text())
    (ash / "ash.card").write_text(text)
    with pytest.raises(ConfigError, match="fingerprint does not belong to the key"):
        enrol.create(name="t", cards=[ash / "ash.card", birch / "birch.card"], plan=Plan(method="fedavg"), anchor=None)


@pytest.mark.parametrize("setting", ["round=3", "rounds=0", "rounds", "classes=a", "method=pickle"])
def test_a_bad_setting_of_the_plan_writes_no_file(ash: Path, birch: Path, tmp_path: Path, setting: str) -> None:
    cards = ["--card", ash / "ash.card", "--card", birch / "birch.card"]
    done = run("federation", "create", "--name", "t", *cards, "--set", setting, "--out", tmp_path / "f")
    assert isinstance(done.exception, HslError) and done.exception.remedy
    assert not (tmp_path / "f").exists()


def test_a_network_that_no_hospital_can_build_is_refused_where_the_plan_is_made(ash: Path, birch: Path, tmp_path: Path):
    cards = ["--card", ash / "ash.card", "--card", birch / "birch.card", "--out", tmp_path / "f"]
    for bad, said in (("method=fedppkt", "64 px at most"), ("backbone=torchvision:x", "no classifier 'x'")):
        done = run("federation", "create", "--name", "t", *cards, "--set", "method=fedavg", "--set", bad)
        assert isinstance(done.exception, ConfigError) and said in done.exception.message
        assert not (tmp_path / "f").exists()


def test_threat_20_a_federation_file_does_not_draw_its_own_hash(ash: Path, birch: Path, tmp_path: Path) -> None:
    """Its name ended the line, drew the hash of another file and hid what came after."""
    path = federation_file(tmp_path, ash, birch)
    name = "trees\nhash        abcdef12   (read aloud: abcd ef12)\x1b[8m"
    content = tomllib.loads(path.read_text()) | {"name": name}
    path.write_text(tomli_w.dumps(content))
    for command in (("show",), ("show", "--json"), ("diff",), ("join",)):
        done = run("--state", ash, "federation", command[0], path, *command[1:])
        assert isinstance(done.exception, ConfigError) and done.stdout == ""
        assert f"{path}:2: name: 'trees\\nhash" in done.exception.message
    federation = federation_of_cards(ash, birch).model_copy(update={"name": name})
    shown = _text(federation, keyring.Keyring.of(federation))
    assert shown.replace("\n", "").isprintable() and shown.count("\nhash ") == 1, "nor if it were let in"


@pytest.mark.parametrize("name", ["fednova", "flexfair", "fedtp", "frozen", "fedprox"])
def test_a_plan_of_any_method_is_made_and_shown_with_what_it_changes(
    ash: Path, birch: Path, tmp_path: Path, name: str
) -> None:
    needed = {"fedtp": ["backbone=vit_tiny"], "frozen": ["backbone_weights=" + "0" * 64]}.get(name, [])
    needed += ["optimizer=sgd"] if CARDS[name].optimizer else []
    needed += ["fedprox.mu=0.1"] if name == "fedprox" else []
    cards = ["--card", ash / "ash.card", "--card", birch / "birch.card", "--out", tmp_path / "f"]
    changes = [word for setting in [f"method={name}", *needed] for word in ("--set", setting)]
    done = run("federation", "create", "--name", "t", *cards, *changes)
    assert done.exception is None
    shown = dict(line.split(maxsplit=1) for line in done.stdout.partition("\nplan ")[2].splitlines()[1:] if line)
    assert [shown[setting.partition("=")[0]] for setting in needed] == [s.partition("=")[2] for s in needed]
    assert len(shown) == 5 + len(needed), "and no default"


def federation_of_cards(*states: Path) -> Federation:
    cards = tuple(config.load_card(next(state.glob("*.card"))) for state in states)
    return Federation(name="trees", plan=Plan(method="fedavg"), peer=cards)


def test_an_existing_file_is_not_written_over(ash: Path, birch: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("precious")
    cards = ["--card", ash / "ash.card", "--card", birch / "birch.card"]
    done = run("federation", "create", "--name", "t", *cards, "--set", "method=fedavg", "--out", tmp_path / "f")
    assert isinstance(done.exception, UsageError) and (tmp_path / "f").read_text() == "precious"


def test_joining_takes_the_file_and_shows_the_same_hash(ash: Path, birch: Path, tmp_path: Path) -> None:
    path = federation_file(tmp_path, ash, birch)
    fed8 = toml_file.read_toml(path, Federation).fed8
    assert fed8 in run("--state", ash, "federation", "join", path).stdout
    assert config.load_federation(ash).fed8 == fed8
    assert fed8 in run("--state", ash, "federation", "show").stdout


def test_a_peer_card_in_the_place_of_a_federation_file_is_called_one(ash: Path, birch: Path, tmp_path: Path) -> None:
    card = ash / "ash.card"
    for words in (("join", card), ("show", card), ("diff", card, card)):
        refused = run("--state", ash, "federation", *words)
        assert isinstance(refused.exception, ConfigError), refused.output
        assert f"{card} is a peer card, that of ash, and no federation file" in refused.exception.message
        assert "federation create" in refused.exception.remedy
    with pytest.raises(ConfigError, match=r"node\.toml is a settings file of a node, no peer card"):
        config.load_card(ash / "node.toml")
    path = federation_file(tmp_path, ash, birch)
    path.write_text(path.read_text()[:150])
    with pytest.raises(ConfigError) as cut:
        config.read_federation(path)
    assert "cut or edited" in cut.value.remedy and "federation plan" not in cut.value.remedy
    (tmp_path / "neither.toml").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"neither\.toml:1: unknown key 'x'"):
        enrol.join(ash, tmp_path / "neither.toml")


def test_joining_refuses_a_file_in_which_this_nodes_own_key_does_not_appear(
    ash: Path, birch: Path, tmp_path: Path
) -> None:
    other = made(tmp_path / "ash2", "ash", 9003)  # the same name, another key
    with pytest.raises(FederationMismatch, match=r"own key .* does not appear"):
        enrol.join(ash, federation_file(tmp_path, other, birch))
    assert not (ash / "federation.toml").exists()


def test_joining_refuses_a_file_that_gives_this_nodes_key_another_name(ash: Path, birch: Path, tmp_path: Path) -> None:
    path = federation_file(tmp_path, ash, birch)
    path.write_text(path.read_text().replace('name = "ash"', 'name = "oak"'))
    with pytest.raises(FederationMismatch, match="'oak'"):
        enrol.join(ash, path)


def trained_a_round(state: Path) -> None:
    """As the daemon leaves it after publishing round 1."""
    store = Store(Layout(state))
    store.journal.set_meta("federation", config.load_federation(state).digest)
    store.journal.save_state({"me": "ash", "round": 1})
    store.journal.record_signed(1, Digest("a" * 64), b"document")
    for round, size in ((0, 0), (1, 5_000_000), (2, 0)):  # the first and the last are statements: nothing was trained
        if round != 1:
            store.journal.record_signed(round, Digest("b" * 64), b"statement")
        store.journal.record_manifest(round, Peer("ash"), "a" * 64, b"document", {"bytes": size})
    Layout(state).outbox(1).write_bytes(b"checkpoint")
    store.close()


def test_a_federation_with_trained_rounds_is_not_replaced_by_accident(ash: Path, birch: Path, tmp_path: Path) -> None:
    first, second = federation_file(tmp_path, ash, birch), federation_file(tmp_path, ash, birch, name="new", rounds=3)
    enrol.join(ash, first)
    trained_a_round(ash)
    done = run("--state", ash, "federation", "join", second)
    assert isinstance(done.exception, FederationMismatch) and "1 round has been trained" in str(done.exception)
    assert config.load_federation(ash).name == "trees" and Layout(ash).outbox(1).exists()


def test_replace_moves_the_old_run_aside_whole(ash: Path, birch: Path, tmp_path: Path) -> None:
    first, second = federation_file(tmp_path, ash, birch), federation_file(tmp_path, ash, birch, name="new", rounds=3)
    enrol.join(ash, first)
    trained_a_round(ash)
    enrol.join(ash, second, replace=True)
    (past,) = Layout(ash).past.iterdir()
    assert (past / "outbox" / "r000001.safetensors").read_bytes() == b"checkpoint"
    assert toml_file.read_toml(past / "federation.toml", Federation).name == "trees"
    with Journal.read_only(past / "journal.sqlite3") as old:
        assert old.signed(1) is not None
    assert config.load_federation(ash).name == "new"
    store = Store(Layout(ash))
    assert store.journal.state() is None and store.journal.signed(1) is None
    store.close()


def test_joining_the_same_file_again_keeps_the_run(ash: Path, birch: Path, tmp_path: Path) -> None:
    path = federation_file(tmp_path, ash, birch)
    enrol.join(ash, path)
    trained_a_round(ash)
    enrol.join(ash, path)
    assert Layout(ash).outbox(1).exists() and not Layout(ash).past.exists()


def test_joining_under_a_running_daemon_is_refused(ash: Path, birch: Path, tmp_path: Path) -> None:
    path = federation_file(tmp_path, ash, birch)
    store = Store(Layout(ash))
    try:
        with pytest.raises(HslError) as caught:
            enrol.join(ash, path)
    finally:
        store.close()
    assert caught.value.exit_code == 11 and not (ash / "federation.toml").exists()


def test_threat_28_diff_names_every_difference_and_exits_17(ash: Path, birch: Path, tmp_path: Path) -> None:
    one, other = federation_file(tmp_path, ash, birch), federation_file(tmp_path, ash, birch, name="new", rounds=3)
    done = run("federation", "diff", one, other)
    assert done.exit_code == 17
    assert done.stdout.splitlines() == ["name: trees -> new", "plan.rounds: 20 -> 3"]
    enrol.join(ash, one)
    assert run("--state", ash, "federation", "diff", other).stdout == done.stdout
    assert run("--state", ash, "federation", "diff", one).exit_code == 0


def test_peer_list_marks_this_node(ash: Path, birch: Path, tmp_path: Path) -> None:
    enrol.join(ash, federation_file(tmp_path, ash, birch))
    listed = run("--state", ash, "peer", "list").stdout
    assert "ash (this node)" in listed and config.load_card(birch / "birch.card").fingerprint in listed


def test_a_key_that_others_may_read_is_refused(ash: Path) -> None:
    Layout(ash).key.chmod(0o644)
    with pytest.raises(LocalStateError, match="may be read by others"):
        enrol.card_of(ash)


def test_a_federation_file_that_was_edited_after_it_was_made_is_not_joined(
    ash: Path, birch: Path, tmp_path: Path
) -> None:
    """Its first line still names the hash that was compared by telephone."""
    path = federation_file(tmp_path, ash, birch)
    text = path.read_text()
    path.write_text(text.replace("rounds = 20", "rounds = 21"))
    with pytest.raises(ConfigError, match=r"its first line says hash [0-9a-f]{8}, its content has"):
        enrol.join(ash, path)
    assert not (ash / "federation.toml").exists()
    path.write_text(text.replace("\n", "\r\n") + "# received on Monday\n")
    enrol.join(ash, path)


def test_one_card_is_no_federation_and_says_so_in_its_own_words(ash: Path) -> None:
    with pytest.raises(UsageError, match="a federation has two peers or more, here is 1 card"):
        enrol.create(name="trees", cards=[next(ash.glob("*.card"))], plan=Plan(method="fedavg"), anchor=None)
