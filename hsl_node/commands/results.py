"""What came of it: evaluate, predict, export, report."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from hsl_node.commands.shared import RESULTS, Json, answer, state_of
from hsl_node.errors import UsageError
from hsl_node.host.terminal import progress_bar, progress_lines

Round = Annotated[
    int | None,
    typer.Option("--round", min=1, help="Fused model of this round. Default: this hospital's model."),
]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=RESULTS, epilog="Example: hsl-node evaluate")(evaluate)
    app.command(rich_help_panel=RESULTS, epilog="Example: hsl-node predict scan1.png scan2.dcm --out predictions.csv")(
        predict
    )
    app.command(rich_help_panel=RESULTS, epilog="Example: hsl-node export --out model --onnx")(export)
    app.command(rich_help_panel=RESULTS, epilog="Example: hsl-node report --out report.html")(report)


def evaluate(
    context: typer.Context,
    alone: Annotated[
        bool,
        typer.Option("--alone", help="Also a model trained without the federation; takes as long as the run did."),
    ] = False,
    random_pairing: Annotated[
        bool, typer.Option("--random-pairing", help="Also as published: each image beside a random anchor image.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Though the test set was used before. The report counts how often.")
    ] = False,
    round: Round = None,
    sensitivity: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="The threshold that reaches it on validation. Default: Youden's J."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="What each model says of each image. Names images and patients: keep it."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Labelled images from elsewhere: folder, table, or .npz.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=NAME", help="With --data: the table's own column name: path=file. Once for each."),
    ] = None,
    json: Json = False,
) -> None:
    """Measure this hospital's model on its test set.

    The best on its validation images: a fused model, the same with BatchNorm statistics of its own training images, or
    its own as it was trained in a round. Beside it the best fused one, and its own of the last round. Once: a test set
    that is looked at again and again tests nothing.
    """
    from hsl_node.commands.data import columns_of
    from hsl_node.federation.config import load_federation
    from hsl_node.host.wrong_paths import require_place
    from hsl_node.results import evaluate as results
    from hsl_node.results.asked import require_no_input
    from hsl_node.results.words import evaluation_text

    if column and data is None:
        raise UsageError("--column belongs to --data", remedy="the columns of this site's table are in node.toml")
    pairing: Literal["fixed", "random"] = "random" if random_pairing else "fixed"
    wish = results.Wish(alone, pairing, sensitivity)
    state, asked = state_of(context), time.time()
    hear = progress_lines(load_federation(state).plan.card.score_name)
    source = results.source_of(state, data, columns_of(column or ()))
    if scores is not None:
        require_place(scores)
        require_no_input(scores, [source.path] if source.path else [])
    if data is None:
        found = results.evaluate(state, round=round, asked=wish, again=again, report=hear)
    else:
        found = results.evaluate_external(state, source, round=round, asked=wish, report=hear)
    statistics = results.statistics(state, found)
    if scores is not None:
        results.write_csv(state, source, found, scores)
    value = {**found, "statistics": asdict(statistics)}
    answer(json, value, evaluation_text(found, statistics, asked=asked))


def predict(
    context: typer.Context,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE|FOLDER|TABLE...", help="PNG, JPEG, TIFF, BMP, DICOM; folders; CSV with a path."),
    ],
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder of `export`; needs no node. Default: this node's model."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="A table's column with the path. Default: node.toml's, or path.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: the terminal.")] = None,
    round: Round = None,
    json: Json = False,
) -> None:
    """Probabilities of each class for images, as CSV.

    By this hospital's model, as `evaluate` measures it; --round N for the fused model of a round.
    Or, with --model, by one that was exported, on any machine. Images that cannot be read are listed with the reason,
    and the exit code is 78 then. For research: this is no medical device.
    """
    from hsl_node.host.wrong_paths import require_place
    from hsl_node.results import asked as asked_for
    from hsl_node.results import predict

    state = state_of(context)
    if model is not None and round is not None:
        raise UsageError("--round is for this node's models, and --model holds one", remedy="leave --round out")
    if out is not None:
        require_place(out)
        asked_for.require_no_input(out, images)
    asked = asked_for.gather(images, column or asked_for.column_of(None if model else state))
    predictor = predict.open_predictor(state, model, round, progress_lines())
    if asked.left_out:
        print(f"Left out: {asked.left_out_text()}", file=sys.stderr)
    found = predict.predict(predictor, asked, progress_bar("predicting"))
    predict.write_out(predict.json_text(found) if json else predict.csv_text(found), out)
    if any(row["probabilities"] is None for row in found["images"]):
        raise predict.unreadable_error(found["images"])


def export(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the files into.")],
    round: Round = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also as ONNX, where the model can be exported.")] = False,
) -> None:
    """Write the model into a folder that predicts by itself.

    This hospital's model, as `evaluate` measures it; --round N for the fused model of a round.
    The folder holds weights, preprocessing, threshold, a card for programs and one for people, and all digests:
    `hsl-node predict --model DIR` needs nothing else.
    """
    from hsl_node.host.wrong_paths import require_folder
    from hsl_node.results import export as results

    require_folder(out)
    files, onnx_missing = results.export(state_of(context), out, round=round, onnx=onnx, report=progress_lines())
    for path in files:
        print(path)
    if onnx_missing:
        print(f"No ONNX file: {onnx_missing}", file=sys.stderr)


def report(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """One HTML file with all results inside.

    AUC per round, ROC, confusion matrices, transfers, timeline of the rounds.
    """
    from hsl_node.host.wrong_paths import require_place
    from hsl_node.results import report

    require_place(out)
    print(report.build([state_of(context)], out))
