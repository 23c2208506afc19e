"""What leaves the machine, and what is written into logs: a patient's name planted everywhere must turn up nowhere."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster import Cluster
from pictures import write_dicom, write_png

from hsl_node import __version__
from hsl_node.admin import doctor, enrol, support_bundle
from hsl_node.federation import identity
from hsl_node.federation.plan import Plan
from hsl_node.host.layout import Layout
from hsl_node.train import worker

CANARY = "Xaverkowski"
PLAN = Plan(
    method="fedavg", classes=("dark", "bright"), rounds=1, epochs_per_round=1, image_size=16, batch_size=8,
    backbone="tiny",
)  # fmt: skip


def hospital(root: Path) -> dict[str, Any]:
    """Images of a patient whose name is in every place a hospital might put it; gives the [data] table."""
    folder = root / f"nas-{CANARY.lower()}.hospital.example" / f"{CANARY}, Anna"
    rows, rng = [], np.random.default_rng(1)
    for label, level in ((f"{CANARY}-D", 60), (f"{CANARY}-B", 180)):
        for n in range(15):
            name = f"{CANARY}_{label}_{n}." + ("dcm" if n % 2 else "png")
            pixels = rng.normal(level, 30, (20, 20)).clip(0, 255).astype(np.uint8)
            if n % 2:
                write_dicom(folder / name, pixels, PatientID=f"{CANARY}{n}", PatientName=f"{CANARY}^Anna",
                            InstitutionName=CANARY, StudyDescription=f"{CANARY} {n}")  # fmt: skip
            else:
                write_png(folder / name, pixels)
            rows.append({f"{CANARY}_file": name, f"{CANARY}_label": label, f"{CANARY}_pat": f"{CANARY} {n} {label}",
                         f"{CANARY}_use": f"{CANARY} yes"})  # fmt: skip
    table = folder / f"{CANARY}.csv"
    table.write_text(",".join(rows[0]) + "\n" + "".join(",".join(r.values()) + "\n" for r in rows))
    return {
        "path": str(table),
        "columns": {"path": f"{CANARY}_file", "label": f"{CANARY}_label", "patient": f"{CANARY}_pat"},
        "labels": {f"{CANARY}-D": "dark", f"{CANARY}-B": "bright"},
        "filter": {f"{CANARY}_use": f"{CANARY} yes"},
        "exclude": [f"{CANARY}_gone.png"],
    }


def holding_the_canary(folder: Path) -> list[str]:
    """Files below a folder that hold the name, in their bytes or in their own names."""
    found = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    assert found
    needle = CANARY.lower().encode()
    return [str(p.relative_to(folder)) for p in found if needle in p.read_bytes().lower() or CANARY in p.name]


def hsl(state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hsl_node", "--state", str(state), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_threat_19_a_patients_name_is_in_no_log_manifest_receipt_status_or_bundle(tmp_path: Path) -> None:
    """Real trainers on real files. After the run only node.toml, where the operator wrote it, holds the name."""
    data = hospital(tmp_path)
    node = {"data": data, "train": {"threads": 1, "device": "cpu"}}
    out = tmp_path / "bundle.tar.gz"
    with Cluster(tmp_path / "nodes", ("ash", "birch"), PLAN, trainer=None, node=node) as cluster:
        cluster.start_all()
        cluster.wait_finished(every_s=0.2)
        state = cluster.layout("ash").state
        written = hsl(state, "support-bundle", "--out", str(out))
        assert written.returncode == 0, written.stderr
        shown = [hsl(state, *w) for w in (("support-bundle", "--list"), ("status", "--json"), ("logs", "-n", "1000"))]
        for name in cluster.names:
            assert cluster.stop(name) == 0
        assert holding_the_canary(tmp_path / "nodes") == ["ash/node.toml", "birch/node.toml"]
    assert len(holding_the_canary(Path(data["path"]).parent)) == 31, "it was planted"
    for done in shown:
        assert done.returncode == 0 and CANARY.lower() not in done.stdout.lower()
    files = contents(out)
    assert CANARY.lower() not in "".join(files.values()).lower()
    assert str(tmp_path) not in "".join(files.values()) and "127.0.0.1" not in "".join(files.values())
    assert oct(out.stat().st_mode & 0o777) == "0o600"
    assert json.loads(files["status.json"])["state"] == "finished"
    events = [e["event"] for e in json.loads(files["log.json"])]
    assert {"started", "fused", "delivered"} <= set(events), "it is of use"
    assert json.loads(files["settings.json"])["data"] == {
        "path_set": True, "source": "table", "filters": 1, "columns_renamed": 3, "labels_renamed": 2, "excluded": 1,
        "window_set": False,
    }  # fmt: skip
    assert json.loads(files["plan.json"])["schema"]["tensors"] > 10
    assert {c["outcome"] for c in json.loads(files["doctor.json"])} <= {"ok", "warning", "failed", "skipped"}


def contents(out: Path) -> dict[str, str]:
    with tarfile.open(out) as archive:
        assert all(m.isfile() and m.uname == "" and m.uid == 0 for m in archive.getmembers())
        found = {m.name: archive.extractfile(m) for m in archive.getmembers()}
        return {Path(n).name: f.read().decode() for n, f in found.items() if f is not None}


@pytest.mark.sample(4)
@pytest.mark.parametrize("broken", ["garbage", "missing", "label", "folder"])
def test_threat_19_images_that_cannot_be_used_are_named_to_the_operator_and_in_no_log(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start ends and says on the terminal which file it is; the logs and the bundle do not."""
    monkeypatch.setattr(doctor, "_torch", lambda device: "left out: it takes seconds")
    data = hospital(tmp_path)
    table = Path(data["path"])
    match broken:
        case "garbage":
            (table.parent / f"{CANARY}_{CANARY}-D_0.png").write_bytes(b"no image " + CANARY.encode())
        case "missing":
            (table.parent / f"{CANARY}_{CANARY}-D_0.png").unlink()
        case "label":
            table.write_text(table.read_text().replace(f",{CANARY}-D,", f",{CANARY}-Q,", 1))
        case "folder":
            data["path"] = str(table.parent / f"{CANARY} unmounted")
    with Cluster(tmp_path / "nodes", ("ash", "birch"), PLAN, trainer=None, node={"data": data}) as cluster:
        assert cluster.start("ash").wait(120) == (15 if broken == "folder" else 78)
        state = cluster.layout("ash").state
        assert CANARY in cluster.output("ash"), "the operator is told"
        (state / "log" / "output.txt").unlink()  # that was the terminal
        assert [f for f in holding_the_canary(state) if f != "node.toml"] == []
        files = support_bundle.collect(state)
    assert CANARY.lower().encode() not in b"".join(files.values()).lower()


def test_threat_19_an_exception_in_the_trainer_is_logged_without_what_it_quotes() -> None:
    said = [
        worker._said(FileNotFoundError(2, "No such file or directory", f"/nas/{CANARY}.png")),
        worker._said(ValueError(f"could not convert string to float: '{CANARY}'")),
        worker._said(KeyError(CANARY)),
    ]
    assert said == ["FileNotFoundError: No such file or directory", "ValueError", "KeyError"]
    assert "out of memory" in worker._said(RuntimeError("CUDA out of memory"))


# ---------------------------------------------------------------- the list of what may go out


SECRETS = [
    f"/nas/{CANARY}/1.png", f"C:\\{CANARY}\\x", f"{CANARY}.dcm", f"\\\\{CANARY}\\share",
    f"{CANARY.lower()}.hospital.org:22", f"user@{CANARY}", f"'{CANARY}, Anna'", f'"{CANARY}"', f"smb://{CANARY}",
    f"./{CANARY}",
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_a_place_or_quotation_in_free_text_is_taken_out(secret: str) -> None:
    text = support_bundle.without_places(f"sending to {secret} failed: connection reset")
    assert CANARY.lower() not in text.lower()
    assert "failed: connection reset" in text or "connection reset" in text


def test_fields_that_are_not_on_the_list_are_left_out_whatever_they_hold() -> None:
    event = {"time": "t", "level": "info", "logger": "hsl_node.node.daemon", "event": "epoch", "round": 3, "score": 0.5,
             "path": CANARY, "text": CANARY, "reason": f"{CANARY} is gone", "patient": CANARY, "sha256": "ab12",
             "traceback": [f'  File "/opt/{CANARY}/hsl_node/node.py", line 3, in run', f"ValueError: {CANARY}",
                           CANARY]}  # fmt: skip
    kept = support_bundle._event(event)
    assert CANARY not in json.dumps(kept)
    assert (kept["round"], kept["sha256"]) == (3, "ab12")
    assert kept["traceback"] == ["hsl_node/node.py line 3, in run", "ValueError"]


def test_a_version_passes_and_an_address_in_its_place_does_not() -> None:
    passed = ["0.1.0", "1.2", "0.2.0rc1", "1.0.dev3"]
    assert [support_bundle.allowed({"version": v})["version"] for v in passed] == passed
    for other in ("192.0.2.17", f"{CANARY}.1", "1.2/x", "0.1.0\n"):
        assert support_bundle.allowed({"version": other})["version"] == "..."
    assert support_bundle.allowed({"receipt": "0.1.0"})["receipt"] == "...", "elsewhere it may be a file's name"


def test_what_a_library_logs_is_not_passed_on() -> None:
    event = {"time": "t", "level": "warning", "logger": "pydicom", "event": f"invalid value {CANARY}"}
    assert CANARY not in json.dumps(support_bundle._event(event))


def test_threat_20_control_characters_of_a_peer_reach_no_terminal_by_way_of_the_bundle() -> None:
    event = {"time": "t", "level": "warning", "logger": "hsl_node.sync.send.push", "event": "push failed, trying again",
             "peer": "\x1b[31mbirch", "reason": "a\x1b]0;title\x07 b\nc"}  # fmt: skip
    kept = support_bundle._event(event)
    assert all(c.isprintable() for value in kept.values() for c in str(value)), kept


def test_a_bundle_is_made_of_a_node_that_was_never_started_and_never_over_another_file(tmp_path: Path) -> None:
    state = tmp_path / "state"
    enrol.init(state, name="mercy", address="127.0.0.1:8922", listen=None, data=None)
    files = support_bundle.collect(state)
    assert json.loads(files["status.json"])["version"] == __version__
    assert json.loads(files["rounds.json"]) == {"failed": "NotInitialised"}
    assert b"PRIVATE KEY" not in b"".join(files.values())
    assert identity.load(Layout(state).key).key.export_private_key("openssh")[40:80] not in b"".join(files.values())
    out = tmp_path / "b.tar.gz"
    support_bundle.write(files, out)
    with pytest.raises(FileExistsError):
        support_bundle.write(files, out)
