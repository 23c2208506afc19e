"""Taking in what a peer delivered: whoever writes meanwhile, whatever crashes, and what is left over."""

from __future__ import annotations

import itertools
import os
import threading
from typing import Any

import pytest
from inbox_site import BIRCH, ROUND, Site, flipped

from hsl_node.errors import LocalStateError
from hsl_node.federation.names import Kind
from hsl_node.host.layout import Layout
from hsl_node.sync.inbox import receive
from hsl_node.sync.inbox.receive import Arrival


def test_threat_13_a_sender_that_rewrites_during_ingest_never_changes_what_was_checked(site: Site) -> None:
    """Another server lets a sender keep its file open. What is accepted has the announced digest, then and later."""
    if not site.foreign:
        pytest.skip("the embedded server delivers no file that is open for writing; see test_server_files")
    good = site.good_data()
    manifest = site.manifest(good)
    bad = flipped(site, good)
    writes = 0
    for _ in range(60):
        name = site.deliver(good, manifest)
        stop = threading.Event()
        with open(site.inbox / str(name.of(Kind.DATA)), "r+b", buffering=0) as handle:

            def tamper(handle: Any = handle, stop: threading.Event = stop) -> None:
                nonlocal writes
                for content in itertools.cycle((bad, good, good[:100], good)):
                    if stop.is_set():
                        return
                    writes += os.pwrite(handle.fileno(), content, 0) > 0
                    os.ftruncate(handle.fileno(), len(content))

            thread = threading.Thread(target=tamper)
            thread.start()
            found = site.scan()
            stop.set()
            thread.join()
            os.pwrite(handle.fileno(), b"late" * 100, 0)
        for item in found:
            if isinstance(item, Arrival):
                assert item.data is not None and item.data.read_bytes() == good
                item.data.unlink()
            else:
                assert item.code in ("size", "sha256", "header", "nonfinite")
        for left in site.inbox.iterdir():
            left.unlink()
    assert writes > 60
    site.honest()


def test_threat_13_a_handle_kept_open_cannot_reach_the_accepted_bytes(site: Site) -> None:
    if not site.foreign:
        pytest.skip("the embedded server delivers no file that is open for writing; see test_server_files")
    data = site.good_data()
    name = site.deliver(data, site.manifest(data))
    with open(site.inbox / str(name.of(Kind.DATA)), "r+b") as handle:
        (arrival,) = site.scan()
        handle.write(b"late")
    assert isinstance(arrival, Arrival) and arrival.data is not None and arrival.data.read_bytes() == data


def test_threat_13_a_manifest_exchanged_between_check_and_answer_changes_nothing(site: Site) -> None:
    data = site.good_data()
    manifest = site.manifest(data)
    name = site.deliver(data, manifest)
    (arrival,) = site.scan()
    (site.inbox / str(name)).write_bytes(b"something else")
    assert isinstance(arrival, Arrival) and arrival.document == site.sign(manifest)
    site.answer(arrival.manifest)
    assert not list(site.inbox.iterdir())


# ---------------------------------------------------------------- crashes


def test_threat_22_a_crash_after_the_claim_loses_nothing(site: Site) -> None:
    data = site.good_data()
    site.deliver(data, site.manifest(data))
    first = site.scan()  # the node dies before it does anything with this
    second = site.scan()
    assert first == second and isinstance(second[0], Arrival)
    assert second[0].data is not None and second[0].data.read_bytes() == data


def test_threat_22_a_crash_after_the_move_into_the_store_asks_for_no_second_transfer(site: Site) -> None:
    data = site.good_data()
    manifest = site.manifest(data)
    site.deliver(data, manifest)
    (arrival,) = site.scan()
    stored = Layout(site.root).inbox(ROUND, BIRCH)
    stored.parent.mkdir(parents=True)
    assert isinstance(arrival, Arrival) and arrival.data is not None
    arrival.data.rename(stored)
    (again,) = site.scan()
    assert isinstance(again, Arrival) and again.data is None and again.manifest == manifest
    stored.write_bytes(flipped(site, data))  # what the store holds is checked, not trusted
    assert site.scan() == []


def test_threat_22_a_copy_torn_by_a_crash_is_made_again(site: Site) -> None:
    data = site.good_data()
    name = site.deliver(data, site.manifest(data))
    (site.claimed / BIRCH).mkdir(parents=True)
    (site.claimed / BIRCH / str(name.of(Kind.DATA))).write_bytes(data[:100])
    (arrival,) = site.scan()
    assert isinstance(arrival, Arrival) and arrival.data is not None and arrival.data.read_bytes() == data


def test_an_inbox_on_another_file_system_is_copied(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    crossed = []
    real = os.rename

    def rename(source: Any, target: Any, **folders: Any) -> None:
        if "claimed" in str(target):
            crossed.append(target)
            raise OSError(18, "Invalid cross-device link")
        real(source, target, **folders)

    monkeypatch.setattr("hsl_node.sync.inbox.receive.os.rename", rename)
    site.honest()
    assert bool(crossed) != site.foreign


def test_threat_23_a_failed_fsync_is_not_an_arrival(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    data = site.good_data()
    site.deliver(data, site.manifest(data))
    monkeypatch.setattr("hsl_node.sync.inbox.receive.os.fsync", broken)
    with pytest.raises(LocalStateError):
        site.scan()


# ---------------------------------------------------------------- leftovers


def test_parts_are_collected_after_a_day_and_what_may_be_wanted_stays_however_long_its_line_is_down(site: Site) -> None:
    data, now = site.good_data(), 1e9
    wanted = site.manifest(data).file_name().of(Kind.DATA)
    orphan = site.manifest(data, round=ROUND - 1).file_name().of(Kind.DATA)
    paired = site.deliver(data, site.manifest(data, round=ROUND - 2))
    part, beyond, *living = (
        site.manifest(data, round=r).file_name().as_part() for r in (ROUND - 1, ROUND + 2, ROUND, ROUND + 1)
    )
    parts = {site.homes / BIRCH / "parts" / str(p): False for p in living}
    files = {
        site.inbox / str(wanted): False, site.inbox / str(orphan): True, site.inbox / str(paired): False,
        site.inbox / str(paired.of(Kind.DATA)): False, site.homes / BIRCH / "parts" / str(part): True,
        site.homes / BIRCH / "parts" / str(beyond): True, **parts,
        site.homes / BIRCH / "parts/junk": True, site.claimed / BIRCH / str(orphan): True,
    }  # fmt: skip
    (site.claimed / BIRCH).mkdir(parents=True)
    for path in files:
        path.touch()
        os.utime(path, (now - 90_000, now - 90_000))

    def collect(now: float) -> int:
        return receive.collect_parts(BIRCH, homes=site.homes, claimed=site.claimed, current=ROUND, now=now)

    assert collect(now - 10_000) == 0
    assert collect(now) == sum(files.values())
    assert {path: not path.exists() for path in files} == files


@pytest.mark.parametrize("years", [10, -10])
def test_threat_24_a_clock_that_jumps_collects_nothing_and_a_day_later_by_the_new_clock_all_is_as_before(
    site: Site, years: int
) -> None:
    past = site.manifest(site.good_data(), round=ROUND - 1).file_name().as_part()
    part = site.homes / BIRCH / "parts" / str(past)
    part.touch()
    now = part.stat().st_mtime + years * 365 * 86_400

    def collect(now: float) -> int:
        return receive.collect_parts(BIRCH, homes=site.homes, claimed=site.claimed, current=ROUND, now=now)

    assert collect(now) == 0
    assert part.stat().st_mtime == pytest.approx(now)
    assert collect(now + 80_000) == 0
    assert collect(now + 90_000) == 1
