"""The endpoint store, which the rollout writes and the later stages read. See pipeline/README.md."""

from pipeline.store.columns import Batch
from pipeline.store.layout import StoreError, StoreIdentity
from pipeline.store.manifest import Manifest, read_manifest
from pipeline.store.reader import Store
from pipeline.store.reader import open_store as open

__all__ = ["Batch", "Manifest", "Store", "StoreError", "StoreIdentity", "open", "read_manifest"]
