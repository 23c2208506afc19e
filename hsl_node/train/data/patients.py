"""Who an image belongs to: words that name nobody, spellings of one patient, the owner that a DICOM file names.

Where two spellings may be one patient they count as one: that costs a little balance between the splits, while one
patient on two sides makes test results too good.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field, replace
from decimal import Decimal

from hsl_node.train.data.images import dicom_owner
from hsl_node.train.data.splits import patient_key

# What tables and anonymisers write where they know no patient: a cell that holds nothing but such words names nobody.
NO_PATIENT = frozenset(
    {
        *("nan", "na", "nat", "none", "null", "nil", "inf", "unknown", "unk", "unbekannt", "inconnu", "desconocido"),
        *("anonymous", "anonymized", "anonymised", "anonym", "anon", "deidentified", "removed", "redacted", "missing"),
        *("empty", "blank", "undefined", "unspecified", "notavailable", "notapplicable", "notset", "noid", "noname"),
        *("patient", "patientid", "patientname", "tbd", "tba", "tbc", "xx", "xxx", "xxxx", "withheld", "masked"),
        *("no", "not", "id", "name", "data", "known", "available", "recorded", "given", "applicable", "set"),
        *("keine", "kein", "ohne", "angabe", "angaben", "sans", "sin", "identifiant", "false", "true", "error"),
    }
)
_SHEET_ERROR = re.compile(r"#(REF|NAME|VALUE|NUM|DIV/0)[!?]")
_NEGATIVE = re.compile(r"-\d+([.,]0+)?")  # -1, -99: what programs write for a number that is missing
_FLOAT = re.compile(r"(\d+)[.,]0+")  # 7.0 and 7,0: a number that shared its column with a gap
_THOUSANDS = re.compile(r"\d{1,3}(?:([.,'’])\d{3})(?:\1\d{3})*")
_EXPONENT = re.compile(r"\d(?:[.,]\d+)?e\+?\d{1,2}")  # 1.2E+05
_DATE = re.compile(
    r"(?:(?P<first>\d{4})([-./])(\d\d?)\2(\d\d?)|(\d\d?)([-./])(\d\d?)\6(?P<last>\d{4}))(?:[ t]00:00(?::00)?)?"
)
_RUNS = re.compile(r"\d+|[^\W\d_]+")


@dataclass(frozen=True)
class Owner:
    """Pseudonyms, see `patient_key`: of the patient in each spelling that a ledger may hold, and of the study."""

    patient: tuple[str, ...] = field(default=(), repr=False)  # the one that counts first; empty: unknown
    study: str = field(default="", repr=False)
    once: str = field(default="", repr=False)  # of a word that names nobody: an earlier version took it for a patient


NOBODY = Owner()


def names_somebody(patient: str | None) -> bool:
    cell = (patient or "").strip()
    words = spelling(cell).split()
    wordless = "".join(words) in NO_PATIENT or all(word in NO_PATIENT for word in words)
    return not (wordless or _SHEET_ERROR.fullmatch(cell) or _NEGATIVE.fullmatch(cell))


def spelling(patient: str) -> str:
    """The one spelling for all of a patient: its runs of letters and of digits, small letters, no leading zeros.

    So P-007, p7 and ="P 7" are one, and 7, 7.0 and '007; but 1-2 is not 12. A spreadsheet's 1.2E+05 and 120,000 are
    numbers too.
    """
    seen = (c for c in unicodedata.normalize("NFKC", patient) if unicodedata.category(c) != "Cf")
    word = "".join(seen).casefold().strip()
    if date := _DATE.fullmatch(word):  # day and month are not told apart: 5 January and 1 May count as one
        word = " ".join([date["first"] or date["last"], *sorted(f"{n:0>2}" for n in date.group(3, 4, 5, 7) if n)])
    elif _THOUSANDS.fullmatch(word):
        word = re.sub(r"\D", "", word)
    elif number := _FLOAT.fullmatch(word):
        word = number[1]
    elif _EXPONENT.fullmatch(word):
        word = str(int(Decimal(word.replace(",", "."))))
    return " ".join(run.lstrip("0") or "0" if run.isdecimal() else run for run in _RUNS.findall(word))


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
