"""Receipts of an unfinished store. They spare a rerun of the rollout from reading all published shards.

STORE/receipts-0123456789ab.json                  the receipts of some hundred shards; deleted after the manifest

The rollout writes a receipt file now and then. Losing one costs only time: a rerun reads every shard without a receipt
from end to end before the shard counts.
"""

import json
import re
import uuid
from collections.abc import Iterable, Sequence

from kac.util import files
from kac.util.options import Options
from pipeline.store.layout import StoreError, StoreIdentity
from pipeline.store.shards import Receipt
from pipeline.store.threads import map_in_threads
from pipeline.store.versions import SCHEMA_VERSION, parse

SHARDS_PER_RECEIPT_FILE = 500
"""A rerun reads at most this many shards again, plus the shards that were published without the driver's knowledge."""

_NAME = re.compile(r"receipts-[0-9a-f]{12}\.json")


class ReceiptFile(Options):
    """Receipts of published shards."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    shards: tuple[Receipt, ...]


def is_receipt_file(name: str) -> bool:
    """Return whether a path relative to the store names a receipt file."""
    return _NAME.fullmatch(name) is not None


def write_receipts(store: str, identity: StoreIdentity, receipts: Sequence[Receipt]) -> None:
    """Write a new receipt file."""
    content = ReceiptFile(fingerprint=identity.fingerprint(), shards=tuple(receipts))
    text = json.dumps(content.model_dump(mode="json"))
    files.write_bytes(files.join(store, f"receipts-{uuid.uuid4().hex[:12]}.json"), text.encode())


def read_receipts(store: str, identity: StoreIdentity, names: Iterable[str]) -> dict[str, Receipt]:
    """Return the receipts by shard name, from the receipt files among ``names``.

    Files that are damaged, missing or from another store are ignored, and so are shards with contradicting receipts.
    """
    known: dict[str, Receipt] = {}
    disputed: set[str] = set()
    for content in map_in_threads(lambda name: _read(files.join(store, name)), filter(is_receipt_file, names)):
        if content is None or content.fingerprint != identity.fingerprint():
            continue
        for receipt in content.shards:
            if known.setdefault(receipt.name, receipt) != receipt:
                disputed.add(receipt.name)
    return {name: receipt for name, receipt in known.items() if name not in disputed}


def _read(where: str) -> ReceiptFile | None:
    try:
        return parse(where, ReceiptFile, files.read_bytes(where))
    except (FileNotFoundError, StoreError, ValueError):
        return None


def remove_receipts(store: str) -> None:
    """Remove the receipt files of a finished store."""
    for name in files.names_in(store):
        if is_receipt_file(name):
            files.remove(files.join(store, name))
