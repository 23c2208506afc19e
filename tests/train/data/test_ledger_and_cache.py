"""A patient stays in its split, and an image that was read once is not read again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import PLAN, checked, opened, table_rows
from pictures import decode_image, noise, write_folders, write_png, write_table

from hsl_node.errors import LocalStateError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data import cache as cache_module
from hsl_node.train.data import digests as digests_module
from hsl_node.train.data import files as files_module


def test_images_added_later_move_no_patient(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 20, "malignant": 20})
    before = opened(tmp_path, DataConfig(path=root))
    for n in range(30):
        write_png(root / "benign" / f"000-new{n}.png", noise(500 + n))
    after = opened(tmp_path, DataConfig(path=root))
    sides = dict(zip(after.ids, after.split.tolist(), strict=True))
    assert len(after.ids) == 70
    assert {i: sides[i] for i in before.ids} == dict(zip(before.ids, before.split.tolist(), strict=True))


def test_the_ledger_keeps_a_page_per_seed_and_who_is_gone(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 20, "malignant": 20})
    first = opened(tmp_path, DataConfig(path=root))
    opened(tmp_path, DataConfig(path=root), PLAN.model_copy(update={"seed": 2}))
    opened(tmp_path, DataConfig(path=root, exclude=("benign/003.png",)))
    pages = json.loads((tmp_path / "splits.json").read_text())["splits"]
    assert sorted(pages) == ["seed 1, 60/10/30", "seed 2, 60/10/30"]
    assert pages["seed 1, 60/10/30"] == dict(zip(first.ids, first.split.tolist(), strict=True))


def test_threat_19_the_ledger_is_private_and_names_no_patient(tmp_path: Path) -> None:
    opened(tmp_path, DataConfig(path=write_table(tmp_path / "d/t.csv", table_rows())))
    assert "pt1" not in (tmp_path / "splits.json").read_text()
    private = [tmp_path / "splits.json", *(tmp_path / "cache").iterdir()]
    assert len(private) == 3 and all(p.stat().st_mode & 0o077 == 0 for p in private)


def test_a_damaged_ledger_stops_instead_of_making_a_new_split(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": 10}))
    (tmp_path / "splits.json").write_text('{"version": 1, "spl')
    with pytest.raises(LocalStateError, match="split ledger"):
        opened(tmp_path, data)


# ---------------------------------------------------------------- the cache


def counting(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many files are hashed and decoded from now on."""
    count = {"hashed": 0, "decoded": 0}
    digest, decode = digests_module._digest, cache_module.decode

    def counted_digest(*args: Any) -> Any:
        count["hashed"] += 1
        return digest(*args)

    def counted_decode(*args: Any) -> Any:
        count["decoded"] += 1
        return decode(*args)

    monkeypatch.setattr(digests_module, "_digest", counted_digest)
    monkeypatch.setattr(cache_module, "decode", counted_decode)
    return count


def test_the_second_open_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = counting(monkeypatch)
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": 10}))
    first = opened(tmp_path, data)
    assert count == {"hashed": 20, "decoded": 20}
    second = opened(tmp_path, data)
    assert count == {"hashed": 20, "decoded": 20}
    np.testing.assert_array_equal(first.images, second.images)
    assert (first.ids, first.split.tolist()) == (second.ids, second.split.tolist())


def test_a_changed_image_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    before = opened(tmp_path, DataConfig(path=root))
    count = counting(monkeypatch)
    write_png(root / "benign/000.png", noise(99))
    os.utime(root / "benign/000.png", ns=(time.time_ns(), time.time_ns() + 1_000_000))
    after = opened(tmp_path, DataConfig(path=root))
    assert count == {"hashed": 1, "decoded": 20}
    assert after.ids[0] != before.ids[0] and after.ids[1:] == before.ids[1:]
    np.testing.assert_array_equal(after.images[0], decode_image(root / "benign/000.png", 16))


@pytest.mark.parametrize("damage", ["truncated", "one bit", "header", "empty"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": 10}))
    good = opened(tmp_path, data).images.copy()
    (path,) = (tmp_path / "cache").glob("*.images")
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-7] ^= 1
    elif damage == "header":
        content[5] ^= 255
    path.unlink()
    path.write_bytes({"truncated": content[:-100], "empty": b""}.get(damage, bytes(content)))
    count = counting(monkeypatch)
    np.testing.assert_array_equal(opened(tmp_path, data).images, good)
    assert count == {"hashed": 0, "decoded": 20}


def test_a_damaged_index_costs_only_time(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 10, "malignant": 10}))
    first = opened(tmp_path, data)
    (index,) = (tmp_path / "cache").glob("*.index")
    index.write_text('{"version": 1, "files": 3')
    assert opened(tmp_path, data).ids == first.ids


def remembered(tmp_path: Path) -> list[int]:
    """How many images each index knows."""
    return [len(json.loads(p.read_bytes())["files"]) for p in (tmp_path / "cache").glob("*.index")]


def test_images_that_are_exported_anew_each_night_are_remembered_once(tmp_path: Path) -> None:
    """New times of change, one new name, one gone. Before, each night added all of them, for ever."""
    root = write_folders(tmp_path / "d", {"benign": 10, "malignant": 10})
    for night in range(4):
        for path in root.rglob("*.png"):
            os.utime(path, (1e9 + night, 1e9 + night))
        (root / f"benign/{night:03d}.png").rename(root / f"benign/1{night:02d}.png")
        opened(tmp_path, DataConfig(path=root))
        assert remembered(tmp_path) == [20]


def test_two_tables_of_one_folder_remember_their_images_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table_rows(80)
    tables = [
        DataConfig(path=write_table(tmp_path / f"d/{name}.csv", part))
        for name, part in (("old", rows[:40]), ("new", rows[40:]))
    ]
    for data in tables:
        opened(tmp_path, data)
    count = counting(monkeypatch)
    for data in tables:
        opened(tmp_path, data)
    assert count == {"hashed": 0, "decoded": 0}
    assert remembered(tmp_path) == [40, 40]


def test_of_tables_that_are_named_by_their_day_the_last_few_are_remembered(tmp_path: Path) -> None:
    for day in range(6):
        opened(tmp_path, DataConfig(path=write_table(tmp_path / f"d/{day}.csv", table_rows(40))))
    assert remembered(tmp_path) == [40] * files_module.CACHES_KEPT


def test_only_the_last_few_caches_are_kept(tmp_path: Path) -> None:
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 4, "malignant": 4}))
    for size in range(16, 22):
        opened(tmp_path, data, PLAN.model_copy(update={"image_size": size}))
    assert len(list((tmp_path / "cache").glob("*.images"))) == files_module.CACHES_KEPT
    assert not list((tmp_path / "cache").glob(".*"))


def test_progress_goes_over_all_images_twice_when_nothing_is_known(tmp_path: Path) -> None:
    """Once for reading, once for decoding; the worker turns it into signs of life."""
    seen: list[tuple[int, int]] = []
    data = DataConfig(path=write_folders(tmp_path / "d", {"benign": 5, "malignant": 5}))
    opened(tmp_path, data, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 10) for n in range(1, 11)] * 2


def test_the_images_are_never_written_to(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "d", {"benign": 5, "malignant": 5})
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*.png")}
    opened(tmp_path, DataConfig(path=root))
    checked(tmp_path, DataConfig(path=root))
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()} == before
