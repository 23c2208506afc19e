"""What `inbox provision` prints: a script that shell and sshd accept, and accounts that keep peers apart."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import asyncssh
import pytest
from federations import FederationOf, Members
from ports import free_ports

from hsl_node.admin.provision import HOST_KEY, KEYS, SSHD_CONFIG, SSHD_UNIT, provision
from hsl_node.errors import ConfigError, UsageError
from hsl_node.federation.config import Federation
from hsl_node.federation.keyring import Keyring

HOMES = Path("/srv/hsl")
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
KINDS = pytest.mark.parametrize("kind", ["openssh", "sftpgo"])
Kind = Literal["openssh", "sftpgo"]

needs_sshd = pytest.mark.skipif(
    SSHD is None or (os.geteuid() != 0 and not Path("/run/sshd").is_dir()),
    reason="needs OpenSSH's sshd and its folder /run/sshd",
)


@pytest.fixture
def members(federation_of: FederationOf) -> Members:
    return federation_of(3, addresses={"ash": "ash.example.org:2022"})


def with_card(federation: Federation, name: str, **changes: str) -> Federation:
    peers = tuple(p.model_copy(update=changes) if p.name == name else p for p in federation.peer)
    return federation.model_copy(update={"peer": peers})


def files(script: str) -> dict[str, str]:
    """The files that the script writes: path -> content."""
    found = re.findall(r"^cat >(\S+)\.new <<'END_OF_FILE'\n(.*?)^END_OF_FILE$", script, re.DOTALL | re.MULTILINE)
    return dict(found)


# ------------------------------------------------------------------ both


@KINDS
def test_the_script_is_valid_shell(members: Members, kind: Kind) -> None:
    script = provision(Keyring.of(members.federation), "ash", kind, HOMES, 4096)
    checked = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@KINDS
def test_every_other_peer_gets_an_account_with_its_pinned_key_and_we_do_not(members: Members, kind: Kind) -> None:
    script = provision(Keyring.of(members.federation), "ash", kind, HOMES, 4096)
    keys = {p.name: p.key for p in members.federation.peer}
    assert keys["birch"] in script and keys["cedar"] in script
    assert keys["ash"] not in script


@KINDS
@pytest.mark.parametrize("homes", ["srv/hsl", "/srv/hsl; rm -rf /", "/srv/../etc", "/srv/$HOME", "/", "/srv/h sl"])
def test_a_folder_that_could_mean_something_to_the_shell_is_refused(members: Members, kind: Kind, homes: str) -> None:
    with pytest.raises(UsageError):
        provision(Keyring.of(members.federation), "ash", kind, Path(homes), 4096)


@KINDS
def test_the_name_of_a_federation_cannot_add_a_line_to_the_script(members: Members, kind: Kind) -> None:
    plain = provision(Keyring.of(members.federation), "ash", kind, HOMES, 4096)
    script = provision(
        Keyring.of(members.federation.model_copy(update={"name": "x\nrm -rf /\n"})), "ash", kind, HOMES, 4096
    )
    assert len(script.splitlines()) == len(plain.splitlines())


@KINDS
@pytest.mark.parametrize("user", ["everybody", "{sender}!", "root", "a-prefix-that-is-far-too-long-for-it-{sender}"])
def test_login_names_that_no_account_can_have_or_two_peers_share_are_refused(
    members: Members, kind: Kind, user: str
) -> None:
    with pytest.raises(ConfigError, match="user"):
        provision(Keyring.of(with_card(members.federation, "ash", user=user)), "ash", kind, HOMES, 4096)


def test_an_unknown_node_is_refused(members: Members) -> None:
    with pytest.raises(UsageError, match="elm"):
        provision(Keyring.of(members.federation), "elm", "openssh", HOMES, 4096)


# ------------------------------------------------------------------ OpenSSH


@pytest.fixture
def configured(members: Members, tmp_path: Path) -> Path:
    """The printed sshd_config, with a host key and key folder that exist here."""
    script = provision(Keyring.of(members.federation), "ash", "openssh", HOMES, 4096)
    key = tmp_path / "host"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    path = tmp_path / "sshd_config"
    path.write_text(files(script)[str(SSHD_CONFIG)].replace(str(HOST_KEY), str(key)))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    return path


@needs_sshd
def test_sshd_accepts_the_configuration_without_a_word(configured: Path) -> None:
    checked = subprocess.run([str(SSHD), "-t", "-f", str(configured)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@needs_sshd
def test_sshd_refuses_the_configuration_once_a_word_in_it_is_wrong(configured: Path) -> None:
    """The check above can fail: `sshd -t` does read every line."""
    configured.write_text(configured.read_text().replace("AllowTcpForwarding", "AllowTcpForwardin"))
    assert subprocess.run([str(SSHD), "-t", "-f", str(configured)], capture_output=True).returncode != 0


@needs_sshd
def test_what_sshd_makes_of_it_is_keys_only_strong_ciphers_only_and_no_forwarding(configured: Path) -> None:
    shown = subprocess.run([str(SSHD), "-T", "-f", str(configured)], capture_output=True, text=True, check=True).stdout
    effective = dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)
    assert effective["port"] == "2022"
    assert effective["authenticationmethods"] == "publickey"
    assert effective["ciphers"] == "aes256-gcm@openssh.com,aes128-gcm@openssh.com"
    assert "curve25519-sha256@libssh.org" in effective["kexalgorithms"]  # paramiko's only one
    off = ["passwordauthentication", "kbdinteractiveauthentication", "permitrootlogin", "allowtcpforwarding"]
    off += ["allowstreamlocalforwarding", "allowagentforwarding", "x11forwarding", "permittunnel", "permittty"]
    assert {effective[key] for key in off} == {"no"}
    assert effective["authorizedkeysfile"] == f"{KEYS}/%u"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="sshd is not installed")
def test_the_unit_of_the_inbox_is_valid(members: Members, tmp_path: Path) -> None:
    path = tmp_path / SSHD_UNIT.name
    path.write_text(files(provision(Keyring.of(members.federation), "ash", "openssh", HOMES, 4096))[str(SSHD_UNIT)])
    found = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60)
    assert (found.returncode, [x for x in found.stderr.splitlines() if path.stem in x]) == (0, [])


# ------------------------------------------------------------------ SFTPGo


def test_sftpgo_gets_one_user_per_peer_that_may_publish_once_and_never_read_the_inbox(members: Members) -> None:
    script = provision(Keyring.of(members.federation), "ash", "sftpgo", HOMES, 5 * 2**30)
    data = json.loads(files(script)["/etc/sftpgo/hsl.json"])
    assert [u["username"] for u in data["users"]] == ["birch", "cedar"]
    user = data["users"][0]
    assert user["home_dir"] == "/srv/hsl/birch"
    assert user["public_keys"] == [f"{members.federation.get('birch').key} birch"]
    assert user["filters"]["max_upload_file_size"] == 5 * 2**30 + 2 * 2**20, "a checkpoint, with its header, fits"
    # SFTPGo never sees that the node takes files out: any quota would be used up after some rounds. None is unlimited.
    assert {"quota_size", "quota_files"}.isdisjoint(user)
    assert user["permissions"]["/"] == ["list"]
    assert set(user["permissions"]["/inbox"]) == {"list", "rename_files"}
    assert {"overwrite", "download", "rename_files"} <= set(user["permissions"]["/parts"])
    assert "password" in user["filters"]["denied_login_methods"]
    assert "publickey" not in user["filters"]["denied_login_methods"]


def test_sftpgo_keeps_partial_files_so_that_they_can_be_resumed(members: Members) -> None:
    script = provision(Keyring.of(members.federation), "ash", "sftpgo", HOMES, 4096)
    settings = dict(x.split("=", 1) for x in files(script)["/etc/sftpgo/env.d/hsl.env"].splitlines())
    assert settings["SFTPGO_COMMON__UPLOAD_MODE"] == "0"
    assert settings["SFTPGO_SFTPD__BINDINGS__0__PORT"] == "2022"


# ------------------------------------------------------------------ real accounts


@pytest.fixture
def server(federation_of: FederationOf, tmp_path: Path) -> Iterator[tuple[Members, Path]]:
    """The script run for real, twice, and its sshd started. Makes accounts on this machine: only on request."""
    if os.environ.get("HSL_TEST_ACCOUNTS") != "1" or os.geteuid() != 0 or SSHD is None:
        pytest.skip("makes system accounts: set HSL_TEST_ACCOUNTS=1 as root on a machine to throw away")
    if any(path.exists() for path in (SSHD_CONFIG, KEYS, HOST_KEY)):
        pytest.skip("this machine is somebody's inbox already")
    (port,) = free_ports(1)
    members = federation_of(3, addresses={"ash": f"127.0.0.1:{port}"})
    homes = Path("/srv/hsl-test")
    subprocess.run(["useradd", "--system", "--user-group", "hsl-node"], check=True)
    try:
        federation = with_card(members.federation, "ash", user="hslt-{sender}")
        script = provision(Keyring.of(federation), "ash", "openssh", homes, 4096)
        for _ in range(2):
            subprocess.run(["sh"], input=script, text=True, check=True, timeout=60)
        log = tmp_path / "sshd.log"
        with subprocess.Popen([SSHD, "-D", "-f", str(SSHD_CONFIG), "-E", str(log)]) as sshd:
            try:
                wait_for_port(port)
                yield members, homes
            finally:
                sshd.terminate()
    finally:
        for user in ("hslt-birch", "hslt-cedar", "hsl-node"):
            subprocess.run(["userdel", user], check=False)
        subprocess.run(["groupdel", "hsl-peers"], check=False)
        for path in (SSHD_CONFIG, SSHD_UNIT, HOST_KEY, HOST_KEY.with_suffix(".pub")):
            path.unlink(missing_ok=True)
        shutil.rmtree(KEYS, ignore_errors=True)
        shutil.rmtree(homes, ignore_errors=True)


def wait_for_port(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("sshd does not listen")


def as_node(*command: str) -> str:
    """Run as the node's user, as the daemon would."""
    run = ["setpriv", "--reuid", "hsl-node", "--regid", "hsl-node", "--clear-groups", *command]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


def test_a_real_account_can_do_the_exchange_and_nothing_else(server: tuple[Members, Path], tmp_path: Path) -> None:
    """Write, resume, rename; the node takes the file and answers; modes, links, shells, other homes are refused."""
    members, homes = server
    port = int(members.federation.get("ash").address.rpartition(":")[2])
    host_key = HOST_KEY.with_suffix(".pub").read_text()
    home = homes / "birch"

    async def exchange() -> None:
        options = {"client_keys": [members.identities["birch"].key], "config": None, "agent_path": None}
        known = ([asyncssh.import_public_key(host_key)], [], [])
        async with (
            asyncssh.connect("127.0.0.1", port, username="hslt-birch", known_hosts=known, **options) as connection,
            connection.start_sftp_client() as sftp,
        ):
            async with sftp.open("parts/a.part", "xb") as file:
                await file.write(b"first ")
            async with sftp.open("parts/a.part", "r+b") as file:
                await file.write(b"second", 6)
                await file.fsync()
            await sftp.rename("parts/a.part", "inbox/a")
            await asyncio.to_thread(as_node, "mv", str(home / "inbox" / "a"), str(tmp_taken / "a"))
            await asyncio.to_thread(as_node, "sh", "-c", f"umask 027; echo accepted >{home}/receipts/a")
            async with sftp.open("receipts/a", "rb") as file:
                assert await file.read() == b"accepted\n"

            for refused in (
                sftp.chmod("parts", 0o777),
                sftp.mkdir("parts/folder"),
                sftp.symlink("/etc/passwd", "parts/link"),
                sftp.open("receipts/b", "wb"),
                sftp.open("b", "wb"),
                sftp.truncate("parts", 10),
                sftp.listdir("../cedar"),
            ):
                with pytest.raises(asyncssh.SFTPError):
                    await refused
            with pytest.raises((asyncssh.ChannelOpenError, asyncssh.ProcessError, asyncssh.ConnectionLost)):
                await connection.run("id", check=True, timeout=10)

        with pytest.raises(asyncssh.PermissionDenied):  # birch's key does not open cedar's account
            async with asyncssh.connect("127.0.0.1", port, username="hslt-cedar", known_hosts=known, **options):
                pass

    tmp_taken = homes / "taken"
    tmp_taken.mkdir(mode=0o700)
    shutil.chown(tmp_taken, "hsl-node", "hsl-node")
    asyncio.run(exchange())
    assert as_node("cat", str(tmp_taken / "a")) == "first second"
    assert os.listdir(home) and sorted(os.listdir(home)) == ["inbox", "parts", "receipts"]
