"""Who an image belongs to: words that name nobody, spellings of one patient, the owner that a DICOM file names.

Where two spellings may be one patient they count as one: that costs a little balance between the splits, while one
patient on two sides makes test results too good.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field, replace

from hsl_node.train.data.images import dicom_owner
from hsl_node.train.data.splits import patient_key

# What tables and anonymisers write where they know no patient; compared by their letters and digits alone.
NO_PATIENT = frozenset(
    {
        *("nan", "na", "nat", "none", "null", "nil", "unknown", "unk", "unbekannt", "inconnu", "desconocido"),
        *("anonymous", "anonymized", "anonymised", "anonym", "anon", "deidentified", "removed", "redacted", "missing"),
        *("empty", "blank", "undefined", "unspecified", "notavailable", "notapplicable", "notset", "noid", "noname"),
        *("patient", "patientid", "patientname", "tbd", "xx", "xxx", "xxxx"),
    }
)
_NUMBER = re.compile(r"0*(\d+?)(?:[.,]0*)?")  # 7, 007, 7.0 and 7,0: what spreadsheets make of one number


@dataclass(frozen=True)
class Owner:
    """Pseudonyms, see `patient_key`: of the patient in each spelling that a ledger may hold, and of the study."""

    patient: tuple[str, ...] = field(default=(), repr=False)  # the one that counts first; empty: unknown
    study: str = field(default="", repr=False)
    once: str = field(default="", repr=False)  # of a word that names nobody: an earlier version took it for a patient


NOBODY = Owner()


def names_somebody(patient: str | None) -> bool:
    return bool(patient and (letters := re.sub(r"[\W_]", "", patient.casefold()))) and letters not in NO_PATIENT


def spelling(patient: str) -> str:
    """The one spelling for all of a patient: case, blanks, forms of letters, zeros before a number and .0 after it."""
    word = " ".join(unicodedata.normalize("NFKC", patient).casefold().split())
    number = _NUMBER.fullmatch(word)
    return number[1] if number else word


def patient_keys(patient: str) -> tuple[str, ...]:
    """The pseudonym that counts, then those by which a ledger of an earlier version may know the same patient."""
    one = spelling(patient)
    return tuple(dict.fromkeys(patient_key(word) for word in (one, patient, *([f"{one}.0"] if one.isdigit() else []))))


def table_owner(patient: str | None) -> Owner:
    if patient and names_somebody(patient):
        return Owner(patient_keys(patient))
    return Owner(once=patient_key(patient)) if patient else NOBODY


def file_owner(content: bytes) -> Owner:
    """What a DICOM file says of its patient and study; of other files nothing.

    Raises:
        UnreadableImage: its header is damaged.
    """
    patient, study = dicom_owner(content)
    return replace(table_owner(patient), study=patient_key(f"study {study}") if study else "")
