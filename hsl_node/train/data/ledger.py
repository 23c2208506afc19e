"""The split ledger: remembers, over years, on which side each patient is. One private JSON file of hashed keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hsl_node.errors import LocalStateError
from hsl_node.federation.canonical import canonical_json
from hsl_node.federation.plan import Plan
from hsl_node.host.durable import Step
from hsl_node.train.data.files import replacing

LEDGER_VERSION = 1


# A page for each kind of split (`title_of`: another seed or another ratio is another split): hashed key -> 0, 1, 2.
Pages = Mapping[str, Mapping[str, int]]


def title_of(plan: Plan) -> str:
    return f"seed {plan.seed}, " + "/".join(str(p) for p in plan.split_percent)


def read_ledger(path: Path) -> Pages:
    """Raises LocalStateError where the file is damaged: making a new split silently would leak test patients."""
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != LEDGER_VERSION:
            raise ValueError(f"version {content['version']}")
        pages = {str(title): dict(page) for title, page in content["splits"].items()}
        if any(split not in (0, 1, 2) for page in pages.values() for split in page.values()):
            raise ValueError("a split that is none")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise LocalStateError(
            f"the split ledger {path} cannot be read ({type(exc).__name__})",
            remedy="restore it from your backup; without it patients may move between train and test."
            " To start a new split knowingly, move the file away",
        ) from exc
    return pages


def write_ledger(path: Path, pages: Pages) -> None:
    with replacing(path, Step.TRAINER_LEDGER) as file:
        file.write(canonical_json({"version": LEDGER_VERSION, "splits": pages}))
