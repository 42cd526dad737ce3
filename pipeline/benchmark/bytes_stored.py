"""Stored bytes compared with the bytes of the tensors, and the write and read speed of each compression."""

import functools

from kac.util import files
from pipeline.benchmark.measurement import Bar, Measurement, interleave, seconds_per_call
from pipeline.benchmark.setting import Setting
from pipeline.store.columns import read_rows
from pipeline.store.shards import adopt, column_array, encode, publish

COMPRESSIONS = ("none", "zstd", "lz4")
UNCOMPRESSED_BAR = Bar("<=", 1.03)
MEGABYTE = 1e6


def measure(setting: Setting) -> list[Measurement]:
    """Measure one shard of the default size with every compression. Speeds refer to the bytes of the tensors."""
    source = setting.store()
    identity, shard = source.identity, source.shards[0]
    table = adopt(source.path, shard, identity)[1]
    raw = sum(column_array(table[name]).nbytes for name in identity.knot_columns)
    stores = {name: files.join(setting.folder, f"compressed-{name}") for name in COMPRESSIONS}
    sizes = {name: publish(stores[name], shard, identity, encode(table, name)).bytes for name in COMPRESSIONS}

    def encode_speed(compression: str) -> float:
        return raw / MEGABYTE / seconds_per_call(lambda: encode(table, compression))

    def read_speed(compression: str) -> float:
        seconds = seconds_per_call(lambda: read_rows(stores[compression], identity, shard, identity.knot_columns))
        return raw / MEGABYTE / seconds

    turns = setting.spec.repeats
    encoded = interleave(turns, *(functools.partial(encode_speed, name) for name in COMPRESSIONS))
    read = interleave(turns, *(functools.partial(read_speed, name) for name in COMPRESSIONS))
    measurements = []
    for name, encodes, reads in zip(COMPRESSIONS, encoded, read, strict=True):
        is_plain = name == "none"
        bar = UNCOMPRESSED_BAR if is_plain else None
        measurements += [
            Measurement(f"stored, {name} / bytes of the tensors", "bytes", (sizes[name],), (raw,), bar),
            Measurement(f"encode, {name} / none", "MB/s", encodes, () if is_plain else encoded[0]),
            Measurement(f"read, {name} / none", "MB/s", reads, () if is_plain else read[0]),
        ]
    return measurements
