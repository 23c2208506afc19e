"""Turn an existing SFTP server into this node's inbox: accounts, folders, keys and settings, as one shell script.

`provision` only prints; the administrator reads it and runs it as root. Running it again (a peer joined, a key
changed) is safe. Every other peer of the federation gets an account that may do what the exchange needs, and a home

    HOMES/<peer>/            the server's root for that peer
                 parts/      the peer writes and resumes      peer: all      node: all
                 inbox/      reached by rename from parts/    peer: rename   node: takes from here
                 receipts/   the node answers                 peer: reads    node: writes

The server's files are readable for the node through the group NODE_GROUP, which owns parts/ and inbox/ (setgid).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from hsl_node.errors import ConfigError, UsageError, escaped
from hsl_node.federation.config import Federation, PeerCard
from hsl_node.federation.keyring import Keyring
from hsl_node.federation.names import INBOX, PARTS, RECEIPTS
from hsl_node.federation.strings import split_address

NODE_USER = NODE_GROUP = "hsl-node"  # as in SERVICE_PAGE
SERVICE_PAGE = "docs/administrator/service.md"
PEERS_GROUP = "hsl-peers"
KEYS = Path("/etc/ssh/hsl_keys")
HOST_KEY = Path("/etc/ssh/hsl_host_ed25519_key")
REVOKED = Path("/etc/ssh/hsl_revoked_keys")  # must be readable: sshd refuses everybody where it is not
SSHD_CONFIG = Path("/etc/ssh/hsl_sshd_config")
SSHD_UNIT = Path("/etc/systemd/system/hsl-inbox.service")
SFTPGO_CONFIG = Path("/etc/sftpgo/hsl.json")
SFTPGO_ENV = Path("/etc/sftpgo/env.d/hsl.env")

_LOGIN = re.compile(r"[a-z_][a-z0-9_-]{0,31}")  # what useradd takes everywhere
_PATH = re.compile(r"(/[A-Za-z0-9._-]+)+")

# What the exchange uses and nothing else. Without setstat and fsetstat there is no chmod and no truncate.
SFTP_REQUESTS = "open,close,read,write,lstat,fstat,stat,opendir,readdir,realpath,rename,remove,fsync,statvfs,limits"


def provision(ring: Keyring, me: str, kind: Literal["openssh", "sftpgo"], homes: Path, checkpoint_bytes: int) -> str:
    """The script that makes accounts for all other peers of the federation on an OpenSSH or SFTPGo server.

    `checkpoint_bytes`: of the plan's model, but for its header. What a peer may hold in all is for the file system to
    limit: OpenSSH has no quota, and SFTPGo's does not see what the node takes out of the folders.

    Raises:
        UsageError: `me` is not a peer, or `homes` is no plain absolute path.
        ConfigError: our own card gives a login name that no account can have, or the same one to two peers.
    """
    if not _PATH.fullmatch(str(homes)) or ".." in homes.parts:
        raise UsageError(
            f"{escaped(str(homes))!r} cannot be the folder of the homes",
            remedy="give an absolute path of letters, digits, '.', '_' and '-', e.g. /srv/hsl",
        )
    card = ring.federation.get(me)
    users = logins(ring.federation, card)
    return (
        _sftpgo(ring, card, users, homes, checkpoint_bytes) if kind == "sftpgo" else _openssh(ring, card, users, homes)
    )


def logins(federation: Federation, card: PeerCard) -> dict[str, PeerCard]:
    """Login name on our server -> the peer it belongs to, in sorted peer order."""
    users: dict[str, PeerCard] = {}
    for peer in sorted(federation.peer, key=lambda p: p.name):
        if peer.name == card.name:
            continue
        login = card.user.replace("{sender}", peer.name)
        if not _LOGIN.fullmatch(login) or login in users or login == "root":
            raise ConfigError(
                f"the card of {card.name!r} has user = {escaped(card.user)!r}: {escaped(login)!r} cannot be "
                f"the login name of {peer.name!r}" + (" too" if login in users else ""),
                remedy='one account per peer, 1 to 32 of a-z, 0-9, "_" and "-"; "{sender}" stands for the peer: make '
                "a new card with `hsl-node card --user 'hsl-{sender}'` and a new federation file",
            )
        users[login] = peer
    return users


# ------------------------------------------------------------------ OpenSSH


def sshd_config(card: PeerCard) -> str:
    """A complete configuration for an sshd of its own, so that the administrators' ssh stays as it is."""
    port = split_address(card.address)[1]
    return f"""\
# The inbox of the hsl-node {card.name!r}: OpenSSH 8.5 or later. Check with: sshd -t -f {SSHD_CONFIG}
# The port is the one of the peer card. Where a firewall maps it to another, put that one here.
Port {port}
PidFile /run/hsl-inbox.pid
HostKey {HOST_KEY}
HostKeyAlgorithms ssh-ed25519
Ciphers aes256-gcm@openssh.com,aes128-gcm@openssh.com
# With OpenSSH 9.9 or later put mlkem768x25519-sha256 first. The @libssh.org name is the only one that paramiko offers.
KexAlgorithms sntrup761x25519-sha512@openssh.com,curve25519-sha256,curve25519-sha256@libssh.org
PubkeyAcceptedAlgorithms ssh-ed25519
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
LoginGraceTime 20
MaxAuthTries 2
MaxSessions 2
MaxStartups 10:30:60
PerSourceMaxStartups 5
ClientAliveInterval 15
ClientAliveCountMax 4
AllowTcpForwarding no
AllowStreamLocalForwarding no
AllowAgentForwarding no
X11Forwarding no
PermitTunnel no
PermitTTY no
PermitUserRC no
AllowGroups {PEERS_GROUP}
AuthorizedKeysFile {KEYS}/%u
RevokedKeys {REVOKED}
Subsystem sftp internal-sftp
Match Group {PEERS_GROUP}
    ChrootDirectory %h
    ForceCommand internal-sftp -l VERBOSE -u 0027 -p {SFTP_REQUESTS}
"""


def _openssh(ring: Keyring, card: PeerCard, users: dict[str, PeerCard], homes: Path) -> str:
    present = {login: peer for login, peer in users.items() if not ring.is_revoked(peer.name)}
    accounts = "".join(f"account {login} {peer.name}\n" for login, peer in users.items())
    revoked = "".join(
        f"{key}\n" for key in ("# keys that `hsl-node peer revoke` took out", *(r.key for r in ring.file.revoked))
    )
    key_files = [
        _file(KEYS / login, "".join(f"restrict {key} {peer.name}\n" for key in ring.keys(peer.name)))
        for login, peer in present.items()
    ]
    ends = [f"pkill -KILL -u {login} || true  # the sessions it has now\n" for login in users if login not in present]
    # The account's home is the chroot (%h): it carries the peer's name, as the node expects, whatever the login is.
    return f"""\
{_head(ring.federation, card, "OpenSSH", homes, users)}
{_HOST_KEY_STEP}
getent group {PEERS_GROUP} >/dev/null || groupadd --system {PEERS_GROUP}
install -d -m 0755 -o root -g root {homes} {KEYS}

# account LOGIN PEER: no password, no shell, no group that could read another peer's files
account() {{
    home="{homes}/$2"
    id -Gn "$1" 2>/dev/null | grep -qw {PEERS_GROUP} ||
        useradd --no-create-home --home-dir "$home" --shell /usr/sbin/nologin --password '*' \\
            --user-group --groups {PEERS_GROUP} "$1"
    [ "$(getent passwd "$1" | cut -d: -f6)" = "$home" ] || usermod --home "$home" "$1"
    install -d -m 0755 -o root -g root "$home"
    install -d -m 2770 -o "$1" -g {NODE_GROUP} "$home/{PARTS}" "$home/{INBOX}"
    install -d -m 2750 -o {NODE_USER} -g "$1" "$home/{RECEIPTS}"
}}
{accounts}
# the peers' keys, as the federation pins them; two while a peer changes its key
{"".join(key_files)}\
# who left the federation or was revoked is locked out; what it sent stays
{_file(REVOKED, revoked)}\
for file in {KEYS}/*; do
    case "${{file##*/}}" in {"|".join(present) or "-"}) ;; *) rm -f "$file" ;; esac
done
{"".join(ends)}
{_file(SSHD_CONFIG, sshd_config(card))}\
install -d -m 0755 /run/sshd
"$(command -v sshd || echo /usr/sbin/sshd)" -t -f {SSHD_CONFIG}

{_file(SSHD_UNIT, _SSHD_UNIT)}\
# with SELinux first: semanage port -a -t ssh_port_t -p tcp {split_address(card.address)[1]}
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl enable --now hsl-inbox.service
    systemctl reload hsl-inbox.service
fi
{_tail(card, homes)}"""


_HOST_KEY_STEP = f"""\
# The server's own key. Its public half stands in this node's peer card (host_key), so the peers recognise the server.
[ -e {HOST_KEY} ] || ssh-keygen -q -t ed25519 -N '' -C hsl-inbox -f {HOST_KEY}
"""

_SSHD_UNIT = f"""\
[Unit]
Description=SFTP inbox of hsl-node (OpenSSH)
After=network-online.target
Wants=network-online.target

[Service]
RuntimeDirectory=sshd
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
ExecStart=/usr/sbin/sshd -D -f {SSHD_CONFIG}
ExecReload=/usr/sbin/sshd -t -f {SSHD_CONFIG}
ExecReload=kill -HUP $MAINPID
KillMode=process
Restart=on-failure
RestartPreventExitStatus=255

[Install]
WantedBy=multi-user.target
"""


# ------------------------------------------------------------------ SFTPGo


def sftpgo_data(ring: Keyring, users: dict[str, PeerCard], homes: Path, checkpoint_bytes: int) -> dict[str, Any]:
    """What SFTPGo loads at its start: one user per peer, public key only, SFTP only.

    `rename_files` is needed on both folders of a rename, `overwrite` on parts/ to resume, `download` there to verify a
    prefix. No `overwrite` on inbox/: what has been published stays as it is. No `quota_size` and `quota_files`: SFTPGo
    counts uploads and its own deletions, so with them it would refuse all after some rounds.
    """
    mib = 1024 * 1024
    return {
        "version": 17,
        "users": [
            {
                "username": login,
                "description": f"inbox for {peer.name}",
                "status": 0 if ring.is_revoked(peer.name) else 1,
                "home_dir": str(homes / peer.name),
                "public_keys": [f"{key} {peer.name}" for key in ring.keys(peer.name)],
                "max_sessions": 3,
                "permissions": {
                    "/": ["list"],
                    f"/{PARTS}": ["list", "download", "upload", "overwrite", "delete_files", "rename_files"],
                    f"/{INBOX}": ["list", "rename_files"],
                    f"/{RECEIPTS}": ["list", "download"],
                },
                "filters": {
                    "max_upload_file_size": (checkpoint_bytes // mib + 2) * mib,  # its header has less than a MiB
                    "denied_protocols": ["FTP", "DAV", "HTTP"],
                    "denied_login_methods": [
                        "password",
                        "password-over-SSH",
                        "keyboard-interactive",
                        "publickey+password",
                        "publickey+keyboard-interactive",
                        "TLSCertificate",
                        "TLSCertificate+password",
                    ],
                },
                "filesystem": {"provider": 0},
            }
            for login, peer in users.items()
        ],
    }


def sftpgo_environment(card: PeerCard) -> str:
    """Server settings. UPLOAD_MODE 1 would delete partial files, so nothing could be resumed; SETSTAT_MODE 1 ignores
    chmod and times."""
    return f"""\
SFTPGO_SFTPD__BINDINGS__0__PORT={split_address(card.address)[1]}
SFTPGO_SFTPD__HOST_KEYS={HOST_KEY}
SFTPGO_SFTPD__CIPHERS=aes256-gcm@openssh.com,aes128-gcm@openssh.com
SFTPGO_SFTPD__PASSWORD_AUTHENTICATION=false
SFTPGO_SFTPD__KEYBOARD_INTERACTIVE_AUTHENTICATION=false
SFTPGO_SFTPD__MAX_AUTH_TRIES=2
SFTPGO_COMMON__UPLOAD_MODE=0
SFTPGO_COMMON__SETSTAT_MODE=1
SFTPGO_COMMON__MAX_PER_HOST_CONNECTIONS=4
SFTPGO_COMMON__DEFENDER__ENABLED=true
SFTPGO_LOADDATA_FROM={SFTPGO_CONFIG}
SFTPGO_LOADDATA_MODE=0
"""


def _sftpgo(ring: Keyring, card: PeerCard, users: dict[str, PeerCard], homes: Path, checkpoint_bytes: int) -> str:
    data = json.dumps(sftpgo_data(ring, users, homes, checkpoint_bytes), indent=1) + "\n"
    folders = "".join(f"home {peer.name}\n" for peer in users.values())
    return f"""\
{_head(ring.federation, card, "SFTPGo", homes, users)}
{_HOST_KEY_STEP}
chown sftpgo: {HOST_KEY} {HOST_KEY}.pub
install -d -m 0755 -o root -g root {homes}
home() {{
    install -d -m 0755 -o root -g root "{homes}/$1"
    install -d -m 2770 -o sftpgo -g {NODE_GROUP} "{homes}/$1/{PARTS}" "{homes}/$1/{INBOX}"
    install -d -m 2750 -o {NODE_USER} -g sftpgo "{homes}/$1/{RECEIPTS}"
}}
{folders}
# Loading adds and changes users. Who left the federation must be deleted in SFTPGo itself.
install -d -m 0755 {SFTPGO_ENV.parent}
{_file(SFTPGO_CONFIG, data)}\
{_file(SFTPGO_ENV, sftpgo_environment(card))}\
[ ! -d /run/systemd/system ] || systemctl restart sftpgo.service
{_tail(card, homes)}"""


# ------------------------------------------------------------------ both


def _head(federation: Federation, card: PeerCard, server: str, homes: Path, users: dict[str, PeerCard]) -> str:
    return f"""\
#!/bin/sh
# {server} as the inbox of {card.name!r} in federation {escaped(federation.name)!r} ({federation.fed8}).
# Accounts for: {", ".join(p.name for p in users.values())}. Homes below {homes}.
# Read it, then run it as root on the machine where the node runs. It may be run again at any time.
set -eu
umask 022
id {NODE_USER} >/dev/null || {{ echo 'make the user {NODE_USER} first: {SERVICE_PAGE}' >&2; exit 1; }}
"""


def _tail(card: PeerCard, homes: Path) -> str:
    return f"""
# In the node's node.toml:
#     [inbox]
#     kind = "directory"
#     directory = "{homes}"
# and where systemd runs the node, a drop-in with ReadWritePaths={homes} ({SERVICE_PAGE}).
# Host key that the peers expect of this server: {card.host_key or "none: the peers will expect the node's own key"}
pinned='{card.host_key or ""}'
if [ "$(cut -d" " -f1,2 {HOST_KEY}.pub)" != "$pinned" ]; then
    echo 'The federation lists another host key for this server: new card, new federation file.' >&2
    echo "  hsl-node card --host-key '$(cut -d' ' -f1,2 {HOST_KEY}.pub)'" >&2
fi"""


def _file(path: Path, content: str) -> str:
    """Write one file, atomically: a half-written list of keys would lock a peer out."""
    return f"""\
cat >{path}.new <<'END_OF_FILE'
{content}END_OF_FILE
chmod 0644 {path}.new && mv {path}.new {path}
"""
