"""Receipts of an unfinished store: what a rollout has published so far, so that its rerun need not read it all again.

STORE/receipts-0123456789ab.json                  the receipts of some hundred shards; gone once there is a manifest

They are noted now and then. A shard without a noted receipt is read from end to end before it counts, which is all that
a lost note costs.
"""

import json
import re
import uuid
from collections.abc import Iterable, Sequence

from kac.util import files
from kac.util.options import Options
from pipeline.store.layout import StoreError, StoreIdentity
from pipeline.store.shards import Receipt
from pipeline.store.threads import in_threads
from pipeline.store.versions import SCHEMA_VERSION, parse

SHARDS_A_NOTE = 500
"""A rerun reads fewer shards again than this, beside those that the driver had not heard of."""

_NOTE = re.compile(r"receipts-[0-9a-f]{12}\.json")


class Note(Options):
    """Receipts of shards that are published."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    shards: tuple[Receipt, ...]


def is_note(name: str) -> bool:
    """Whether a path below a store is that of a note."""
    return _NOTE.fullmatch(name) is not None


def write_note(store: str, identity: StoreIdentity, receipts: Sequence[Receipt]) -> None:
    """Note the receipts of shards that are published."""
    note = Note(fingerprint=identity.fingerprint(), shards=tuple(receipts))
    text = json.dumps(note.model_dump(mode="json"))
    files.write_bytes(files.join(store, f"receipts-{uuid.uuid4().hex[:12]}.json"), text.encode())


def read_notes(store: str, identity: StoreIdentity, names: Iterable[str]) -> dict[str, Receipt]:
    """The receipts in the notes among some files of a store, by shard.

    Left out are notes that are damaged, gone or of another store, and shards on whose content two notes do not agree.
    """
    known: dict[str, Receipt] = {}
    disputed: set[str] = set()
    for note in in_threads(lambda name: _read(files.join(store, name)), filter(is_note, names)):
        if note is None or note.fingerprint != identity.fingerprint():
            continue
        for receipt in note.shards:
            if known.setdefault(receipt.name, receipt) != receipt:
                disputed.add(receipt.name)
    return {name: receipt for name, receipt in known.items() if name not in disputed}


def remove_notes(store: str) -> None:
    """Remove the notes of a store that has its manifest."""
    for name in files.names_in(store):
        if is_note(name):
            files.remove(files.join(store, name))


def _read(where: str) -> Note | None:
    try:
        return parse(where, Note, files.read_bytes(where))
    except (FileNotFoundError, StoreError, ValueError):
        return None
