"""All durable steps go through `host/durable.py`, each has its crash points, and those cost nothing in production."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import sources

from hsl_node.host import durable
from hsl_node.host.durable import POINTS, Step

OURS = "hsl_node.host.durable"
ONLY_HERE = {"fsync", "fdatasync", "sync", "rename", "renames", "replace", "link", "symlink"}  # of os
# Who else opens a file for writing, and why it need not survive a power loss.
WRITE_OTHERWISE = {
    "hsl_node.demo.processes": "the output of a demo's processes",
    "hsl_node.demo.setup": "the demo's images",
    "hsl_node.study.phantoms": "synthetic images",
    "hsl_node.train.lock": "a lock",
    "hsl_node.admin.keys": "a lock; keyring.toml goes through enrol.write_new",
    "hsl_node.admin.signed_documents": "an export for other people's eyes, made anew at will",
    "hsl_node.admin.support_bundle": "a support bundle, made anew at will",
    "hsl_node.sync.store.store": "a lock",
    "hsl_node.sync.store.journal_file": "a copy to be read at once of what lies on a read-only disk",
    "hsl_node.host.event_log": "the log",
    "hsl_node.host.bare_host": "the null device, where a standard stream is closed",
    "hsl_node.node.trainer": "the trainer's log",
    "hsl_node.node.peers.liveness": "a sign of life, laid anew each minute; half of one is none",
    "hsl_node.train.worker": "its standard output",
    "hsl_node.sync.store.plain_files": "an arriving part: written by its sender's requests, made durable by receive.py",
}


def calls() -> Iterator[tuple[str, ast.Call]]:
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield module, node


def name_of(node: ast.expr) -> str:
    return ast.unparse(node)


def test_only_the_durable_module_syncs_renames_and_links() -> None:
    found = {
        (module, name_of(call.func))
        for module, call in calls()
        if (isinstance(call.func, ast.Attribute) and name_of(call.func.value) == "os" and call.func.attr in ONLY_HERE)
        or name_of(call.func) in ("shutil.move", "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree")
        or (isinstance(call.func, ast.Attribute) and call.func.attr in ("hardlink_to", "symlink_to"))
        or (isinstance(call.func, ast.Attribute) and call.func.attr == "replace" and len(call.args) == 1
        and not call.keywords)  # a path's; that of a string takes two
    }  # fmt: skip
    found.discard(("hsl_node.demo.setup", "shutil.copyfile"))  # the demo's anchor set: made again with the demo
    assert found == {(OURS, f"os.{name}") for name in ("fsync", "rename", "link")}
    assert not [m for m, tree in sources().items() for n in ast.walk(tree)
                if isinstance(n, ast.ImportFrom) and n.module == "os"]  # fmt: skip


def test_a_path_is_never_renamed_by_itself() -> None:
    """`Path.rename`; a transport's rename is the other side's file."""
    renamed = {
        (module, name_of(call.func))
        for module, call in calls()
        if isinstance(call.func, ast.Attribute) and call.func.attr == "rename"
    }
    remote = {"link.rename", "self._link.rename", "self.sftp.rename"}
    ours = {(OURS, "os.rename"), (OURS, "disk.rename")}
    movers = (
        "admin.backup",
        "admin.enrol",
        "admin.rotate",
        "sync.ask",
        "sync.inbox.claim",
        "sync.inbox.home",
        "sync.store.store",
    )
    ours |= {(f"hsl_node.{m}", "durable.rename") for m in movers}
    assert {r for r in renamed if r[1] not in remote} <= ours


def test_every_durable_operation_stands_in_a_block_that_names_its_step() -> None:
    """A rename, a removal or an fsync that is a step of its own, outside any `passing`, would have no crash point."""
    outside, inside = [], 0
    for module, tree in sources().items():
        if module == OURS:
            continue
        blocks = [
            (node.lineno, node.end_lineno or 0)
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            and any("passing(" in (text := name_of(item.context_expr)) or "replacing(" in text for item in node.items)
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"durable\.(rename|sync|disk\.(rename|unlink|link))", name_of(node.func)
            ):
                if any(first <= node.lineno <= last for first, last in blocks):
                    inside += 1
                else:
                    outside.append((module, node.lineno, name_of(node.func)))
    assert outside == [] and inside >= 8


# Who writes under the name that files for people share, and what.
FOR_PEOPLE = {
    "hsl_node.commands.federation": "the federation file to be mailed",
    "hsl_node.demo.setup": "the demo's settings, made again with the demo",
    "hsl_node.results.report": "a report",
    "hsl_node.results.predict": "predictions",
    "hsl_node.results.scores": "scores of each image, for a person's own statistics",
    "hsl_node.admin.rotate": "the update to be mailed, the card",
}


def test_what_the_node_itself_reads_again_is_not_written_under_the_name_of_files_for_people() -> None:
    found = {
        module
        for module, call in calls()
        if name_of(call.func).rpartition(".")[2] == "write_new" and "step" not in {k.arg for k in call.keywords}
    }
    assert found == set(FOR_PEOPLE), "give it a step in host/durable.py, or a reason here"


def test_nothing_else_writes_a_file_that_must_last() -> None:
    writers = set()
    for module, call in calls():
        name = name_of(call.func)
        mode = [a.value for a in call.args[1:2] if isinstance(a, ast.Constant)]
        mode += [k.value.value for k in call.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
        opens = name in ("open", "os.fdopen") and any(isinstance(m, str) and set(m) & set("wax+") for m in mode)
        flags = name in ("os.open", "open_plain") and any("O_CREAT" in name_of(a) for a in call.args)
        if opens or flags or name.endswith((".write_text", ".write_bytes")):
            writers.add(module)
    assert writers - {OURS} <= set(WRITE_OTHERWISE), "give it a step in host/durable.py, or a reason here"
    assert OURS in writers


def test_each_step_is_taken_and_by_one_file() -> None:
    taken: dict[str, set[str]] = {}
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and name_of(node.value) == "Step" and node.attr.isupper():
                taken.setdefault(node.attr, set()).add(module)
    assert taken.keys() == {step.name for step in Step}
    shared = {step for step, modules in taken.items() if len(modules) > 1}
    assert shared == {"FILE_RESULT"}, "a crash point says where the process dies: one file for each step"


def test_every_point_has_a_name_of_its_own() -> None:
    assert len(set(POINTS)) == len(POINTS)
    assert {p.rpartition(":")[2] for p in POINTS} == {"before", "renaming", "renamed", "after"}


# ------------------------------------------------------------------ the system calls


def test_threat_23_a_write_returns_only_after_the_system_has_synced_file_then_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tests put a disk of their own below the module; this one sees what the real one asks the system for."""
    synced: list[tuple[str, str]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        content = "" if os.path.isdir(f"/proc/self/fd/{descriptor}") else os.pread(descriptor, 99, 0).decode()
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), content))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    durable.write(tmp_path / "file", b"whole", Step.FILE_RESULT)
    assert synced == [("file.tmp", "whole"), (tmp_path.name, "")]


# ------------------------------------------------------------------ the trigger

CODE = """
import sys
from pathlib import Path
from hsl_node.host.durable import Step, write
for n in range(3):
    write(Path(sys.argv[1]), str(n).encode(), Step.FILE_RESULT)
"""


def run(path: Path, crash: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "HSL_CRASH_AT"}
    if crash is not None:
        environment["HSL_CRASH_AT"] = crash
    return subprocess.run(
        [sys.executable, "-c", CODE, str(path)], env=environment, capture_output=True, text=True, timeout=60
    )


def test_a_process_dies_at_the_passage_that_it_is_told_and_only_once(tmp_path: Path) -> None:
    path, mark = tmp_path / "file", tmp_path / "mark"
    crash = f"file.result:renaming#2 {mark}"
    assert run(path, crash).returncode == -9
    assert path.read_text() == "0" and (tmp_path / "file.tmp").exists() and mark.read_text().isdigit()
    assert run(path, crash).returncode == 0
    assert path.read_text() == "2" and not (tmp_path / "file.tmp").exists()


def test_without_the_variable_there_is_nothing_to_trigger(tmp_path: Path) -> None:
    assert run(tmp_path / "file", None).returncode == 0
    assert durable._crash is None  # of this process, and so of every one that is not told otherwise


@pytest.mark.parametrize("crash", ["nowhere:before x", "file.result:before", "file.result x"])
def test_an_unknown_point_is_refused_at_once(tmp_path: Path, crash: str) -> None:
    done = run(tmp_path / "file", crash)
    assert done.returncode == 1 and "HSL_CRASH_AT" in done.stderr
    assert not (tmp_path / "file").exists()
