"""The JSON of a made-up snapshot of a node in trouble, with everything the status page can show. Schema 1."""

from __future__ import annotations

from typing import Any

NOW = 1_800_000_000.0
MB = 1_000_000


def peer(name: str, sent: dict[str, Any], received: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": name, "address": f"{name}.example.org:8922", "fingerprint": "SHA256:abc", "connected": False,
        "last_seen": NOW - 700,
        "sent": {
            "state": "idle", "round": 3, "bytes": 0, "total": 94_700_000, "rate": 0.0, "retries": 0, "resent": 0,
            "last_error": "", "next_try_s": None,
        } | sent,
        "received": {
            "state": "nothing", "round": 3, "bytes": 0, "total": 94_700_000, "rate": 0.0, "sha256": None, "score": None,
        } | received,
        "receipt": None, "life": None,
    } | more  # fmt: skip


def snapshot(**more: Any) -> dict[str, Any]:
    return {
        "schema": 1, "node": "mercy", "fingerprint": "SHA256:xyz", "version": "0.1.0", "instance": "ab", "pid": 4242,
        "state": "waiting", "since": NOW - 840, "started": NOW - 90_000, "ended": None,
        "federation": {
            "name": "breast-us", "hash": "1a2b3c4d", "peers": 5, "rounds": 20, "method": "hsl",
            "task": "benign against malignant",
        },
        "round": 3, "rounds": 20, "phase": "collect", "reason": "",
        "epoch": {"epoch": 4, "of": 5, "batch": 120, "batches": 300, "images_per_s": 28.96},
        "busy": {"event": "busy", "what": "decoding images", "done": 300, "total": 1200}, "fusing": None,
        "peers": [
            peer("charite", {"state": "done", "bytes": 94_700_000, "retries": 1},
                 {"state": "verified", "bytes": 94_700_000, "score": 0.853}, connected=True),
            peer("st-josef-krankenhaus", {"state": "waiting to retry", "bytes": 45_200_000, "retries": 3,
                 "resent": 1_048_576, "last_error": "st-josef-krankenhaus at 192.0.2.7:8922: cannot be reached: "
                 "Connection refused", "next_try_s": 42.4}, {}),
            peer("ucl", {"state": "sending", "bytes": 12_000_000, "rate": 3_100_000.0},
                 {"state": "receiving", "bytes": 60_000_000, "rate": 500_000.0}, last_seen=NOW - 2),
            peer("kyoto", {"state": "waiting for receipt", "bytes": 94_700_000}, {"state": "refused"},
                 last_seen=None),
        ],
        "waiting_for": ["st-josef-krankenhaus", "ucl", "kyoto"], "waiting_since": NOW - 840, "still_to_do": None,
        "disk": {"free": 120_400_000_000, "need": 1_136_400_000}, "device": "cuda:0",
        "trainer": {"pid": 4300, "state": "idle", "restarts": 1, "last_event_s": 12.0, "last_error": ""},
        "loss_terms": {"round": 3, "epoch": 3, "terms": [{"name": "primary", "mean": 0.41231},
                                                          {"name": "anchor", "mean": 0.25}]},
        "last_fused": {"round": 2, "sha256": "9f8e7d6c5b4a" + "0" * 52, "score": 0.912},
        "scores": [
            {"round": r, "own": 0.80 + r / 100, "fused": None if r == 3 else 0.83 + r / 100, "recalibrated": None}
            for r in (1, 2, 3)
        ],
        "score_name": "AUC",
        "model": {
            "kind": "own", "round": 3, "sha256": "8e7d6c5b4a3f" + "0" * 52, "score": 0.913,
            "why": "own model of round 3: best validation AUC here, 0.913 (fused 0.912 in round 2)",
        },
        "warnings": [
            {"code": "refused kyoto", "text": "kyoto sent what fails a check (sha256): checkpoint of kyoto round 3 has "
             "sha256 ab12, manifest says cd34", "since": NOW - 300,
             "fix": "kept in quarantine; the peer is asked for it again"},
            {"code": "x", "text": "evil\x1b[31m\x07peer", "since": None, "fix": ""},
        ],
        "next": "",
    } | more  # fmt: skip


def line_of(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start))
