"""Learning on one site: data, anchor, model, loop, metrics, methods. Never imports asyncssh or paramiko."""
