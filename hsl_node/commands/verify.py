"""verify: everything kept here, checked once more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsl_node.commands.shared import RESULTS, Json, state_of
from hsl_node.host.files import require_new
from hsl_node.host.terminal import print_json, progress_bar
from hsl_node.host.units import figure, table
from hsl_node.host.wrong_paths import require_folder

if TYPE_CHECKING:
    from hsl_node.admin.verify import Findings, ProofFound, RoundReport


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=RESULTS, epilog="Example: hsl-node verify --export audit")(verify)


def verify(
    context: typer.Context,
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the signed documents for stock ssh-keygen; DIR/check.sh runs it."),
    ] = None,
    json: Json = False,
) -> None:
    """Check every manifest, receipt and checkpoint once more.

    Signatures, digests, the chain from fusion to fusion; fusions whose inputs are still here are computed again. Proof
    that a peer signed two things is shown, and exported too. What was lost, a document with a disk, say, or the best
    fused model, is named and is no error. Exit code 14: something is wrong, and is named.
    """
    from hsl_node.admin import signed_documents
    from hsl_node.admin import verify as audit

    if export is not None:
        if not export.exists():
            require_folder(export)
        require_new(export)
    state = state_of(context)
    if export is None:
        found = audit.examine(state, progress_bar("rounds"))
    else:
        documents = signed_documents.Export(export)
        try:
            found = audit.examine(state, progress_bar("rounds"), documents.add)
            documents.finish(found.keyring)
        except BaseException:
            shutil.rmtree(export, ignore_errors=True)  # half an export would be in the way of the next
            raise
    if json:
        print_json(found.as_json())
    else:
        print(_text(found))
        if export is not None:
            print(f"wrote {documents.count} documents: sh {export / 'check.sh'}")
    audit.require_sound(found)


def _text(found: Findings) -> str:
    rows = [row for _, report in sorted(found.rounds.items()) for row in _rows(report)]
    lines = [table(("round", "peer", "images", "AUC", "checkpoint", "fused"), rows, right=(0, 2, 3))] if rows else []
    lines += ["", *(_accusation(proof) for proof in found.proofs)] if found.proofs else []
    lines += ["", *(f"DEFECT  {defect}" for defect in found.defects)] if found.defects else []
    lines += ["", *(f"LOST    {lost}" for lost in found.lost)] if found.lost else []
    what_is_here = "what is here is as signed" if found.lost else "all is as signed"
    lines += ["", f"{found.documents} signed documents checked" + ("" if found.defects else f": {what_is_here}")]
    return "\n".join(lines)


def _accusation(proof: ProofFound) -> str:
    first, second = (digest[:12] for digest in proof.manifests)
    return f"PROOF   round {proof.round}: {proof.peer} signed two different manifests, {first} and {second}"


def _rows(report: RoundReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for number, (peer, said) in enumerate(sorted(report.contributors.items())):
        checkpoint = str(said["sha256"])[:12] if said["bytes"] else "statement"
        value = said["score"]
        rows.append((str(report.round), peer, str(said["samples"]), figure(value if isinstance(value, float) else None),
                     checkpoint, _fusion(report) if number == 0 else ""))  # fmt: skip
    return rows


def _fusion(report: RoundReport) -> str:
    if report.fused is None:
        return "not fused"
    how = "computed again" if report.recomputed else "initial" if report.round == 0 else "as recorded"
    how = "lost" if report.lost else how
    return f"{report.fused[:12]} {how}"
