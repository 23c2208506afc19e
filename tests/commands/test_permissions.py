"""Files of another owner, after a copy or a restore made as root: named with their owner, and with what mends it.

Root without its capabilities over files is a plain user: the commands run so, on files that were given to another.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hsl_node.admin import backup, doctor
from hsl_node.host import permissions
from hsl_node.host.layout import Layout

OTHER = 12345  # nobody here has this number
PLAIN = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-chown,-fowner", "--inh-caps=-all"]
DOCTOR = """
import json, sys
from pathlib import Path
from hsl_node.admin import doctor
doctor._torch = lambda device: "left out: it takes seconds"
print(json.dumps([vars(c) for c in doctor.examine(Path(sys.argv[1]))]))
"""
FOLDERS = ("keys", "outbox", "inbox", "quarantine", "fused", "trainer", "evidence", "cache", "log", "run")


@pytest.fixture
def state(two: tuple[Path, Path]) -> Path:
    """A node's state directory with a file in every folder; root's, as pytest is."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, and setpriv")
    layout = Layout(two[0])
    layout.make()
    for folder in FOLDERS:
        (layout.state / folder / "something").write_bytes(b"")
        (layout.state / folder / "something").chmod(0o600)
    return layout.state


def plainly(state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*PLAIN, sys.executable, "-m", "hsl_node", "--state", str(state), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def diagnosed(state: Path) -> dict[str, dict[str, str]]:
    command = [*PLAIN, sys.executable, "-c", DOCTOR, str(state)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return {c["name"]: c for c in json.loads(done.stdout)}


def give_away(path: Path) -> None:
    for each in (path, *path.rglob("*")):
        os.chown(each, OTHER, OTHER)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", FOLDERS)
def test_doctor_names_the_folder_its_owner_and_the_command(state: Path, name: str) -> None:
    assert diagnosed(state)["files"]["outcome"] == "ok"
    give_away(state / name)
    checks = diagnosed(state)
    assert checks["files"]["outcome"] == "failed"
    assert f"{name}/ (of #{OTHER})" in checks["files"]["text"]
    assert checks["files"]["fix"] == f"as root: chown -R root {state}"
    assert "images" in checks or name == "keys", "the other checks are made all the same"


@pytest.mark.parametrize("name", ["node.toml", "federation.toml", "keys/node_ed25519", "run/lock"])
def test_a_single_file_is_named_too(state: Path, name: str) -> None:
    (state / name).touch(0o600)
    (state / name).chmod(0o600)
    give_away(state / name)
    files = diagnosed(state)["files"]
    assert f"{name} (of #{OTHER})" in files["text"] and "chown -R root" in files["fix"]


def test_of_many_only_the_first_few_are_named(state: Path) -> None:
    for name in FOLDERS:
        give_away(state / name)
    found = permissions.told(state, [state / name for name in FOLDERS])
    assert found.message.count("(of ") == permissions.NAMED and found.message.endswith(", and 7 more")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "words", "code"),
    [
        ("keys/node_ed25519", ["card"], 15),
        ("keys", ["start"], 15),
        ("node.toml", ["start"], 78),
        ("log", ["start"], 15),
        ("run", ["status"], 15),
        ("run", ["start"], 15),
        ("fused", ["start"], 15),
        ("quarantine", ["start"], 15),
    ],
)
def test_a_command_that_meets_such_a_file_says_the_same(state: Path, name: str, words: list[str], code: int) -> None:
    give_away(state / name)
    done = plainly(state, *words)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert f"#{OTHER}" in done.stderr and f"as root: chown -R root {state}" in done.stderr, done.stderr
    assert "backup" not in done.stderr and "UTF-8" not in done.stderr


def test_somebody_elses_state_directory_asks_for_its_owner_first(state: Path) -> None:
    give_away(state)
    state.chmod(0o755)
    done = plainly(state, "status")
    assert f"sudo -u '#{OTHER}'" in done.stderr and f"chown -R root {state}" in done.stderr, done.stderr


def test_where_no_state_directory_is_nothing_is_said_of_its_files(tmp_path: Path) -> None:
    assert [c.outcome for c in doctor.examine(tmp_path / "none") if c.name in ("state directory", "files")] == [
        "failed"
    ]


def test_ones_own_file_without_its_rights_is_a_matter_of_chmod(state: Path) -> None:
    (state / "log").chmod(0o500)
    files = diagnosed(state)["files"]
    assert files["outcome"] == "failed" and f"chmod -R u+rwX {state}" in files["fix"]


def test_a_new_volume_with_its_lost_and_found_takes_a_restore_and_is_sound(state: Path, tmp_path: Path) -> None:
    """Every ext4 file system has that folder, of root alone, and the daemon's user may not even look into it."""
    backup.backup(state, tmp_path / "ash.tar")
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(parents=True)
    (volume / "lost+found").chmod(0o700)
    (volume / "lost+found" / "#12").touch()
    give_away(volume / "lost+found")
    done = plainly(volume, "restore", str(tmp_path / "ash.tar"))
    assert done.returncode == 0, done.stderr
    assert diagnosed(volume)["files"]["outcome"] == "ok"


def test_root_may_restore_into_a_volume_whose_lost_and_found_holds_something(state: Path, tmp_path: Path) -> None:
    backup.backup(state, tmp_path / "ash.tar")
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    (tmp_path / "volume" / "lost+found" / "#12").touch()
    backup.restore(tmp_path / "volume", tmp_path / "ash.tar")
    assert (tmp_path / "volume" / "lost+found" / "#12").exists()


def test_a_start_as_another_user_than_the_state_directorys_stays_down(state: Path) -> None:
    """No later start by that user goes better: under systemd it came again every ten seconds for ever."""
    give_away(state)
    done = plainly(state, "start")
    assert done.returncode == 78, done.stderr
    assert f"#{OTHER}" in done.stderr and "What to do: run this as" in done.stderr
