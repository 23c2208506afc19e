"""What deploy/ shows is what the program does: the example loads, the rehearsal runs, the container fits the CLI."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from example_federation import written
from PIL import Image
from sources import REPOSITORY

from hsl_node.federation import config, plan, toml_file
from hsl_node.federation.config import Federation
from hsl_node.federation.node_toml import NodeConfig

DEPLOY = REPOSITORY / "deploy"
EXAMPLE = DEPLOY / "example"
SITES = ("north", "east", "harbour")


@pytest.fixture(scope="module")
def federation() -> Federation:
    return toml_file.read_toml(EXAMPLE / "federation.toml", Federation)


# ------------------------------------------------------------------ the example


@pytest.mark.parametrize("site", SITES)
def test_each_hospital_of_the_example_has_settings_that_load_and_agree_with_its_card(
    site: str, federation: Federation
) -> None:
    node = toml_file.read_toml(EXAMPLE / site / "node.toml", NodeConfig)
    card = federation.get(site)
    assert (node.name, node.address) == (card.name, card.address)
    assert (node.inbox.kind == "directory") == (card.host_key is not None)


def test_the_federation_was_made_from_the_plan(federation: Federation) -> None:
    assert plan.load_plan(EXAMPLE / "plan.toml") == federation.plan


@pytest.mark.parametrize("name", ["federation.toml", "openssh-inbox.sh", "sftpgo-inbox.sh"])
def test_the_example_is_what_the_program_writes(name: str) -> None:
    """The federation's file with its hash, and what provisioning prints."""
    assert (EXAMPLE / name).read_text() == written()[name], "make docs"


def picture_folder(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for label in ("benign", "malignant"):
        (folder / label).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rehearsal script, run with the real command line."""
    root = tmp_path_factory.mktemp("rehearsal")
    images = [str(picture_folder(root / "images" / site, seed)) for seed, site in enumerate(SITES)]
    hsl = root / "hsl-node"
    hsl.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hsl_node "$@"\n')
    hsl.chmod(0o755)
    done = subprocess.run(
        ["sh", str(EXAMPLE / "rehearse.sh"), str(root / "sites"), *images, "--set", "backbone=tiny"],
        env={**os.environ, "HSL_NODE": str(hsl), "IMAGE_SIZE": "32", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "sites"


def test_the_rehearsal_ends_with_three_nodes_in_one_federation(rehearsed: Path) -> None:
    joined = {site: config.load_federation(rehearsed / site) for site in SITES}
    assert len({f.digest for f in joined.values()}) == 1
    assert joined["north"].peers == ("east", "harbour", "north")
    assert joined["north"].plan.model_dump(exclude={"image_size", "backbone"}) == plan.load_plan(
        EXAMPLE / "plan.toml"
    ).model_dump(exclude={"image_size", "backbone"})


@pytest.mark.parametrize("site", SITES)
def test_each_rehearsed_node_is_ready_to_start(site: str, rehearsed: Path) -> None:
    """`status` without a daemon says so with exit code 3; an incomplete enrolment would be 10 or 78."""
    command = [sys.executable, "-m", "hsl_node", "--state", str(rehearsed / site), "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == 3, done.stdout + done.stderr
    assert json.loads(done.stdout)["state"] == "stopped"


def test_the_rehearsal_explains_itself_when_called_without_arguments() -> None:
    done = subprocess.run(["sh", str(EXAMPLE / "rehearse.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "rehearse.sh FOLDER NORTH_IMAGES" in done.stderr


# ------------------------------------------------------------------ the container


def instructions(text: str) -> list[tuple[str, str]]:
    """The lines of a Containerfile, continued ones joined: (instruction, rest)."""
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


CONTAINER = instructions((DEPLOY / "Containerfile").read_text())
COMPOSE = (DEPLOY / "compose.yaml").read_text()


def last(instruction: str) -> str:
    return [rest for word, rest in CONTAINER if word == instruction][-1]


def test_everything_the_image_copies_is_there_and_not_kept_from_the_builder() -> None:
    kept = {
        line.removeprefix("!") for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        source
        for word, rest in CONTAINER
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert {Path(source).name for source in copied} == kept
    assert all((REPOSITORY / name).exists() for name in kept)


def test_the_container_runs_as_the_same_unprivileged_user_everywhere() -> None:
    assert last("USER") == "10001:10001"
    assert 'user: "10001:10001"' in COMPOSE
    assert "--uid 10001 --gid 10001" in " ".join(rest for _, rest in CONTAINER)


@pytest.mark.parametrize(
    "setting",
    ["read_only: true", "cap_drop: [ALL]", 'security_opt: ["no-new-privileges:true"]', "stop_grace_period: 3m"],
)
def test_compose_closes_what_the_unit_file_closes(setting: str) -> None:
    assert re.search(rf"^    {re.escape(setting)}$", COMPOSE, re.MULTILINE)


def test_the_state_is_a_volume_at_the_place_the_program_looks_for_it() -> None:
    state = re.search(r"HSL_NODE_STATE=(\S+)", last("ENV"))
    assert state and state[1] == last("VOLUME")
    assert f"- state:{state[1]}\n" in COMPOSE


def test_the_exposed_port_is_the_default_of_node_toml() -> None:
    port = NodeConfig(name="north", address="north.example.org:1").listen.rpartition(":")[2]
    assert last("EXPOSE") == port
    assert f'ports: ["{port}:{port}"]' in COMPOSE


def test_the_commands_the_container_runs_exist() -> None:
    health = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    compose_health = re.search(r'test: \["CMD", (.*)\]', COMPOSE)
    assert compose_health and json.loads(f"[{compose_health[1]}]") == health
    for command in (health, [*json.loads(last("ENTRYPOINT")), *json.loads(last("CMD"))]):
        assert command[0] == "hsl-node"
        shown = [sys.executable, "-m", "hsl_node", *command[1:], "--help"]
        assert subprocess.run(shown, capture_output=True, cwd=REPOSITORY, timeout=60).returncode == 0
