"""The SSH algorithms of both ends, server and clients. A peer that knows none of them is refused."""

from __future__ import annotations

from typing import Any

from asyncssh.kex import get_kex_algs

CIPHERS = ("aes256-gcm@openssh.com", "aes128-gcm@openssh.com")
KEY_EXCHANGES = (  # of these, what the installed cryptography library and the other end know
    "mlkem768x25519-sha256",
    "sntrup761x25519-sha512@openssh.com",
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",  # the only spelling of it that paramiko 5.1 knows
)
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-256")  # unused beside AES-GCM, but a common one is looked for

# Of asyncssh's server and client. Nothing of the user's or the system's settings is read.
ASYNCSSH: dict[str, Any] = {
    "kex_algs": [k for k in KEY_EXCHANGES if k.encode() in get_kex_algs()],
    "encryption_algs": CIPHERS,
    "mac_algs": MACS,
    "compression_algs": ["none"],
    "signature_algs": ["ssh-ed25519"],
    "gss_host": None,
    "config": None,
    "encoding": None,
}
