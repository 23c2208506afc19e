"""Protections beyond the ten of `mutants.py`, each with a change that switches it off."""

from __future__ import annotations

from mutants import DISK, RECEIPTS, Mutant

MORE = {
    "receipt check": ("18", "Only the peer's own receipt about this very checkpoint ends its delivery."),
    "fused digest": ("11, 28", "Peers that fused other inputs or other bytes do not go on together."),
    "two faces": ("11", "A peer that signs two manifests for one round is found out."),
    "sign once": ("12", "A round is never signed twice."),
    "failed fsync": ("23", "A failed fsync is never taken for a success."),
    "full set": ("22", "No fusion without the checkpoints of all peers."),
    "bytes at rest": ("23", "What was checked once is checked again where it is read: a disk alters what lies on it."),
    "packet budget": ("5", "What costs its sender nothing is not parsed without end."),
    "no links": ("2", "No link in an inbox is followed."),
    "printable": ("20", "What others write is shown as one piece of one line."),
    "plain archives": ("3", "An archive brings plain files, and no more than it holds."),
}

MORE_MUTANTS = (
    Mutant(
        "receipt check",
        "a receipt about anything ends the delivery",
        "sync/receipts.py",
        "        if says != (self._federation.digest, name.round, name.peer, name.sha256, self._card.name):",
        "        if False:",
        "test_push.py::test_threat_18_a_receipt_that_is_not_the_peers_about_this_parcel_counts_for_nothing[sha256]",
        RECEIPTS,
        "its signature",
    ),
    Mutant(
        "fused digest",
        "another base, or other inputs, are not compared with ours",
        "sync/round.py",
        "    if claim.base == state.base and dict(claim.inputs) == dict(state.inputs):\n        return",
        "    if True:\n        return",
        "test_round.py::test_threat_28_a_peer_that_fused_the_same_into_other_bytes_is_named_with_its_software",
        ("test_round.py",),
    ),
    Mutant(
        "two faces",
        "a second manifest of a round is overlooked",
        "sync/round.py",
        """\
    if known is not None:
        return state if known == claim else _object(state, _two_faces(known, claim))
    state = replace(""",
        """\
    if known is not None:
        return state
    state = replace(""",
        "test_round.py::test_threat_11_two_different_claims_of_one_peer_about_one_round_halt_the_node",
        ("test_round.py", "test_round_simulation.py"),
        "manifests list all inputs by digest, so a divergence shows one round later",
    ),
    Mutant(
        "sign once",
        "another checkpoint of the same round is signed too",
        "sync/journal.py",
        "        if before and not same and round > 0:",
        "        if False:",
        "test_journal.py::test_threat_12_a_second_different_signature_for_a_round_is_refused",
        ("test_journal.py", "test_store.py"),
        "the round machine asks for one checkpoint only",
    ),
    Mutant(
        "failed fsync",
        "a failed fsync is ignored",
        "sync/durable.py",
        '        raise disk_failed(f"{what} could not be made durable: {exc}") from exc\n',
        "        del exc\n",
        "test_receive.py::test_threat_23_a_failed_fsync_is_not_an_arrival",
        DISK,
    ),
    Mutant(
        "full set",
        "the node fuses as soon as its own checkpoint is there",
        "sync/round.py",
        "    if state.missing:\n        return state\n    match state.phase:",
        "    if state.me not in state.have:\n        return state\n    match state.phase:",
        "test_round.py::test_a_trained_checkpoint_is_pushed_and_the_full_set_awaited",
        ("test_round.py", "test_round_simulation.py"),
    ),
    Mutant(
        "bytes at rest",
        "a fusion believes what lies in inbox/ and outbox/",
        "sync/fuse_files.py",
        "        if self._sha256.hexdigest() != sha256:",
        "        if False:",
        "test_altered.py::test_threat_23_a_fusion_compares_every_byte_that_it_reads_before_its_file_is_in_place",
        (
            "test_altered.py::test_threat_23_a_fusion_compares_every_byte_that_it_reads_before_its_file_is_in_place",
            "test_fusion.py",
        ),
    ),
    Mutant(
        "bytes at rest",
        "a round is trained from whatever lies in fused/",
        "train/loop.py",
        "    if not holds(path, sha256):",
        "    if False:",
        "test_loop.py::test_a_base_with_other_bytes_is_refused",
        ("test_loop.py::test_a_base_with_other_bytes_is_refused", "test_fusion.py"),
    ),
    Mutant(
        "packet budget",
        "a stranger may send what it likes before it logs in",
        "sync/toll.py",
        "            if self.login_bytes > self._login_max_bytes:",
        "            if self.login_bytes > 64 * self._login_max_bytes:",
        "test_threat_05_packets.py::test_threat_05_a_stranger_that_sends_more_than_a_login_takes_is_cut",
        ("test_threat_05_packets.py",),
    ),
    Mutant(
        "no links",
        "a link is followed",
        "sync/plain_files.py",
        "_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK",
        "_PLAIN = os.O_NONBLOCK",
        "test_receive.py::test_threat_02_links_and_fifos_are_refused_without_hanging",
        ("test_receive.py", "test_server_files.py"),
        "a claim looks at the name itself before it opens anything",
    ),
    Mutant(
        "printable",
        "a text may hold anything",
        "config.py",
        "    if wrong := [c for c in text if not c.isprintable()]:",
        "    if wrong := []:",
        "test_config.py::test_threat_20_what_cannot_be_printed_stands_in_no_text_of_a_federation",
        ("test_config.py", "test_anchor.py", "test_enrol.py"),
        "what is printed is escaped, too",
    ),
    Mutant(
        "plain archives",
        "a member of any kind is taken for a file",
        "backup.py",
        "    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):",
        "    if False:",
        "test_backup.py::test_threat_03_an_archive_holds_plain_files_or_nothing_is_restored",
        ("test_backup.py",),
        "names, sizes and sha256 are those of the index",
    ),
)
