"""`hsl-node demo`: a federation of real daemons on this machine, from enrolment to the report.

Each hospital is a process of its own with its own key, images and state directory; they meet over SFTP on the
loopback. Nothing else is simulated, and nothing is sent anywhere else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsl_node.demo import processes, setup, view
from hsl_node.demo.setup import Hospital
from hsl_node.errors import PeerDataError, UsageError, escaped
from hsl_node.federation.config import Federation
from hsl_node.federation.methods import Need
from hsl_node.federation.plan import Plan, put_settings
from hsl_node.federation.toml_file import check
from hsl_node.host import control, wrong_paths
from hsl_node.host.cores import available_cores
from hsl_node.host.units import duration, figure, table
from hsl_node.results import report
from hsl_node.results.facts import Agreement, NodeFacts, agreement, read
from hsl_node.study import phantoms

SYNTHETIC = (
    "The images are synthetic phantoms: they look like ultrasound, and no patient stands behind them. "
    "The figures show that the federation works, and nothing about medicine."
)
STAND_IN = "The anchor set is a stand-in (handwritten digits)."

# Small enough for two cores and three minutes, and still the method and model of a real run around a smaller trunk.
PHANTOM_PLAN: dict[str, Any] = {
    "task": "synthetic ultrasound phantoms: benign or malignant",
    "image_size": 48,
    "batch_size": 16,
    "backbone": "tiny",
    # Fewer images to train on than the published 60 %: it is then that hospitals need each other, and the larger
    # validation and test sets make the table less a matter of chance.
    "split_percent": (40, 20, 40),
    "rounds": 12,  # short ones: hospitals that differ this much drift apart in long ones, and their mean is worse
    "epochs_per_round": 2,
    "learning_rate": 3e-3,
    "learning_rate_min": 3e-4,
}
REAL_PLAN: dict[str, Any] = {
    "image_size": 64,
    "batch_size": 32,
    "backbone": "resnet18",
    "rounds": 3,
    "epochs_per_round": 5,
}


def run(
    target: Path,
    *,
    hospitals: int = 3,
    data: Path | None = None,
    group_by: str | None = None,
    anchor: Path | None = None,
    seed: int = 1,
    plan: Mapping[str, Any],
    more: Sequence[str] = (),
) -> int:
    """Make it, run it, show it. Gives the exit code: 0, or 14 where the fused models of the hospitals differ.

    An earlier demo in `target` is replaced. `plan`: settings of a plan; None, or none: the default for phantoms, or for
    real images. `more`: others, as `key=value`.

    Raises:
        UsageError: options that exclude each other; a folder that is not a demo's.
        DemoFailed: a process ended that should not have; its last lines are in the message.
        KeyboardInterrupt: Ctrl-C; every process has been ended by then.
    """
    began = time.monotonic()
    target = target.absolute()
    if (data is None) != (group_by is None):
        raise UsageError("--data and --group-by belong together", remedy="give both, or neither for synthetic images")
    wrong_paths.require_folder(target)
    settings = {**(PHANTOM_PLAN if data is None else REAL_PLAN), "seed": seed}
    settings |= {key: value for key, value in plan.items() if value is not None}
    sites: Sequence[Hospital] = ()
    if data is not None and group_by is not None:  # what is wrong with the request shows before the folder is touched
        sites, settings["classes"] = setup.table_hospitals(target, data, group_by)
        settings["task"] = f"{data.name}: {' or '.join(settings['classes'])}"[:120]
    else:
        settings["classes"] = phantoms.CLASSES
    put_settings(settings, more)
    agreed_plan = check(settings, Plan, "hsl-node demo")
    with_anchor = Need.ANCHOR in agreed_plan.card.needs
    if anchor is not None and with_anchor:
        setup.require_anchor(anchor, agreed_plan.image_size)
    lines = view.Lines()
    processes.interruptible()
    if setup.prepare_folder(target, lambda state: control.stop(state, processes.STOP_S)):
        print(f"The earlier demo in {target} is replaced.")
    if data is None:
        sites = setup.phantom_hospitals(target, hospitals, seed, lines.progress)
    anchor_file = None
    if with_anchor:
        anchor_file = setup.make_anchor(target, anchor, agreed_plan.image_size, seed, lines.progress)
    threads = max(1, available_cores() // len(sites))
    federation = setup.enrol_all(target, sites, agreed_plan, anchor_file, threads)
    stand_in = with_anchor and anchor is None
    note = " ".join([SYNTHETIC] * (data is None) + [STAND_IN] * stand_in)
    print(_opening(sites, federation, threads, note), flush=True)

    warned: dict[tuple[str, str], str] = {}  # hospital and code -> the last words

    def show(snapshots: processes.Snapshots) -> None:
        warned.update({(n, w.code): w.text for n, s in snapshots.items() if s for w in s.warnings})
        lines.nodes(snapshots)

    with processes.running(sites, "start") as daemons:
        processes.wait_finished(daemons, show)
    last = agreement([read(s.state) for s in sites])[-1].round
    print(_ended(last, agreed_plan, time.monotonic() - began), flush=True)
    processes.evaluate_all(sites, lines.evaluations)
    print("All are evaluated. Drawing the report:", flush=True)
    page = report.build([s.state for s in sites], target / "report.html", note=note)
    nodes = [read(site.state) for site in sites]
    agreed = agreement(nodes)
    print(closing(nodes, agreed, page, time.monotonic() - began, warned))
    return exit_code(agreed)


def _opening(sites: Sequence[Hospital], federation: Federation, threads: int, note: str) -> str:
    width, plan = max(len(s.name) for s in sites), federation.plan
    lines = [
        f"{len(sites)} hospitals, each a daemon of its own; {plan.rounds} rounds of {plan.epochs_per_round} epochs",
        *(f"  {s.name:{width}}  {s.origin}" for s in sites),
        f"model: {plan.method}, backbone {plan.backbone}, {plan.image_size} px, batches of {plan.batch_size}, "
        f"{threads} thread{'s' * (threads > 1)} each",
        *([f"anchor set: {federation.anchor.name}"] if federation.anchor else []),
        *([note] if note else []),
    ]
    return "\n".join([*lines, ""])


def _ended(last: int, plan: Plan, seconds: float) -> str:
    early = (
        f"After round {last} of {plan.rounds} no hospital had gained anything for {plan.plateau_rounds} rounds ("
        "plateau_rounds of the plan), so the run ended there.\n"
    )
    done = f"All hospitals have finished ({duration(seconds)}). Now each one alone, for comparison:"
    return (early if last < plan.rounds else "") + done


def exit_code(agreed: Sequence[Agreement]) -> int:
    return 0 if all(row.agree for row in agreed) else PeerDataError.exit_code


def _difference(node: NodeFacts) -> str:
    """AUC of the hospital's model less that of the one trained alone, and how sure it is."""
    pairs = (m.statistics.find(m.record["kind"], "alone") for m in node.measured)
    pair = next((p for p in pairs if p), None)
    if pair is None or pair.difference.value is None:
        return ""
    sure = pair.difference
    known = sure.low is not None and sure.high is not None
    return f"{sure.value:+.3f} ({sure.low:+.3f} to {sure.high:+.3f})" if known else "too few to say"


def closing(
    nodes: Sequence[NodeFacts],
    agreed: Sequence[Agreement],
    page: Path,
    seconds: float,
    warned: Mapping[tuple[str, str], str] = {},
) -> str:
    """The table, what the journals say about the digests, and where the report is."""
    header = ("hospital", "train", "test", "trained alone", "its model", "of", "difference (95 % interval)")
    rows = []
    for node in nodes:
        if (record := node.evaluation) is None:
            continue
        alone, found = (record["test"][k]["auc"] for k in ("alone", record["kind"]))
        kind = f"{record['kind']}, round {record['round']}"
        counts = (str(record["images"][split]) for split in ("train", "test"))
        rows.append(
            (node.name, *counts, figure(alone, "undefined"), figure(found, "undefined"), kind, _difference(node))
        )
    lines = ["", "AUC on each hospital's own test images", "", table(header, rows, right=range(1, 5)), ""]
    if any("undefined" in row for row in rows):
        lines += ["undefined: that test set holds one class only", ""]
    differing = [row for row in agreed if not row.agree]
    lines += [f"THE FUSED MODELS DIFFER in round {row.round}: {row.text}" for row in differing]
    if not differing:
        lines += [
            f"All {len(nodes)} hospitals hold the same fused model, byte for byte, in each of {len(agreed)} rounds; "
            f"the last: sha256 {agreed[-1].text}",
        ]
    if warned:
        lines += [
            "",
            "Warnings on the way; they changed nothing, and honest hospitals may raise them where data are few:",
        ]
        lines += [f"  {name}: {escaped(text, 300)}" for (name, _), text in warned.items()]
        lines += [""]
    return "\n".join([*lines, f"Report: {page}", f"Took {duration(seconds)}."])
