"""Ten protections of the node, each with changes that switch it off; more are in `mutants_more.py`.

`mutations.py` runs the tests against them.

    apply(TEN_MUTANTS[0], package)      # the folder `hsl_node` of a copy; raises where the old text is not there once

A change is one contiguous text of one file, so that it reads like the bug somebody could make. Where several layers
keep a promise, the change removes the layer that the promise is about; `held` says what still stood behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# name -> (rows of tests/README.md, the promise in one sentence)
TEN = {
    "fsync": ("23", "What was acknowledged is on the disk, whatever the power does next."),
    "journal before publish": ("12, 22", "The journal on disk holds a promise before anybody outside hears of it."),
    "signature": ("11, 14", "Only what a pinned key signed, byte for byte, is believed."),
    "size cap": ("3, 6", "No file grows beyond what this model needs."),
    "window": ("10", "Only this round and the next are taken."),
    "duplicate keys": ("6, 9", "No document says two things at once."),
    "finiteness": ("7", "NaN and infinity never reach a fusion."),
    "key pinning": ("14, 15, 16", "Both ends know each other's key beforehand, and no other will do."),
    "claim before hash": ("13", "What was checked is what is used: nobody can change it any more."),
    "quota": ("3, 21", "One peer takes no more than its share of files and bytes."),
}


class NotOnce(Exception):
    """The text that a mutant replaces is gone, or there more than once: mend the mutant, it tests nothing as it is."""


@dataclass(frozen=True)
class Mutant:
    protection: str
    off: str  # what was switched off, in words; with the protection it names the mutant
    file: str  # below hsl_node/
    old: str
    new: str
    quick: str  # the test of the normal suite that must fail: file::name, below tests/
    tests: tuple[str, ...]  # what `make mutations` runs: what is fast and has to do with it
    held: str = ""  # which other layer still kept the promise

    @property
    def name(self) -> str:
        return f"{self.protection}: {self.off}"


def mutated(mutant: Mutant, source: str) -> str:
    """Raises: NotOnce."""
    count = source.count(mutant.old)
    if count != 1 or mutant.old == mutant.new:
        raise NotOnce(f"{mutant.name}: found {count} times in hsl_node/{mutant.file}, not once:\n{mutant.old}")
    return source.replace(mutant.old, mutant.new)


def apply(mutant: Mutant, package: Path) -> None:
    """Change a copy of the package. Raises: NotOnce."""
    path = package / mutant.file
    path.write_text(mutated(mutant, path.read_text()))


RECEIVE = (
    "sync/inbox/test_receive_checks.py",
    "sync/inbox/test_receive_odd_files.py",
    "sync/inbox/test_receive_races_and_crashes.py",
    "federation/test_identity.py",
    "sync/test_manifest.py",
)
DISK = (
    "whole/test_disk_faults.py",
    "whole/test_power_loss.py",
    "sync/store/test_store.py",
    "sync/inbox/test_receive_checks.py",
    "sync/inbox/test_receive_odd_files.py",
    "sync/inbox/test_receive_races_and_crashes.py",
    "federation/test_identity.py",
    "sync/inbox/test_server_arrival.py",
)
SERVER = ("sync/inbox/test_server.py", "sync/inbox/test_server_files.py", "sync/inbox/test_server_arrival.py")
RECEIPTS = (
    "sync/send/test_what_a_server_says.py::test_threat_18_a_receipt_that_is_not_the_peers_about_this_parcel_counts_for_nothing",
    "sync/send/test_what_a_server_says.py::test_threat_18_a_huge_or_empty_receipt_counts_for_nothing",
    "sync/send/test_one_attempt.py::test_data_and_manifest_arrive_and_the_signed_receipt_ends_it",
)
CLIENTS = (  # the rest of that file waits for slow lines
    "sync/wire/test_transport_conformance.py::test_threat_16_another_host_key_is_refused_and_both_fingerprints_are_shown",
    "sync/wire/test_transport_conformance.py::test_threat_15_a_server_with_other_algorithms_only_is_refused",
    "sync/wire/test_transport_conformance.py::test_a_file_arrives_byte_for_byte_and_progress_tells_how_far_it_is",
)
ORDER = (
    "node/test_promise_first.py",
    "sync/store/test_journal.py",
    "sync/store/test_journal_on_a_bad_disk.py",
    "sync/store/test_store.py",
    "sync/inbox/test_receive_checks.py",
    "sync/inbox/test_receive_odd_files.py",
    "sync/inbox/test_receive_races_and_crashes.py",
)

TEN_MUTANTS = (
    # ------------------------------------------------------------------ fsync
    Mutant(
        "fsync",
        "a file's bytes are not fsynced",
        "host/durable.py",
        """\
    try:
        disk.fsync(descriptor)
    except OSError as exc:
        raise disk_failed(f"{what} could not be made durable: {exc}") from exc
""",
        "    return\n",
        "sync/store/test_store.py::test_threat_23_evidence_appears_only_when_it_is_safe_on_the_disk",
        DISK,
    ),
    Mutant(
        "fsync",
        "a folder's names are not fsynced",
        "host/durable.py",
        """\
    try:
        disk.fsync(descriptor)
    except OSError as exc:
        if exc.errno != errno.EINVAL:""",
        """\
    try:
        pass
    except OSError as exc:
        if exc.errno != errno.EINVAL:""",
        "host/test_durable.py::test_threat_23_a_write_returns_only_after_the_system_has_synced_file_then_folder",
        (*DISK, "host/test_durable.py"),
    ),
    Mutant(
        "fsync",
        "a file that lies there already is taken without an fsync",
        "host/durable.py",
        """\
    descriptor = disk.open(path, os.O_RDONLY)
    try:
        sync(""",
        """\
    return
    try:
        sync(""",
        "whole/test_power_loss.py::test_threat_23_a_checkpoint_admitted_just_before_a_kill_is_durable_before_its_receipt",
        DISK,
    ),
    Mutant(
        "fsync",
        "the system is never asked",
        "host/durable.py",
        "        os.fsync(descriptor)\n",
        "        pass\n",
        "host/test_durable.py::test_threat_23_a_write_returns_only_after_the_system_has_synced_file_then_folder",
        (*DISK, "host/test_durable.py"),
    ),
    Mutant(
        "fsync",
        "the journal commits without waiting for the disk",
        "sync/store/journal_file.py",
        "PRAGMA synchronous = FULL",
        "PRAGMA synchronous = OFF",
        "sync/store/test_journal.py::test_threat_23_every_commit_reaches_the_disk_before_what_relies_on_it",
        (
            "sync/store/test_journal.py",
            "sync/store/test_journal_on_a_bad_disk.py",
            "sync/store/test_store.py",
        ),
    ),
    # ------------------------------------------------------------------ journal before publish
    Mutant(
        "journal before publish",
        "my signature is committed with whatever the journal writes next",
        "sync/store/journal.py",
        """\
            self._db.execute("BEGIN IMMEDIATE")
            yield
            with passing(step):
                self._db.execute("COMMIT")
""",
        """\
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            yield
            if step is not Step.SENDER_SIGN:
                with passing(step):
                    self._db.execute("COMMIT")
""",
        "node/test_promise_first.py::test_threat_12_nothing_is_published_before_the_journal_on_disk_holds_its_signature",
        ORDER,
        "a deterministic trainer makes the same bytes again after a kill, so few restarts would show it",
    ),
    Mutant(
        "journal before publish",
        "the receipt is written before the journal knows",
        "node/intake.py",
        """\
        self.machine.tell(Happened(Arrived(claim_of(manifest)), (record,)))
        self._answer(arrival, "accepted", "")
""",
        """\
        self._answer(arrival, "accepted", "")
        self.machine.tell(Happened(Arrived(claim_of(manifest)), (record,)))
""",
        "node/test_promise_first.py::test_threat_22_a_receipt_is_given_only_for_what_the_journal_on_disk_holds",
        ORDER,
    ),
    # ------------------------------------------------------------------ signature
    Mutant(
        "signature",
        "every signature is valid",
        "federation/identity.py",
        '        valid = asyncssh.validate_sshsig(line, signature, "signer", signers)\n',
        "        valid = True\n",
        "federation/test_identity.py::test_threat_14_a_signature_does_not_fit_another_line",
        (*RECEIVE, *RECEIPTS),
        "the one spelling names the key and the purpose; the key of the connection, and owner and name of a file, "
        "against another peer's manifest",
    ),
    Mutant(
        "signature",
        "a document may be spelt in many ways",
        "federation/identity.py",
        "    if not any(signature == _spelling(signature, key, namespace) for key in keys):",
        "    if False:",
        "federation/test_identity.py::test_threat_11_a_copy_in_another_spelling_is_no_second_document",
        ("federation/test_identity.py",),
    ),
    # ------------------------------------------------------------------ size cap
    Mutant(
        "size cap",
        "a part is written to any length",
        "sync/inbox/home.py",
        "        if offset + len(data) > file.part.limit:",
        "        if False:",
        "sync/inbox/test_server_files.py::test_threat_03_a_manifest_has_a_largest_size",
        SERVER,
        "a file too large is not renamed into inbox/",
    ),
    Mutant(
        "size cap",
        "a checkpoint may be of any size",
        "weights/checkpoint_file.py",
        "    if size != schema.file_bytes:",
        "    if False:",
        "weights/test_checkpoint_file.py::test_threat_06_a_file_of_another_size_is_refused",
        (
            "weights/test_checkpoint_file.py",
            "sync/inbox/test_receive_checks.py",
            "sync/inbox/test_receive_odd_files.py",
            "sync/inbox/test_receive_races_and_crashes.py",
            "fuzz/test_fuzz.py",
        ),
        "the same check when a file is claimed; the hash",
    ),
    Mutant(
        "size cap",
        "a header is read whatever length it claims",
        "weights/checkpoint_file.py",
        """\
    length = int.from_bytes(prefix, "little")
    if length > HEADER_MAX_BYTES:
""",
        """\
    length = min(int.from_bytes(prefix, "little"), 2**30)
    if False:
""",
        "weights/test_checkpoint_file.py::test_threat_06_a_header_of_700_000_empty_tensors_costs_no_more_than_its_first_bytes",
        (
            "weights/test_checkpoint_file.py",
            "sync/inbox/test_receive_checks.py",
            "sync/inbox/test_receive_odd_files.py",
            "sync/inbox/test_receive_races_and_crashes.py",
            "fuzz/test_fuzz.py",
        ),
        "the size of the whole file bounds its header too",
    ),
    # ------------------------------------------------------------------ window
    Mutant(
        "window",
        "any round is taken",
        "sync/manifest.py",
        "    if manifest.round not in (current, current + 1) or manifest.round",
        "    if manifest.round",
        "sync/test_manifest.py::test_threat_10_only_this_round_and_the_next_are_accepted",
        (*RECEIVE, "sync/test_round.py", "sync/test_round_halts.py"),
        "the round machine ignores an old round and stops at one too far ahead",
    ),
    # ------------------------------------------------------------------ duplicate keys
    Mutant(
        "duplicate keys",
        "of two equal names in a checkpoint's header the last one counts",
        "weights/checkpoint_file.py",
        "    if schema.header != header:",
        "    if False:",
        "weights/test_checkpoint_file.py::test_threat_06_duplicate_keys_are_refused",
        (
            "weights/test_checkpoint_file.py",
            "sync/inbox/test_receive_checks.py",
            "sync/inbox/test_receive_odd_files.py",
            "sync/inbox/test_receive_races_and_crashes.py",
            "fuzz/test_fuzz.py",
        ),
        "a peer's header must equal ours to the byte",
    ),
    Mutant(
        "duplicate keys",
        "a manifest may be spelt in any way",
        "sync/manifest.py",
        "    if canonical != line:",
        "    if False:",
        "sync/test_manifest.py::test_another_spelling_of_a_right_manifest_is_refused",
        (*RECEIVE, "fuzz/test_fuzz.py"),
    ),
    # ------------------------------------------------------------------ finiteness
    Mutant(
        "finiteness",
        "no tensor is looked through",
        "weights/checkpoint_file.py",
        "                bad = bad or fault(spec.name, chunk)",
        "                pass",
        "weights/test_checkpoint_file.py::test_threat_07_a_bad_value_in_the_last_chunk_of_a_large_tensor_is_found",
        (
            "weights/test_checkpoint_file.py",
            "sync/inbox/test_receive_checks.py",
            "sync/inbox/test_receive_odd_files.py",
            "sync/inbox/test_receive_races_and_crashes.py",
        ),
    ),
    # ------------------------------------------------------------------ key pinning
    Mutant(
        "key pinning",
        "the asyncssh client takes any host key",
        "sync/wire/asyncssh_client.py",
        "                known_hosts=([asyncssh.import_public_key(key) for key in login.host_keys], [], []),",
        "                known_hosts=None,",
        "sync/wire/test_transport_conformance.py::test_threat_16_another_host_key_is_refused_and_both_fingerprints_are_shown"
        "[asyncssh-embedded]",
        CLIENTS,
        "receipts are signed: who stands in between can delay a delivery, not end it",
    ),
    Mutant(
        "key pinning",
        "the paramiko client takes any host key",
        "sync/wire/paramiko_client.py",
        "        if offered.asbytes() not in pinned:",
        "        if False:",
        "sync/wire/test_transport_conformance.py::test_threat_16_another_host_key_is_refused_and_both_fingerprints_are_shown"
        "[paramiko-embedded]",
        CLIENTS,
        "as above",
    ),
    Mutant(
        "key pinning",
        "the inbox takes any key for the first peer's",
        "sync/inbox/admission.py",
        "        return self._peer_of.get(key.public_data)\n",
        "        return self._peer_of.get(key.public_data, next(iter(self.members)))\n",
        "sync/inbox/test_server.py::test_threat_14_so_many_wrong_keys_and_no_more",
        ("sync/inbox/test_server.py", "sync/inbox/test_server_files.py"),
        "manifests are signed with the pinned key: a stranger could fill a quota, not bring a checkpoint",
    ),
    Mutant(
        "key pinning",
        "a peer may log in under another's name, with its own key",
        "sync/inbox/link.py",
        "        if peer is not None and username == peer:",
        "        if peer is not None:",
        "sync/inbox/test_server.py::test_threat_14_only_a_pinned_key_with_its_own_name_logs_in",
        ("sync/inbox/test_server.py", "sync/inbox/test_server_files.py"),
        "compared again when the signature is verified; the home is that of the key",
    ),
    # ------------------------------------------------------------------ claim before hash
    Mutant(
        "claim before hash",
        "a file in another server's inbox is moved, not copied",
        "sync/inbox/claim.py",
        "            _copy(name, inbox, target, expected)\n            return True",
        "            durable.rename(str(name), target, old_folder=inbox)\n            return True",
        "sync/inbox/test_receive_races_and_crashes.py::test_threat_13_a_handle_kept_open_cannot_reach_the_accepted_bytes",
        (
            "sync/inbox/test_receive_checks.py",
            "sync/inbox/test_receive_odd_files.py",
            "sync/inbox/test_receive_races_and_crashes.py",
            "whole/test_disk_faults.py",
            "whole/test_power_loss.py",
        ),
    ),
    Mutant(
        "claim before hash",
        "a part is delivered while its sender still holds it open",
        "sync/inbox/home.py",
        """\
            if (writer := self._writers.get(str(old))) and writer.is_open:
                raise PeerDataError("still open for writing", code="busy")
""",
        "",
        "sync/inbox/test_server_files.py::test_threat_13_a_part_open_for_writing_is_not_delivered",
        SERVER,
    ),
    Mutant(
        "claim before hash",
        "what was claimed is taken for what its manifest names",
        "weights/checkpoint_file.py",
        "    if digest.hexdigest() != sha256:",
        "    if False:",
        "sync/inbox/test_receive_checks.py::test_threat_13_other_bytes_than_announced_are_refused",
        ("sync/inbox/test_receive_checks.py", "weights/test_checkpoint_file.py"),
    ),
    # ------------------------------------------------------------------ quota
    Mutant(
        "quota",
        "any number of files",
        "sync/inbox/home.py",
        "        if len(present) >= self.quota.files:",
        "        if False:",
        "sync/inbox/test_server_files.py::test_threat_03_a_quota_of_files_and_bytes_in_parts_and_inbox_together",
        SERVER,
        "the bytes, of which every file counts with the size it may grow to",
    ),
    Mutant(
        "quota",
        "any number of bytes",
        "sync/inbox/home.py",
        "        if held + need > self.quota.bytes:",
        "        if False:",
        "sync/inbox/test_server_files.py::test_threat_03_a_quota_of_files_and_bytes_in_parts_and_inbox_together",
        SERVER,
        "the number of files; the reserve below which nothing is taken",
    ),
    Mutant(
        "quota",
        "the disk's last room is given away",
        "sync/inbox/home.py",
        "        if disk.f_bavail * disk.f_frsize < need + self.quota.reserve_bytes:",
        "        if False:",
        "sync/inbox/test_server_files.py::test_threat_21_the_last_room_of_the_disk_is_kept_for_the_journal",
        SERVER,
        "the quota of each peer",
    ),
    Mutant(
        "quota",
        "parts grow into the disk's last room",
        "sync/inbox/home.py",
        "        self._require_free(os.fstatvfs(descriptor), len(data))\n",
        "",
        "sync/inbox/test_server_files.py::test_threat_21_a_part_that_lies_there_from_before_takes_nothing_of_the_reserve",
        SERVER,
        "the quota of each peer; a part is opened only where it has room",
    ),
)
