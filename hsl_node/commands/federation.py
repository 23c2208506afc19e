"""The federation: create it from cards, show, join, diff."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsl_node.commands.shared import ENROL, Json, answer, own_state_of, state_of
from hsl_node.errors import FederationMismatch, escaped
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import of_methods
from hsl_node.federation.plan_keys import MEANING
from hsl_node.host.hints import command
from hsl_node.host.layout import Layout
from hsl_node.host.units import table

if TYPE_CHECKING:
    from hsl_node.federation.config import Federation, PeerCard
    from hsl_node.federation.keyring import Keyring


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The agreed peers, keys and plan: one file for everybody.")
    group.command(
        epilog="Example: hsl-node federation create --name breast-us --card a.card --card b.card "
        "--anchor anchor.safetensors --set rounds=10 --set classes=benign,malignant --out federation.toml",
        help="Make federation.toml from the peers' cards and a plan.\n\nPrints the hash to compare by phone. "
        f"Keys of a plan: {', '.join(MEANING)}; of its method: {', '.join(of_methods())}. "
        "`hsl-node federation plan` prints what each means, its default and its values. "
        "Of two classes the second is the positive one: AUC and sensitivity are about it. "
        "What is not given has the default; for HSL as published: hsl.preset=published. "
        f"fusion is one of {'; '.join(f'{name}: {rule.line}' for name, rule in FUSION_RULES.items())}. "
        "A robust one softens what a poisoned minority sends.",
    )(create)
    group.command(epilog="Example: hsl-node federation plan")(plan)
    group.command(epilog="Example: hsl-node federation show federation.toml")(show)
    group.command(epilog="Example: hsl-node federation join federation.toml --anchor anchor.safetensors")(join)
    group.command(epilog="Example: hsl-node federation diff new.toml")(diff)
    app.add_typer(group, name="federation", rich_help_panel=ENROL, no_args_is_help=True)


def create(
    name: Annotated[str, typer.Option(help="Name of the federation.")],
    card: Annotated[list[Path], typer.Option(metavar="FILE", help="A peer card; once for each peer.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")],
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="A plan: TOML with the keys above.")] = None,
    set: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="One setting of the plan; wins over --plan.")
    ] = None,
    anchor: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The anchor set (hsl-node anchor build); its fingerprint goes in."),
    ] = None,
) -> None:
    from hsl_node.admin import enrol
    from hsl_node.federation import config
    from hsl_node.federation.keyring import Keyring
    from hsl_node.federation.plan import load_plan
    from hsl_node.host import files
    from hsl_node.train.site import require_model

    files.require_new(out)
    made = enrol.create(name=name, cards=card, plan=load_plan(plan, set or ()), anchor=anchor)
    require_model(made.plan)
    files.write_new(out, config.federation_text(made))
    print(_text(made, Keyring.of(made)))
    print(
        f"\nWrote {out}. Send it{' and the anchor set' if anchor else ''} to every peer; compare the hash by phone.",
        file=sys.stderr,
    )


def plan(json: Json = False) -> None:
    """Every setting of a plan, with its default, and every method.

    Its values, and what it means; of a method what it needs.

    For --set KEY=VALUE and --plan of `hsl-node federation create`.
    """
    import textwrap

    from hsl_node.federation import methods, plan_keys

    defaults, limits, known = plan_keys.defaults(), plan_keys.limits(), methods.cards()
    value: dict[str, dict[str, Any]] = {
        key: {"default": defaults[key], "values": limits[key], "means": text} for key, text in plan_keys.MEANING.items()
    }
    value |= {
        key: {"default": plan_keys.word(setting.default), "values": setting.values, "means": setting.does}
        for key, setting in of_methods(known).items()
    }
    lines = []
    for key, said in value.items():
        allowed = f"   values: {said['values']}" if said["values"] else ""
        lines.append(f"{key} = {said['default']}{allowed}")
        lines += textwrap.wrap(said["means"], 76, initial_indent="    ", subsequent_indent="    ")
    lines.append("\nMethods:")
    for card in known.values():
        words = f"{card.name}: {card.title} ({card.facts})"
        lines += textwrap.wrap(words, 76, initial_indent="    ", subsequent_indent="        ")
    told = {card.name: {"title": card.title, "facts": card.facts} for card in known.values()}
    answer(json, {**value, "method": {**value["method"], "methods": told}}, "\n".join(lines))


def show(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help="A federation.toml. Default: the one joined.")] = None,
    json: Json = False,
) -> None:
    """Print name, hash, peers with fingerprints, and the plan.

    Of the one joined also which keys were replaced since: the one that counts here now stands first.
    """
    from hsl_node.federation import keyring

    federation = _load(context, file)
    ring = keyring.load(state_of(context), federation) if file is None else keyring.Keyring.of(federation)
    now = {p.name: ring.newest(p.name) for p in federation.peer}
    hashes = {"hash": federation.fed8, "digest": federation.digest}
    answer(json, {**federation.model_dump(mode="json"), **hashes, "keys_now": now}, _text(federation, ring))


def join(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The federation.toml that everybody got.")],
    anchor: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The anchor set that came with it: checked, then copied into place."),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Also when rounds were trained under another one: that run moves to past/."),
    ] = False,
) -> None:
    """Make this file the node's federation.

    Refused where this node's own key is not in it, and where rounds were trained under another one.
    """
    from hsl_node.admin import enrol

    state = own_state_of(context)
    joined = enrol.join(state, file, anchor=anchor, replace=replace)
    print(f"joined {joined.name!r}, hash {joined.fed8}; read aloud: {enrol.read_aloud(joined)}")
    if joined.anchor is not None and not Layout(state).anchor.exists():
        what = f"The anchor set {joined.anchor.name!r} is still missing"
        again = f"{command(state)} federation join {shlex.quote(str(file))} --anchor FILE"
        print(f"{what}: {again}, or name it in {Layout(state).node_toml}.", file=sys.stderr)


def diff(
    context: typer.Context,
    first: Annotated[Path, typer.Argument(help="A federation.toml.")],
    second: Annotated[Path | None, typer.Argument(help="Another one. Default: the one joined.")] = None,
    json: Json = False,
) -> None:
    """Every setting in which two federation files differ.

    As `key: joined -> FIRST`, or `key: FIRST -> SECOND`. Exit code 17 where they differ.
    """
    from hsl_node.federation import config

    one, other = _load(context, first), _load(context, second)
    ours, theirs = (one, other) if second is not None else (other, one)
    found = config.differences(ours, theirs)
    text = "\n".join(found) if found else f"the same federation, hash {ours.fed8}"
    answer(json, {"ours": ours.fed8, "theirs": theirs.fed8, "differences": found}, text)
    if found:
        raise typer.Exit(FederationMismatch.exit_code)


def _load(context: typer.Context, file: Path | None) -> Federation:
    from hsl_node.federation import config

    return config.load_federation(state_of(context)) if file is None else config.read_federation(file)


def _text(federation: Federation, ring: Keyring) -> str:
    from hsl_node.admin.enrol import read_aloud
    from hsl_node.federation.plan import Plan
    from hsl_node.federation.plan_keys import flat

    plan = dict(flat(federation.plan.model_dump(mode="json")))
    card = federation.plan.card  # a plan of its defaults alone may lack what the method needs: fednova's SGD
    usual = dict(flat({**Plan().model_dump(mode="json"), **card.plan_presets.get("", {})})) | {
        f"{card.name}.{k}": s.default for k, s in card.settings.items()
    }
    changed = {k for k in plan if plan[k] != usual[k]} | {"method", "task", "classes", "rounds", "epochs_per_round"}
    rows = [row for p in federation.peer for row in _keys(p, ring)]
    anchor = federation.anchor
    set_used = f"{escaped(anchor.name)}, {anchor.images} images, {anchor.fingerprint[:12]}" if anchor else "none"
    return "\n".join(
        [
            f"federation  {escaped(federation.name)}",
            f"hash        {federation.fed8}   (read aloud: {read_aloud(federation)})",
            f"anchor      {set_used}",
            "",
            table(("peer", "address", "fingerprint"), rows),
            "",
            "plan (what is not listed has its default)",
            *(f"  {key:20}  {_value(plan[key])}" for key in plan if key in changed),
        ]
    )


def _keys(peer: PeerCard, ring: Keyring) -> list[tuple[str, str, str]]:
    """The key that counts here now; below it the file's, where another one took its place."""
    from hsl_node.federation.strings import fingerprint

    now = fingerprint(ring.newest(peer.name))
    first = (peer.name, peer.address, now + ("  (revoked here)" if ring.is_revoked(peer.name) else ""))
    if now == peer.fingerprint:
        return [first]
    changing = ring.overlap(peer.name) is not None
    how = "being replaced by the one above" if changing else "replaced by the one above"
    return [first, ("", "", f"{peer.fingerprint}  (in the file; {how})")]


def _value(value: object) -> str:
    return ", ".join(escaped(str(v)) for v in value) if isinstance(value, list) else escaped(str(value))
