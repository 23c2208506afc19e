"""A backup file made by anybody: it holds plain files as we write them, or nothing is restored."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backups import members, repacked

from hsl_node.admin import archive, backup
from hsl_node.cli import main
from hsl_node.errors import (
    LocalStateError,
)

HOSTILE = "\x1b]0;owned\x07\x1b[31mFAKE\r\n\x9b2J"


def with_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], object]:
    def changed(name: str, content: bytes) -> bytes:
        if name != "backup.json":
            return content
        index = json.loads(content)
        change(index)
        return json.dumps(index).encode()

    return lambda old, new: repacked(old, new, changed)


def set_to(key: str, value: object) -> Callable[[Path, Path], object]:
    return with_index(lambda index: index.__setitem__(key, value))


def instead_of_index(content: bytes) -> Callable[[Path, Path], object]:
    return lambda old, new: repacked(old, new, lambda n, c: content if n == "backup.json" else c)


LIES: dict[str, Callable[[Path, Path], object]] = {
    "escapes in written": set_to("written", HOSTILE),
    "escapes in node": set_to("node", HOSTILE),
    "escapes in federation": set_to("federation", HOSTILE),
    "escapes in hsl_node": set_to("hsl_node", HOSTILE),
    "escapes of a newer one": with_index(lambda i: i.update(version=99, hsl_node=HOSTILE)),
    "escapes in a file's name": with_index(lambda i: i["files"].__setitem__(HOSTILE, i["files"]["node.toml"])),
    "escapes in a key": set_to(HOSTILE, 1),
    "no written": with_index(lambda i: i.pop("written")),
    "no files": with_index(lambda i: i.pop("files")),
    "a number as written": set_to("written", 5),
    "a list as written": set_to("written", ["x"]),
    "a number as federation": set_to("federation", 5),
    "a dict as node": set_to("node", {"a": 1}),
    "another node": set_to("node", "birch"),
    "a text as version": set_to("version", "x"),
    "version 0": set_to("version", 0),
    "no key in it": set_to("has_key", False),
    "a negative size": with_index(lambda i: i["files"]["node.toml"].__setitem__("bytes", -1)),
    "a size as text": with_index(lambda i: i["files"]["node.toml"].__setitem__("bytes", "5")),
    "an exabyte": with_index(lambda i: i["files"]["journal.sqlite3"].__setitem__("bytes", 1 << 60)),
    "too many files": with_index(
        lambda i: i["files"].update({f"fused/r{n:06d}.safetensors": i["files"]["node.toml"] for n in range(100)})
    ),
    "nested without end": instead_of_index(b"[" * 60_000),
    "a large index": instead_of_index(b" " * (archive.INDEX_MAX_BYTES + 1)),
    "a list": instead_of_index(b"[]"),
    "no text": instead_of_index(b"\xff\xfe\x00"),
    "a long number": instead_of_index(b'{"format": ' + b"9" * 5000 + b"}"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_threat_20_an_index_is_as_we_write_it_or_refused_in_plain_words(
    lived: Path, tmp_path: Path, lie: Callable[[Path, Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    lie(lived / "ash.tar", tmp_path / "lie.tar")
    with pytest.raises(SystemExit) as left:
        main(["--state", str(tmp_path / "new"), "restore", str(tmp_path / "lie.tar")])
    shown = capsys.readouterr()
    assert left.value.code in (15, 78) and "What to do: " in shown.err
    assert (shown.out + shown.err).replace("\n", "").isprintable() and "Traceback" not in shown.err
    assert [p.name for p in tmp_path.iterdir()] == ["lie.tar"]


@pytest.mark.parametrize("name", [archive.KEY, archive.NEXT])
def test_threat_20_a_key_has_the_size_of_a_key(lived: Path, tmp_path: Path, name: str) -> None:
    entry = {"sha256": "0" * 64, "bytes": archive.SETTINGS_MAX_BYTES + 1}
    with_index(lambda i: i["files"].__setitem__(name, entry))(lived / "ash.tar", tmp_path / "long.tar")
    with pytest.raises(LocalStateError, match=f"{name} has {entry['bytes']} bytes"):
        backup.restore(tmp_path / "new", tmp_path / "long.tar")


def plain(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.GNU_FORMAT) + padded(content)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def special(name: str, kind: bytes, content: bytes = b"", linkname: str = "") -> bytes:
    header = tarfile.TarInfo(name)
    header.type, header.size, header.linkname = kind, len(content), linkname
    return header.tobuf(tarfile.GNU_FORMAT) + padded(content)


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        rest = f" {key.replace('_', '.')}={value}\n".encode()
        length = len(rest) + 2
        length += len(str(length)) - 2
        lines += str(length).encode() + rest
    return special("x", tarfile.XHDTYPE, lines)


def sparse(size: int) -> bytes:
    """A hole of `size` bytes in a few of the archive, as GNU tar 1.0 writes it."""
    header = pax(GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_name=FUSED, GNU_sparse_realsize=str(size))
    return header + plain("GNUSparseFile.0/x", padded(f"1\n{size - 512}\n512\n".encode()) + bytes(512))


FUSED = "fused/r000001.safetensors"
GIB = 1 << 30
ARCHIVES: dict[str, tuple[bytes, int]] = {  # before all other members but the index, and what the index says of FUSED
    "a hole of a gigabyte": (sparse(GIB), GIB),
    "an old hole": (special(FUSED, tarfile.GNUTYPE_SPARSE, bytes(512)), 512),
    "3000 long names": (special("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"x\0") * 3000, 0),
    "3000 further headers": (pax(path="x") * 3000, 0),
    "a name in a further header": (pax(path=FUSED) + plain("x", b""), 0),
    "a link": (special(FUSED, tarfile.SYMTYPE, linkname="/etc/passwd"), 0),
    "a hard link": (special(FUSED, tarfile.LNKTYPE, linkname="node.toml"), 0),
    "a pipe": (special(FUSED, tarfile.FIFOTYPE), 0),
    "a device": (special(FUSED, tarfile.CHRTYPE), 0),
    "a folder": (special(FUSED, tarfile.DIRTYPE), 0),
    "twice the same": (plain(FUSED, b"") * 2, 0),
    "more than there is": (special(FUSED, tarfile.REGTYPE)[:124] + b"00000077777\0", 0o77777),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_threat_03_an_archive_holds_plain_files_or_nothing_is_restored(lived: Path, tmp_path: Path, what: str) -> None:
    """20 KB made a file of a gigabyte; many headers in a row ended in a traceback."""
    (_, index), *rest = members(lived / "ash.tar")
    added, size = ARCHIVES[what]
    content = json.loads(index)
    content["files"][FUSED] = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": size}
    archive = tmp_path / "hostile.tar"
    archive.write_bytes(
        plain("backup.json", json.dumps(content).encode())
        + added
        + b"".join(plain(n, c) for n, c in rest)
        + bytes(1024)
    )
    with pytest.raises(LocalStateError) as refused:
        backup.restore(tmp_path / "new", archive)
    assert refused.value.remedy and "damaged or no backup" in refused.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.tar"]


def test_a_member_of_more_than_8_gib_keeps_one_header() -> None:
    """Its size goes into the header itself: what we write we read."""
    header = tarfile.TarInfo(FUSED)
    header.size = 9 * GIB
    written = header.tobuf(tarfile.GNU_FORMAT)
    read = archive._next_member(io.BytesIO(written))
    assert len(written) == 512 and read is not None and (read.name, read.size) == (FUSED, 9 * GIB)
