"""The demo: its folder, its hospitals from a table, and whole runs with real daemons that leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from federations import FederationOf
from trained_state import make_state

from hsl_node.demo import demo, processes, setup, view
from hsl_node.demo.processes import DemoFailed
from hsl_node.demo.setup import Hospital, find_columns, find_table, ordered_classes, peer_names, prepare_folder
from hsl_node.errors import DataError, NotRunning, UsageError
from hsl_node.federation.names import parse_peer
from hsl_node.federation.node_toml import DataConfig, load_node
from hsl_node.federation.plan import Plan
from hsl_node.results.facts import agreement, read
from hsl_node.study import phantoms

WAIT_S = 120  # a bound for a broken run; never what decides a test
LONG = ("--rounds", "200", "--epochs", "1", "--image-size", "16", "--method", "fedavg", "--backbone", "tiny")


def nothing_runs(_state: Path) -> None:
    raise NotRunning("nobody")


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


# ------------------------------------------------------------------ the folder


def test_folder_that_is_not_a_demo_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a demo"):
        prepare_folder(tmp_path, nothing_runs)
    assert (tmp_path / "nodes" / "thesis.txt").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["nodes"]


def test_second_demo_replaces_the_first_and_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    target = tmp_path / "hsl-demo"
    assert not prepare_folder(target, nothing_runs)
    (target / "nodes" / "harbour").mkdir(parents=True)
    (target / "report.html").write_text("old")
    (target / "my notes.txt").write_text("keep")
    assert prepare_folder(target, nothing_runs)
    assert sorted(os.listdir(target)) == [".hsl-demo", "my notes.txt"]


def test_replacing_a_demo_follows_no_link_out_of_it(tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "hsl-demo", tmp_path / "elsewhere"
    prepare_folder(target, nothing_runs)
    (elsewhere / "harbour").mkdir(parents=True)
    (target / "images").symlink_to(elsewhere)
    prepare_folder(target, nothing_runs)
    assert not (target / "images").exists()
    assert (elsewhere / "harbour").is_dir()


def test_daemon_that_an_interrupted_demo_left_is_stopped_before_its_folder_goes(tmp_path: Path) -> None:
    prepare_folder(tmp_path, nothing_runs)
    (tmp_path / "nodes" / "harbour").mkdir(parents=True)
    asked: list[tuple[str, bool]] = []
    prepare_folder(tmp_path, lambda state: asked.append((state.name, state.is_dir())))
    assert asked == [("harbour", True)]


# ------------------------------------------------------------------ hospitals from a table


def test_group_values_become_valid_and_different_peer_names() -> None:
    groups = ["GE Logiq 7 @10-14MHz", "GE Logiq 5 @10-12MHz", "Toshiba Aplio 300 @12-14 MHz", "U-Systems @10-14MHz"]
    assert list(peer_names(groups).values()) == ["ge-logiq-7", "ge-logiq-5", "toshiba-aplio-300", "u-systems"]


def test_difficult_group_values_become_valid_and_different_peer_names() -> None:
    groups = ["7", "Klinik Süd", "Klinik S d", "x" * 50, "x" * 50 + "y", "A @1", "A @2", "@@@", "_", "-", "é"]
    names = peer_names(groups)
    assert len(set(names.values())) == len(groups)
    assert [parse_peer(n) for n in names.values()] == list(names.values())


def test_class_that_means_nothing_found_comes_first() -> None:
    assert ordered_classes({"malignant", "benign"}) == ("benign", "malignant")
    assert ordered_classes({"Pneumonia", "Normal"}) == ("Normal", "Pneumonia")
    assert ordered_classes({"1", "0"}) == ("0", "1")


def test_columns_are_recognised_by_their_usual_names() -> None:
    header = ["File", "class", "label_malignant", "patient", "device"]
    assert find_columns(Path("t.csv"), header) == {"path": "File", "label": "class", "patient": "patient", "split": ""}


def test_table_without_a_label_column_names_the_columns_it_has() -> None:
    with pytest.raises(DataError, match="label") as caught:
        find_columns(Path("t.csv"), ["file", "device"])
    assert "file, device" in str(caught.value)


def test_two_tables_in_a_folder_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("path,label\n")
    with pytest.raises(UsageError, match="2 tables"):
        find_table(tmp_path)
    (tmp_path / "metadata.csv").write_text("path,label\n")
    assert find_table(tmp_path).name == "metadata.csv"


def test_unknown_column_to_group_by_names_the_columns_there_are(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file,class,device\na.png,benign,A\n")
    with pytest.raises(UsageError, match="no column 'scanner'") as caught:
        setup.table_hospitals(tmp_path, tmp_path, "scanner")
    assert "file, class, device" in str(caught.value)


def test_data_without_group_by_is_a_usage_error_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="belong together"):
        demo.run(tmp_path / "out", data=tmp_path, plan={})
    assert not (tmp_path / "out").exists()


def test_each_hospital_of_a_real_table_has_only_its_own_rows(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file,class,device\na.png,benign,A\nb.png,malignant,B\nc.png,benign,B\n")
    hospitals, classes = setup.table_hospitals(tmp_path / "out", tmp_path, "device")
    assert classes == ("benign", "malignant")
    assert [h.data.filter for h in hospitals] == [{"device": "A"}, {"device": "B"}]
    assert [h.origin for h in hospitals] == ["1 images, device A", "2 images, device B"]
    assert all(h.data.path == (tmp_path / "metadata.csv").absolute() for h in hospitals)


# ------------------------------------------------------------------ processes


def enrolled(tmp_path: Path, count: int = 2) -> tuple[Hospital, ...]:
    """Nodes enrolled by the real code, without a readable image: their trainers cannot start."""
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "one.png").write_bytes(b"")
    hospitals = tuple(
        Hospital(name, tmp_path / "nodes" / name, DataConfig(path=tmp_path / "nowhere"), "none")
        for name in ("ash", "birch", "cedar")[:count]
    )
    setup.enrol_all(tmp_path, hospitals, Plan(method="fedavg"), None, threads=1)
    return hospitals


def test_enrolment_keeps_each_hospitals_settings_beside_the_real_init(tmp_path: Path) -> None:
    hospitals = enrolled(tmp_path)
    node = load_node(hospitals[0].state)
    assert (node.name, node.train.threads, node.data.path) == ("ash", 1, tmp_path / "nowhere")
    assert node.listen == node.address
    federations = {(h.state / "federation.toml").read_bytes() for h in hospitals}
    assert len(federations) == 1


def test_daemon_that_dies_ends_the_demo_with_its_last_lines_and_no_process_stays(tmp_path: Path) -> None:
    hospitals = enrolled(tmp_path)
    broken = hospitals[1].state / "node.toml"
    broken.write_text(broken.read_text().replace("listen", "lisen"))
    with pytest.raises(DemoFailed) as caught, processes.running(hospitals, "start") as daemons:
        processes.wait_finished(daemons, lambda snapshots: None)
    assert caught.value.exit_code == 78
    assert "birch" in str(caught.value)
    assert "did you mean 'listen'?" in str(caught.value)
    assert all(d.popen.poll() is not None for d in daemons)


def test_log_lines_of_a_dead_process_are_safe_for_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"first\n" + b"x\n" * 50 + b"\x1b[2Jevil \xff\n")
    lines = processes.tail(tmp_path / "log", 3).splitlines()
    assert lines[-1] == "  \\x1b[2Jevil \ufffd"
    assert len(lines) == 3


def test_fused_models_that_differ_are_said_loudly(tmp_path: Path, federation_of: FederationOf) -> None:
    members = federation_of(2, plan=Plan(method="fedavg", rounds=2))
    states = [
        make_state(tmp_path, members, "ash", claims={"birch": "9" * 64}),
        make_state(tmp_path, members, "birch", fused=("1" * 64, "9" * 64)),
    ]
    agreed = agreement([read(s) for s in states])
    text = demo.closing([], agreed, tmp_path / "report.html", 1.0)
    assert f"THE FUSED MODELS DIFFER in round 2: ash {'2' * 12}, birch {'9' * 12}" in text
    assert demo.exit_code(agreed) == 14
    assert demo.exit_code(agreed[:1]) == 0


def test_the_summary_repeats_the_warnings_and_an_early_end_is_explained(
    tmp_path: Path, federation_of: FederationOf, capsys: pytest.CaptureFixture[str]
) -> None:
    agreed = agreement([read(make_state(tmp_path, federation_of(2, plan=Plan(method="fedavg", rounds=2)), "ash"))])
    warned = {("ash", "unusual birch"): "birch: for 2 rounds parts of its update\x1b[31m point against the others'"}
    text = demo.closing([], agreed, tmp_path / "report.html", 1.0, warned)
    assert "Warnings on the way" in text and "  ash: birch: for 2 rounds parts" in text and "\x1b" not in text
    assert "Warnings" not in demo.closing([], agreed, tmp_path / "report.html", 1.0)
    plan = Plan(method="fedavg", rounds=12)
    assert "After round 9 of 12 no hospital had gained anything for 3 rounds" in demo._ended(9, plan, 1.0)
    assert "After" not in demo._ended(12, plan, 1.0)
    lines = view.Lines()
    for word in ("(nothing yet)", "decoding images, 3 of 9", "decoding images, 4 of 9", "epoch 3", "epoch 4", "done"):
        lines.evaluations({"ash": word})
    shown = [line.split(" s  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["ash: decoding images", "ash: alone, epoch 4", "ash: evaluated"]


@pytest.fixture
def tiny_hospitals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantoms, "HOSPITALS", tuple(replace(h, patients=16) for h in phantoms.HOSPITALS[:2]))


def test_demo_trains_compares_and_reports_and_leaves_no_process(
    tmp_path: Path, tiny_hospitals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The main promise, in the smallest size: two real daemons, one round, exit code 0."""
    plan = {"rounds": 1, "epochs_per_round": 1, "image_size": 16, "batch_size": 8}
    code = demo.run(tmp_path / "d", hospitals=2, plan=plan)
    text = capsys.readouterr().out
    assert code == 0, text
    assert "All 2 hospitals hold the same fused model, byte for byte, in each of 1 rounds" in text
    assert "no patient stands behind them" in text
    nodes = [read(s) for s in sorted((tmp_path / "d" / "nodes").iterdir())]
    assert [n.phase for n in nodes] == ["finished", "finished"]
    assert len({n.fused[-1]["sha256"] for n in nodes}) == 1
    for node in nodes:
        assert node.evaluation is not None
        row = next(line for line in text.splitlines() if line.startswith(f"{node.name} "))
        for kind in ("alone", node.evaluation["kind"]):
            value = node.evaluation["test"][kind]["auc"]
            assert (f"{value:.3f}" if value is not None else "undefined") in row
    assert "handwritten digits" in (tmp_path / "d" / "report.html").read_text()
    assert processes_of(tmp_path) == []


def test_interrupted_demo_ends_every_process_and_the_next_one_replaces_it(tmp_path: Path) -> None:
    target = tmp_path / "d"
    data = two_sites(tmp_path / "images")
    command = [sys.executable, "-m", "hsl_node.cli", "demo", "--out", str(target), *LONG]
    command += ["--data", str(data), "--group-by", "device"]
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + WAIT_S
        while not (running := [p for p in processes_of(target) if "start" in p]):
            assert process.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert running  # the interruption hits a demo with daemons up
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
    finally:
        process.kill()
    assert processes_of(target) == []
    assert prepare_folder(target, nothing_runs)


def test_interruption_in_the_moment_of_a_start_ends_the_process_that_was_just_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start_and_be_interrupted(hospital: Hospital, words: Sequence[str]) -> processes.Process:
        started.append(subprocess.Popen(["sleep", "600"]))
        signal.raise_signal(signal.SIGINT)
        return processes.Process(hospital, words[0], started[-1], tmp_path / "log")

    monkeypatch.setattr(processes, "_start", start_and_be_interrupted)
    hospital = Hospital("ada", tmp_path, DataConfig(path=tmp_path), "nothing")
    with pytest.raises(KeyboardInterrupt), processes.running([hospital, hospital], "start"):
        pytest.fail("two were started though the first was interrupted")
    assert [process.poll() is not None for process in started] == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def two_sites(folder: Path) -> Path:
    """A table of two scanners' images, with the column names of a public data set."""
    rows = ["file,class,patient,device"]
    for hospital in phantoms.HOSPITALS[:2]:
        table = phantoms.write(folder / hospital.name, replace(hospital, patients=16), seed=1, size=32)
        for line in table.read_text().splitlines()[1:]:
            path, label, patient = line.split(",")
            rows.append(f"{hospital.name}/{path},{label},{hospital.name}-{patient},Scanner {hospital.name}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def processes_of(folder: Path) -> list[list[str]]:
    """Command lines of the processes (daemons, trainers, evaluations) that work in a folder, the demo itself aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            except OSError:
                continue
            if str(folder) in " ".join(words) and "demo" not in words:
                found.append(words)
    return found
