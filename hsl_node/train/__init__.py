"""Learning on one site: images, networks, tasks, methods, training loop. Never imports asyncssh or paramiko."""

import os

# Before torch loads OpenMP: its threads then sleep at a barrier instead of spinning. Where others use the cores too,
# spinning threads wait for one that isn't running: beside a second trainer a float32 step took 60 times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
