"""Every command with a wrong path in every place that takes one: refused in words, with the path and a true remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import path_options
import pytest
from path_options import Outcome, attempts, slots
from PIL import Image
from small_disk import disk_of

from hsl_node.admin import backup, enrol, rotate
from hsl_node.federation.config import federation_text
from hsl_node.federation.plan import load_plan
from hsl_node.host import wrong_paths
from hsl_node.host.files import write_new
from hsl_node.host.layout import Layout
from hsl_node.sync.round import Phase, State, to_json
from hsl_node.sync.store.journal import Journal
from hsl_node.train.data import anchor
from hsl_node.train.methods import method_of
from hsl_node.train.site import initial_weights

DOCUMENTED = {0, 1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 17, 78}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ash and birch, enrolled, a run of ash's of one round that is over, a backup, images in folders and in a table."""
    world = tmp_path_factory.mktemp("paths") / "world"
    rng, rows = np.random.default_rng(1), ["file,class,patient,site"]
    for label in ("benign", "malignant"):
        (world / "images" / label).mkdir(parents=True)
        for n in range(12):
            Image.fromarray(rng.integers(0, 255, (20, 20), dtype=np.uint8)).save(world / "images" / label / f"{n}.png")
            rows.append(f"images/{label}/{n}.png,{label},{label}{n},{'north' if n % 2 else 'south'}")
    (world / "table.csv").write_text("\n".join(rows) + "\n")
    for name, port in (("ash", 9001), ("birch", 9002)):
        enrol.init(world / name, name=name, address=f"127.0.0.1:{port}", listen=None, data=world / "images")
    anchor.save(anchor.digits_standin(16, n=4, seed=1), world / "anchor.safetensors")
    settings = ["classes=benign,malignant", "image_size=16", "backbone=tiny", "batch_size=4", "rounds=1"]
    cards = [world / name / f"{name}.card" for name in ("ash", "birch")]
    made = enrol.create(name="trees", cards=cards, plan=load_plan(None, settings), anchor=world / "anchor.safetensors")
    (world / "trees.toml").write_text(federation_text(made))
    agreed_to = enrol.join(world / "ash", world / "trees.toml", anchor=world / "anchor.safetensors")
    (world / "birch.update").write_text("")
    agreed = agreed_to.plan
    layout = Layout(world / "ash")
    digest, _ = initial_weights(layout.state, agreed, method_of(agreed.method), layout.fused(1))
    with Journal.create(layout.journal) as journal, journal.transaction():
        journal.record_fused(1, digest)
        journal.record_validation(1, 0.6, 0.7)
        state = State("ash", ("ash", "birch"), 1, "0" * 64, phase=Phase.FINISHED, round=2)  # type: ignore[arg-type]
        journal.save_state(to_json(state))
        journal.set_meta("federation", agreed_to.digest)
    rotate.begin(world / "ash", None)
    backup.backup(world / "ash", world / "ash.tar")
    return world


def faults(outcome: Outcome) -> list[str]:
    """What is wrong with how a command ended."""
    said = " ".join(outcome.said.split())
    found = []
    if outcome.traceback or "Traceback" in said:
        found.append("a traceback: " + " ".join(outcome.traceback.split()[-70:]))
    if outcome.code not in DOCUMENTED:
        found.append(f"exit code {outcome.code}")
    if outcome.code and not outcome.traceback:
        if outcome.path and outcome.path[-60:] not in said and Path(outcome.path).name[-60:] not in said:
            found.append("the path is not named")
        if "What to do: " not in said and "Usage: " not in said and "what to do: " not in said:
            found.append("no remedy")
    if "free some space" in said or "free space" in said:
        found.append("speaks of space, and there is enough")
    return found


def require_sound(outcomes: Sequence[Outcome]) -> None:
    assert len(outcomes) >= len(slots()) > 50
    bad = [f"{o.slot} {o.path!r}: {fault}\n      {o.said.strip()}" for o in outcomes for fault in faults(o)]
    assert not bad, "\n".join([f"{len(bad)} of {len(outcomes)}", *bad])


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", path_options.KINDS)
def test_a_wrong_path_is_refused_in_words_by_every_command(world: Path, kind: str) -> None:
    require_sound(list(attempts(world, kind)))


def test_no_file_takes_the_place_of_a_pipe_or_device(world: Path) -> None:
    """`report --out /dev/full`, as root, left a file where the whole machine has its device."""
    outcomes = [o for o in attempts(world, "a pipe", "--out") if not o.slot.startswith(("export", "demo"))]
    assert len(outcomes) >= 5
    for outcome in outcomes:
        assert outcome.code == 2 and outcome.path in outcome.said, outcome


PLAIN = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-chown,-fowner", "--inh-caps=-all"]
READ_ONLY = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec "$@"']


@pytest.mark.parametrize("how", ["closed", "read-only"])
def test_so_is_a_path_that_may_not_be_used(world: Path, tmp_path: Path, how: str) -> None:
    """A folder of somebody else, for root without its rights over files; a file system that is mounted read-only."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    around = PLAIN if how == "closed" else [*READ_ONLY, str(folder)]
    if os.geteuid() != 0 or subprocess.run([*around, "true"], capture_output=True).returncode:
        pytest.skip(f"needs root, and {around[0]}")
    if how == "closed":
        os.chown(folder, 12345, 12345)
    command = [*around, sys.executable, path_options.__file__, str(world), str(folder / "thing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    outcomes = [Outcome(**found) for found in json.loads(done.stdout)]
    require_sound(outcomes)
    refused = [o for o in outcomes if o.code]
    assert len(refused) > 40, "as it is not refused, it was not tried"
    for outcome in refused:
        assert "chmod" not in outcome.said or how == "closed", outcome
        assert "mkdir" not in outcome.said, outcome


def test_a_disk_that_is_full_is_named_with_the_file(tmp_path: Path) -> None:
    """A write that fails names no file by itself."""
    with disk_of(tmp_path / "small", 1) as disk:
        with suppress(OSError), open(disk / "ballast", "wb") as file:
            file.write(bytes(2 * 2**20))
        with pytest.raises(OSError) as caught:
            write_new(disk / "report.html", "x" * 9000)
    said = wrong_paths.explained(caught.value)
    assert said.message == f"{disk / 'report.html'}: No space left on device"
    assert f"df -h {disk}" in said.remedy
