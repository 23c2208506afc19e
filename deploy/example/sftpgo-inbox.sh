#!/bin/sh
# SFTPGo as the inbox of 'harbour' in federation 'breast ultrasound' (b105f2f8).
# Accounts for: east, north. Homes below /srv/hsl.
# Read it, then run it as root on the machine where the node runs. It may be run again at any time.
set -eu
umask 022
id hsl-node >/dev/null || { echo 'make the user hsl-node first: docs/administrator/service.md' >&2; exit 1; }

# The server's own key. Its public half stands in this node's peer card (host_key), so the peers recognise the server.
[ -e /etc/ssh/hsl_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N '' -C hsl-inbox -f /etc/ssh/hsl_host_ed25519_key

chown sftpgo: /etc/ssh/hsl_host_ed25519_key /etc/ssh/hsl_host_ed25519_key.pub
install -d -m 0755 -o root -g root /srv/hsl
home() {
    install -d -m 0755 -o root -g root "/srv/hsl/$1"
    install -d -m 2770 -o sftpgo -g hsl-node "/srv/hsl/$1/parts" "/srv/hsl/$1/inbox"
    install -d -m 2750 -o hsl-node -g sftpgo "/srv/hsl/$1/receipts"
}
home east
home north

# Loading adds and changes users. Who left the federation must be deleted in SFTPGo itself.
install -d -m 0755 /etc/sftpgo/env.d
cat >/etc/sftpgo/hsl.json.new <<'END_OF_FILE'
{
 "version": 17,
 "users": [
  {
   "username": "hsl-east",
   "description": "inbox for east",
   "status": 1,
   "home_dir": "/srv/hsl/east",
   "public_keys": [
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINSORZMKDaQbllmzj6LntWTiqwiEI+sjTvO/eS5vsA7T east"
   ],
   "max_sessions": 3,
   "permissions": {
    "/": [
     "list"
    ],
    "/parts": [
     "list",
     "download",
     "upload",
     "overwrite",
     "delete_files",
     "rename_files"
    ],
    "/inbox": [
     "list",
     "rename_files"
    ],
    "/receipts": [
     "list",
     "download"
    ]
   },
   "filters": {
    "max_upload_file_size": 50331648,
    "denied_protocols": [
     "FTP",
     "DAV",
     "HTTP"
    ],
    "denied_login_methods": [
     "password",
     "password-over-SSH",
     "keyboard-interactive",
     "publickey+password",
     "publickey+keyboard-interactive",
     "TLSCertificate",
     "TLSCertificate+password"
    ]
   },
   "filesystem": {
    "provider": 0
   }
  },
  {
   "username": "hsl-north",
   "description": "inbox for north",
   "status": 1,
   "home_dir": "/srv/hsl/north",
   "public_keys": [
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIXBxIzLBwcy4xT5i8wUN6IvRMiCCxZ33vuopQR6hB3z north"
   ],
   "max_sessions": 3,
   "permissions": {
    "/": [
     "list"
    ],
    "/parts": [
     "list",
     "download",
     "upload",
     "overwrite",
     "delete_files",
     "rename_files"
    ],
    "/inbox": [
     "list",
     "rename_files"
    ],
    "/receipts": [
     "list",
     "download"
    ]
   },
   "filters": {
    "max_upload_file_size": 50331648,
    "denied_protocols": [
     "FTP",
     "DAV",
     "HTTP"
    ],
    "denied_login_methods": [
     "password",
     "password-over-SSH",
     "keyboard-interactive",
     "publickey+password",
     "publickey+keyboard-interactive",
     "TLSCertificate",
     "TLSCertificate+password"
    ]
   },
   "filesystem": {
    "provider": 0
   }
  }
 ]
}
END_OF_FILE
chmod 0644 /etc/sftpgo/hsl.json.new && mv /etc/sftpgo/hsl.json.new /etc/sftpgo/hsl.json
cat >/etc/sftpgo/env.d/hsl.env.new <<'END_OF_FILE'
SFTPGO_SFTPD__BINDINGS__0__PORT=2022
SFTPGO_SFTPD__HOST_KEYS=/etc/ssh/hsl_host_ed25519_key
SFTPGO_SFTPD__CIPHERS=aes256-gcm@openssh.com,aes128-gcm@openssh.com
SFTPGO_SFTPD__PASSWORD_AUTHENTICATION=false
SFTPGO_SFTPD__KEYBOARD_INTERACTIVE_AUTHENTICATION=false
SFTPGO_SFTPD__MAX_AUTH_TRIES=2
SFTPGO_COMMON__UPLOAD_MODE=0
SFTPGO_COMMON__SETSTAT_MODE=1
SFTPGO_COMMON__MAX_PER_HOST_CONNECTIONS=4
SFTPGO_COMMON__DEFENDER__ENABLED=true
SFTPGO_LOADDATA_FROM=/etc/sftpgo/hsl.json
SFTPGO_LOADDATA_MODE=0
END_OF_FILE
chmod 0644 /etc/sftpgo/env.d/hsl.env.new && mv /etc/sftpgo/env.d/hsl.env.new /etc/sftpgo/env.d/hsl.env
[ ! -d /run/systemd/system ] || systemctl restart sftpgo.service

# In the node's node.toml:
#     [inbox]
#     kind = "directory"
#     directory = "/srv/hsl"
# and where systemd runs the node, a drop-in with ReadWritePaths=/srv/hsl (docs/administrator/service.md).
# Host key that the peers expect of this server: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGezJDufkyLSMDPFbdgCFgEb8ISOT2q9+Gi000w/1JTP
pinned='ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGezJDufkyLSMDPFbdgCFgEb8ISOT2q9+Gi000w/1JTP'
if [ "$(cut -d" " -f1,2 /etc/ssh/hsl_host_ed25519_key.pub)" != "$pinned" ]; then
    echo 'The federation lists another host key for this server: new card, new federation file.' >&2
    echo "  hsl-node card --host-key '$(cut -d' ' -f1,2 /etc/ssh/hsl_host_ed25519_key.pub)'" >&2
fi
