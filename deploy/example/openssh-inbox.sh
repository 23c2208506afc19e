#!/bin/sh
# OpenSSH as the inbox of 'harbour' in federation 'breast ultrasound' (b105f2f8).
# Accounts for: east, north. Homes below /srv/hsl.
# Read it, then run it as root on the machine where the node runs. It may be run again at any time.
set -eu
umask 022
id hsl-node >/dev/null || { echo 'make the user hsl-node first: docs/administrator/service.md' >&2; exit 1; }

# The server's own key. Its public half stands in this node's peer card (host_key), so the peers recognise the server.
[ -e /etc/ssh/hsl_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N '' -C hsl-inbox -f /etc/ssh/hsl_host_ed25519_key

getent group hsl-peers >/dev/null || groupadd --system hsl-peers
install -d -m 0755 -o root -g root /srv/hsl /etc/ssh/hsl_keys

# account LOGIN PEER: no password, no shell, no group that could read another peer's files
account() {
    home="/srv/hsl/$2"
    id -Gn "$1" 2>/dev/null | grep -qw hsl-peers ||
        useradd --no-create-home --home-dir "$home" --shell /usr/sbin/nologin --password '*' \
            --user-group --groups hsl-peers "$1"
    [ "$(getent passwd "$1" | cut -d: -f6)" = "$home" ] || usermod --home "$home" "$1"
    install -d -m 0755 -o root -g root "$home"
    install -d -m 2770 -o "$1" -g hsl-node "$home/parts" "$home/inbox"
    install -d -m 2750 -o hsl-node -g "$1" "$home/receipts"
}
account hsl-east east
account hsl-north north

# the peers' keys, as the federation pins them; two while a peer changes its key
cat >/etc/ssh/hsl_keys/hsl-east.new <<'END_OF_FILE'
restrict ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAINSORZMKDaQbllmzj6LntWTiqwiEI+sjTvO/eS5vsA7T east
END_OF_FILE
chmod 0644 /etc/ssh/hsl_keys/hsl-east.new && mv /etc/ssh/hsl_keys/hsl-east.new /etc/ssh/hsl_keys/hsl-east
cat >/etc/ssh/hsl_keys/hsl-north.new <<'END_OF_FILE'
restrict ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIXBxIzLBwcy4xT5i8wUN6IvRMiCCxZ33vuopQR6hB3z north
END_OF_FILE
chmod 0644 /etc/ssh/hsl_keys/hsl-north.new && mv /etc/ssh/hsl_keys/hsl-north.new /etc/ssh/hsl_keys/hsl-north
# who left the federation or was revoked is locked out; what it sent stays
cat >/etc/ssh/hsl_revoked_keys.new <<'END_OF_FILE'
# keys that `hsl-node peer revoke` took out
END_OF_FILE
chmod 0644 /etc/ssh/hsl_revoked_keys.new && mv /etc/ssh/hsl_revoked_keys.new /etc/ssh/hsl_revoked_keys
for file in /etc/ssh/hsl_keys/*; do
    case "${file##*/}" in hsl-east|hsl-north) ;; *) rm -f "$file" ;; esac
done

cat >/etc/ssh/hsl_sshd_config.new <<'END_OF_FILE'
# The inbox of the hsl-node 'harbour': OpenSSH 8.5 or later. Check with: sshd -t -f /etc/ssh/hsl_sshd_config
# The port is the one of the peer card. Where a firewall maps it to another, put that one here.
Port 2022
PidFile /run/hsl-inbox.pid
HostKey /etc/ssh/hsl_host_ed25519_key
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
AllowGroups hsl-peers
AuthorizedKeysFile /etc/ssh/hsl_keys/%u
RevokedKeys /etc/ssh/hsl_revoked_keys
Subsystem sftp internal-sftp
Match Group hsl-peers
    ChrootDirectory %h
    ForceCommand internal-sftp -l VERBOSE -u 0027 -p open,close,read,write,lstat,fstat,stat,opendir,readdir,realpath,rename,remove,fsync,statvfs,limits
END_OF_FILE
chmod 0644 /etc/ssh/hsl_sshd_config.new && mv /etc/ssh/hsl_sshd_config.new /etc/ssh/hsl_sshd_config
install -d -m 0755 /run/sshd
"$(command -v sshd || echo /usr/sbin/sshd)" -t -f /etc/ssh/hsl_sshd_config

cat >/etc/systemd/system/hsl-inbox.service.new <<'END_OF_FILE'
[Unit]
Description=SFTP inbox of hsl-node (OpenSSH)
After=network-online.target
Wants=network-online.target

[Service]
RuntimeDirectory=sshd
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
ExecStart=/usr/sbin/sshd -D -f /etc/ssh/hsl_sshd_config
ExecReload=/usr/sbin/sshd -t -f /etc/ssh/hsl_sshd_config
ExecReload=kill -HUP $MAINPID
KillMode=process
Restart=on-failure
RestartPreventExitStatus=255

[Install]
WantedBy=multi-user.target
END_OF_FILE
chmod 0644 /etc/systemd/system/hsl-inbox.service.new && mv /etc/systemd/system/hsl-inbox.service.new /etc/systemd/system/hsl-inbox.service
# with SELinux first: semanage port -a -t ssh_port_t -p tcp 2022
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl enable --now hsl-inbox.service
    systemctl reload hsl-inbox.service
fi

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
