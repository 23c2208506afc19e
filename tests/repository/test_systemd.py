"""The unit file: valid, closed as far as it can be, and still open enough for what the daemon does."""

from __future__ import annotations

import ctypes.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from confine import allowed_calls, directives
from sources import REPOSITORY

from hsl_node import errors
from hsl_node.federation import identity

UNIT = REPOSITORY / "systemd" / "hsl-node.service"
EXPOSURE_MAX = 1.5  # 0 best, 10 worst; what is left is the network, the GPU and memory that torch writes code into
INSTALLED = "/opt/hsl-node/venv/bin/hsl-node"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (package systemd)"
)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists here: `verify` looks for it."""
    text = UNIT.read_text(encoding="utf-8")
    assert INSTALLED in text
    path = tmp_path / UNIT.name
    path.write_text(text.replace(INSTALLED, shutil.which("true") or "/bin/true"), encoding="utf-8")
    return path


@needs_systemd
@pytest.mark.parametrize("drop_ins", [[], ["peers.conf.example", "images.conf.example"]], ids=["bare", "drop-ins"])
def test_systemd_finds_nothing_to_complain_about(unit: Path, drop_ins: list[str]) -> None:
    folder = unit.with_name(f"{unit.name}.d")
    folder.mkdir()
    for name in drop_ins:
        shutil.copy(REPOSITORY / "systemd" / folder.name / name, folder / name.removesuffix(".example"))
    found = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    ours = [line for line in (found.stdout + found.stderr).splitlines() if unit.stem in line]
    assert (found.returncode, ours) == (0, [])


def test_images_on_a_network_share_are_waited_for_at_boot_and_never_given_up() -> None:
    """A requirement on the mount would fail with it, and systemd starts nothing again whose dependency failed."""
    drop_in = dict(directives(REPOSITORY / "systemd" / "hsl-node.service.d" / "images.conf.example"))
    assert "remote-fs.target" in drop_in["After"].split()
    assert not {"Requires", "RequiresMountsFor", "BindsTo"} & drop_in.keys()


def test_uninstalling_removes_all_of_it_also_where_a_part_was_never_made(tmp_path: Path) -> None:
    """The page's own commands, on a system without drop-ins and without a cache."""
    text = (
        (REPOSITORY / "docs" / "administrator" / "leaving.md").read_text(encoding="utf-8").partition("## Uninstall")[2]
    )
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("    rm ")]
    there = [tmp_path / "etc/systemd/system/hsl-node.service", tmp_path / "var/lib/hsl-node", tmp_path / "opt/hsl-node"]
    for path in there:
        path.mkdir(parents=True)
    for line in lines:
        moved = re.sub(
            r" /(etc|var|opt)/", rf" {tmp_path}/\1/", line.replace("systemctl daemon-reload", "echo reloaded")
        )
        assert all(word.startswith(str(tmp_path)) for word in moved.split() if word.startswith("/")), moved
        done = subprocess.run(["bash", "-c", moved], capture_output=True, text=True, timeout=10)
        assert done.returncode == 0 and ("reloaded" in done.stdout) == ("reload" in line), done.stderr
    assert len(lines) == 2 and not any(path.exists() for path in there)


@needs_systemd
def test_overall_exposure_stays_low(unit: Path) -> None:
    shown = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    overall = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", shown.stdout)
    assert overall, shown.stdout
    assert float(overall[1]) <= EXPOSURE_MAX


def test_a_reload_reaches_the_supervisor_alone_which_handles_it() -> None:
    """`tests/whole/test_signals.py` shows that SIGHUP ends nothing."""
    assert [value for key, value in directives(UNIT) if key == "ExecReload"] == ["/bin/kill -HUP $MAINPID"]


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("MemoryDenyWriteExecute", "oneDNN makes code at run time: torch on the CPU fails"),
        ("PrivateDevices", "hides the GPU"),
        ("ProcSubset", "hides /proc/driver/nvidia"),
    ],
)
def test_directives_that_would_break_the_node_are_absent(key: str, why: str) -> None:
    assert key not in dict(directives(UNIT)), why


def test_gpu_devices_are_listed_since_the_clock_rule_closes_all_others() -> None:
    settings = list(directives(UNIT))
    assert ("ProtectClock", "yes") in settings and ("DevicePolicy", "closed") in settings
    assert {"char-nvidia rw", "char-nvidiactl rw", "char-nvidia-uvm rw"} <= {
        v for k, v in settings if k == "DeviceAllow"
    }


def test_errors_that_waiting_does_not_mend_are_not_retried() -> None:
    wanted = {errors.ConfigError.exit_code, errors.NotInitialised.exit_code, errors.AlreadyRunning.exit_code}
    assert {int(code) for code in dict(directives(UNIT))["RestartPreventExitStatus"].split()} == wanted


# What the two processes do at their lowest level; torch in the second program only, as in the daemon.
SUPERVISOR = """
import asyncio, fcntl, os, socket, sqlite3, tempfile
from pathlib import Path
import asyncssh, numpy
from hsl_node.federation import config, identity

async def main(folder):
    key = asyncssh.generate_private_key("ssh-ed25519")
    async with asyncssh.listen("127.0.0.1", 0, server_host_keys=[key], sftp_factory=True) as server:
        assert server.get_port() > 0
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(folder / "control.sock"))
    child = await asyncio.create_subprocess_exec("/bin/true")
    assert await child.wait() == 0
    await asyncio.to_thread(numpy.linalg.inv, numpy.eye(300))

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    journal = sqlite3.connect(folder / "journal.sqlite3")
    journal.execute("PRAGMA journal_mode=WAL")
    journal.execute("CREATE TABLE t (x)")
    journal.commit()
    with open(folder / "data", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"x")
        os.fsync(file.fileno())
    os.rename(folder / "data", folder / "there")
    assert os.stat(folder / "there").st_mode & 0o777 == 0o600, "umask"
    asyncio.run(main(folder))
    try:
        os.chown(folder / "there", os.getuid(), os.getgid())
    except PermissionError:
        print("confined and well")
"""
TRAINER = """
import os, tempfile, torch
torch.use_deterministic_algorithms(True)
conv, norm, linear = torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.LazyLinear(2)
net = torch.nn.Sequential(conv, norm, torch.nn.ReLU(), torch.nn.Flatten(), linear)
image_BCHW = torch.randn(4, 1, 32, 32)
with torch.autocast("cpu", torch.bfloat16):
    net(image_BCHW).float().sum().backward()
torch.optim.Adam(net.parameters(), fused=True).step()
with tempfile.TemporaryFile() as file:
    torch.save(net.state_dict(), file)
    try:
        os.fchown(file.fileno(), os.getuid(), os.getgid())
    except PermissionError:
        print("confined and well")
"""


@needs_systemd
@pytest.mark.skipif(ctypes.util.find_library("seccomp") is None, reason="libseccomp is not installed")
@pytest.mark.parametrize("program", [SUPERVISOR, TRAINER], ids=["supervisor", "trainer"])
def test_the_system_call_filter_leaves_the_daemon_what_it_needs(program: str) -> None:
    """The same calls under the unit's own filter; `chown` must be refused, which shows that the filter is on."""
    confine = REPOSITORY / "tests" / "helpers" / "confine.py"
    done = subprocess.run(
        [sys.executable, str(confine), str(UNIT), sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONPATH": str(REPOSITORY)},
    )
    assert (done.returncode, done.stdout) == (0, "confined and well\n"), done.stderr


@needs_systemd
def test_the_filter_takes_away_what_an_intruder_would_want() -> None:
    allowed = allowed_calls(UNIT)
    assert {"openat", "mmap", "futex", "renameat2", "fsync", "clone3", "sched_setaffinity"} <= allowed
    assert not {"mount", "ptrace", "chown", "bpf", "init_module", "setuid", "perf_event_open", "reboot"} & allowed


def test_a_key_handed_over_by_systemd_is_accepted_although_its_mode_shows_group_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd 254 and later give a credential an access list; its mask appears as mode 0440."""
    key = tmp_path / "node.key"
    made = identity.generate(key)
    key.chmod(0o440)
    with pytest.raises(errors.LocalStateError, match="read by others"):
        identity.load(key)

    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert identity.load(key).public == made.public

    key.chmod(0o444)
    with pytest.raises(errors.LocalStateError, match="read by others"):
        identity.load(key)
