"""Former names of the functions for receipts."""

from pipeline.store.manifest import (
    SHARDS_PER_RECEIPT_FILE,
    is_receipt_file,
    read_receipts,
    remove_receipts,
    write_receipts,
)

__all__ = ["SHARDS_PER_RECEIPT_FILE", "is_receipt_file", "read_receipts", "remove_receipts", "write_receipts"]
