"""The images: data check, anchor build, anchor verify."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsl_node.commands.shared import DATA, Json, answer, state_of
from hsl_node.errors import ConfigError, UsageError
from hsl_node.host.files import require_new
from hsl_node.host.layout import Layout
from hsl_node.host.terminal import progress_bar
from hsl_node.host.units import table
from hsl_node.host.wrong_paths import require_place

if TYPE_CHECKING:
    from hsl_node.federation.plan import Plan
    from hsl_node.train.data.check import DataReport

NAMED = 20  # files listed per kind of finding; --json lists all


def register(app: typer.Typer) -> None:
    data = typer.Typer(help="This hospital's images.")
    data.command(epilog="Example: hsl-node data check --contact-sheet sheet.png")(check)
    app.add_typer(data, name="data", rich_help_panel=DATA, no_args_is_help=True)
    anchor = typer.Typer(help="The public images that all peers train beside their own.")
    anchor.command(
        epilog="Example: hsl-node anchor build --data chest_xray --classes NORMAL,PNEUMONIA -n 1000 --image-size 224 "
        "--name 'chest x-ray, normal against pneumonia' --out anchor.safetensors"
    )(build)
    anchor.command(epilog="Example: hsl-node anchor verify anchor.safetensors")(verify)
    app.add_typer(anchor, name="anchor", rich_help_panel=DATA, no_args_is_help=True)


def check(
    context: typer.Context,
    classes: Annotated[
        str | None, typer.Option(help="Before a federation is joined: the classes, comma-separated.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Before a federation is joined: pixels.")] = None,
    contact_sheet: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw some images of each class and split.")
    ] = None,
    json: Json = False,
) -> None:
    """Count the images, find what is wrong with them.

    What became of every row or file, counts per class and split, unreadable files, duplicates, and what is other than
    when the run began. Exit code 78: the node could not train.
    """
    from hsl_node.federation import config, node_toml
    from hsl_node.train.data import check as data_check

    state = state_of(context)
    if contact_sheet is not None:
        require_place(contact_sheet)
    node, layout = node_toml.load_node(state), Layout(state)
    plan = _plan(state, classes, image_size)
    report = data_check.check(
        node.data,
        plan,
        cache=layout.cache,
        ledger=layout.splits,
        run=config.load_federation(state).digest if layout.federation_toml.exists() else "",
        progress=progress_bar("images"),
    )
    text = _text(report, plan)
    if contact_sheet is not None and report.dataset is not None:
        from hsl_node.train.data.contact_sheet import contact_sheet as draw

        draw(report.dataset, plan, contact_sheet)
        text += f"\n\nwrote {contact_sheet}"
    answer(json, report.as_json(), text)
    if not report.ok:
        raise typer.Exit(ConfigError.exit_code)


def _plan(state: Path, classes: str | None, image_size: int | None) -> Plan:
    from hsl_node.federation import config
    from hsl_node.federation.plan import load_plan

    if Layout(state).federation_toml.exists():
        if classes is not None or image_size is not None:
            raise UsageError("the federation's plan sets classes and image size", remedy="leave these options out")
        return config.load_federation(state).plan
    settings = [f"classes={classes}"] if classes is not None else []
    try:
        return load_plan(None, [*settings, *([f"image_size={image_size}"] if image_size is not None else [])])
    except ConfigError as exc:
        said = exc.message.replace("--set: classes", "--classes").replace("--set: image_size", "--image-size")
        raise UsageError(said, remedy="e.g. --classes benign,malignant --image-size 224") from exc


def _text(report: DataReport, plan: Plan) -> str:
    splits = list(report.patient_counts)
    rows = [(name, *(str(c[s]) for s in splits), str(sum(c.values()))) for name, c in report.counts.items()]
    if report.grouped:
        rows.append(("patients", *(str(report.patient_counts[s]) for s in splits), str(report.patients)))
    right = range(1, len(splits) + 2)
    lines = [table(("class", *splits, "all"), rows, right=right), "", *_facts(report, plan)]
    lines += _listed("problem", report.problems)
    if report.remedy:
        lines.append(f"  what to do: {report.remedy}")
    lines += _listed("warning", report.warnings)
    lines += _listed("unreadable", [f"{file}: {reason}" for file, reason in report.unreadable])
    lines += _listed("the same image", [" = ".join(files) for files in report.duplicates])
    lines += _listed("alike, in two splits", [" ~ ".join(files) for files in report.near_duplicates])
    count = len(report.warnings)
    doubted = f", but see the {f'{count} warnings' if count > 1 else 'warning'} above" if count else ""
    end = f"ready to train{doubted}" if report.ok else "not ready to train: see the problems above"
    return "\n".join([*lines, "", end])


def _facts(report: DataReport, plan: Plan) -> list[str]:
    """What became of what was read, and what the figures will mean."""
    read, parts = sum(report.account.values()), [f"{count} {why}" for why, count in report.account.items()]
    lines = [f"{report.unit}: {read} read = {' + '.join(parts)}"]
    for column, values in report.taken.items():
        taken = (
            ", ".join(f"{value!r} {count}" for value, count in values.items()) or "(not shown: it may name patients)"
        )
        lines.append(f"filter, {column}: {taken}")
    lines += [f"data.exclude {entry!r}: {count} images" for entry, count in report.excluded.items()]
    if report.sites:
        lines.append("sites: " + ", ".join(f"{site} {count}" for site, count in report.sites.items()))
    named = " and ".join(f"{count} by {kind}" for kind, count in report.summary.named.items() if count)
    lines.append(f"split: {named}" if named else "split: none")
    if len(plan.classes) == 2:
        lines.append(
            f"positive: {plan.classes[1]!r}, the second class of the plan; so count AUC, sensitivity, precision"
        )
    lines.append(f"each image: {report.preprocessing}")
    if report.since is not None:
        now = {name: sum(count.values()) for name, count in report.counts.items()}
        were = ", ".join(f"{name} {began} then, {now.get(name, 0)} now" for name, began in report.since.began.items())
        lines.append(f"since the run began: {were}; {report.since.new} images are new")
    return lines


def _listed(kind: str, findings: list[str] | tuple[str, ...]) -> list[str]:
    if not findings:
        return []
    more = [f"{kind}: and {len(findings) - NAMED} more (--json lists all)"] if len(findings) > NAMED else []
    return ["", *(f"{kind}: {finding}" for finding in findings[:NAMED]), *more]


def build(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Folder with a folder per class, table, or .npz. Default: --digits."),
    ] = None,
    classes: Annotated[str | None, typer.Option(metavar="A,B", help="The two classes of that source.")] = None,
    n: Annotated[int | None, typer.Option("-n", min=2, help="Images per class. Default: all of the rarer one.")] = None,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Pixels; the plan's image_size.")] = 224,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=NAME", help="A table's own column name: path=file, label=dx. Once for each."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What it is, for people.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses which images.")] = 1,
    digits: Annotated[
        bool, typer.Option("--digits", help="scikit-learn's handwritten digits: a stand-in for trials, not medical.")
    ] = False,
) -> None:
    """Make an anchor set: two classes, as many images of each, one file."""
    from hsl_node.train.data import anchor

    if digits == (data is not None):
        raise UsageError("give either --data PATH or --digits", remedy="see `hsl-node anchor build --help`")
    require_new(out)
    if data is None:
        made = anchor.digits_standin(image_size, n=n, seed=seed)
    else:
        from hsl_node.federation.node_toml import DataConfig

        chosen = (classes or "").split(",")
        if len(chosen) != 2:
            raise UsageError("name the two classes of that source", remedy="e.g. --classes normal,pneumonia")
        made = anchor.build(
            DataConfig(path=data, columns=columns_of(column or ())),
            name=name or f"{data.name[:40]}: {' against '.join(chosen)}",
            classes=(chosen[0], chosen[1]),
            image_size=image_size,
            n=n,
            seed=seed,
            progress=progress_bar("images"),
        )
    fingerprint = anchor.save(made, out)
    print(f"{out}: {made.name}, {len(made.labels)} images of {made.image_size} px, fingerprint {fingerprint}")


def columns_of(given: Sequence[str]) -> dict[str, str]:
    """As data.columns in node.toml. Raises: UsageError."""
    pairs = [word.partition("=") for word in given]
    if bad := [key for key, equals, _ in pairs if not equals or not key]:
        raise UsageError(f"--column {bad[0]}: no KEY=NAME", remedy="e.g. --column path=file --column label=dx")
    return {key.strip(): name.strip() for key, _, name in pairs}


def verify(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help="Default: the one this node uses.")] = None,
    json: Json = False,
) -> None:
    """Compare an anchor file with the federation's fingerprint.

    Exit code 17: it is another file.
    """
    from hsl_node.federation import config, node_toml
    from hsl_node.train.data import anchor

    state = state_of(context)
    federation = config.load_federation(state)
    if federation.anchor is None:
        raise UsageError(f"federation {federation.name!r} uses no anchor set", remedy="there is nothing to verify")
    path = file or node_toml.load_node(state).anchor or Layout(state).anchor
    found = anchor.verify(path, federation.anchor)
    value = {"file": str(path), "name": found.name, "classes": found.classes, "images": len(found.labels),
             "image_size": found.image_size, "fingerprint": federation.anchor.fingerprint}  # fmt: skip
    classes = " against ".join(found.classes)
    answer(json, value, f"{path} is {found.name!r}: {classes}, {len(found.labels)} images of {found.image_size} px")
