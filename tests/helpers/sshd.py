"""A real OpenSSH sshd on loopback, set up as OPERATIONS and `hsl-node inbox provision` say, for one account: our own.

with Sshd(tmp_path / "sshd", accepts=public_key) as server:
    server.port, server.host_key, server.user, server.home      # home holds parts/, inbox/, receipts/
    server.kill()       # SIGKILL, sessions included; server.start(): again, on another port, with the same files

Runs as root and as an ordinary user, without a chroot (which needs root): the account starts in its home folder.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import pytest
from ports import free_ports

REQUESTS = "open,close,read,write,lstat,fstat,stat,opendir,readdir,realpath,rename,remove,mkdir,fsync,statvfs,limits"
_login_works = False
START_S = 30  # a bound for a broken set-up; never what decides a test


class Sshd:
    def __init__(self, folder: Path, *, accepts: str, requests: str = REQUESTS, home: Path | None = None) -> None:
        """`accepts`: the public key that may log in. `requests`: what `internal-sftp -p` lets through."""
        self.folder = folder
        self.home = home or folder / "home"
        self.user = getpass.getuser()
        self.port = 0
        self._program = _find_sshd()
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("parts", "inbox", "receipts"):
            (self.home / name).mkdir(parents=True)
        folder.mkdir(exist_ok=True)
        _keygen(folder / "host")
        _keygen(folder / "probe")
        self.host_key = " ".join((folder / "host.pub").read_text().split()[:2])
        (folder / "keys").write_text(accepts + "\n" + (folder / "probe.pub").read_text())
        self._requests = requests

    def __enter__(self) -> Sshd:
        self.start()
        return self

    def start(self) -> None:
        for _ in range(5):  # the free port may be taken by the time sshd wants it
            (self.port,) = free_ports(1)
            config = self.folder / "config"
            config.write_text(self._config())
            with open(self.folder / "log", "wb") as log:
                self._process = subprocess.Popen([self._program, "-D", "-e", "-f", str(config)], stderr=log)
            if self._is_up():
                self._require_login()
                return
            self.stop()
        pytest.skip(f"sshd does not start here: {self.log()[-300:]}")

    def __exit__(self, kind: type | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        if self._process:
            for pid in [self._process.pid, *_below(self._process.pid)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def _is_up(self) -> bool:
        assert self._process is not None
        until = time.monotonic() + START_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                    return probe.recv(4) == b"SSH-"
            except OSError:
                time.sleep(0.02)
        return False

    def _require_login(self) -> None:
        """Skip where sshd lets nobody in: a locked account, a user without a shell. Asked once in a test run."""
        global _login_works
        if not _login_works:
            options = ["IdentitiesOnly=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
            command = ["sftp", "-q", "-b", "-", "-F", "none", "-P", str(self.port), "-i", str(self.folder / "probe")]
            command += [word for option in options for word in ("-o", option)]
            tried = subprocess.run([*command, f"{self.user}@127.0.0.1"], input=b"ls parts\n", capture_output=True)
            if tried.returncode != 0:
                self.stop()
                pytest.skip(f"sshd starts here, but lets {self.user} not in: {self.log()[-300:]}")
            _login_works = True

    def _config(self) -> str:
        known = subprocess.run(["ssh", "-Q", "kex"], capture_output=True, text=True, check=True)
        post_quantum = [k for k in ("sntrup761x25519-sha512@openssh.com",) if k in known.stdout.split()]
        exchanges = ",".join([*post_quantum, "curve25519-sha256", "curve25519-sha256@libssh.org"])
        return f"""
ListenAddress 127.0.0.1
Port {self.port}
HostKey {self.folder / "host"}
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
LoginGraceTime 20
MaxAuthTries 2
MaxSessions 2
Ciphers aes256-gcm@openssh.com,aes128-gcm@openssh.com
HostKeyAlgorithms ssh-ed25519
KexAlgorithms {exchanges}
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowTcpForwarding no
AllowStreamLocalForwarding no
AllowAgentForwarding no
X11Forwarding no
PermitTunnel no
PermitTTY no
AuthorizedKeysFile {self.folder / "keys"}
Subsystem sftp internal-sftp
ForceCommand internal-sftp -u 0077 -d {self.home} -p {self._requests}
"""


def _find_sshd() -> str:
    program = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin")
    if not program or not all(shutil.which(tool) for tool in ("ssh-keygen", "ssh", "sftp")):
        pytest.skip("no OpenSSH server (sshd) and tools on this machine")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd separates its privileges
    return program


def _below(pid: int) -> list[int]:
    """All processes that came from this one: sshd has two for every connection."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
