"""The dataset card of a store, ``README.md``, with which Hugging Face shows and loads a published store."""

import contextlib
import copy
import math
from typing import Any

import yaml

from kac.data.class_names import list_classes
from kac.solvers import knot_times
from kac.util import files
from pipeline.store.layout import CARD, LABEL, SCALAR_TYPES, guidance_folder
from pipeline.store.manifest import Manifest

GENERATED = "This page is rewritten when the store grows. To keep your own changes, delete this line."
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def write_card(store: str, manifest: Manifest, names: tuple[str, ...] = (), license: str = "", like: str = "") -> None:
    """Write the card of a store with this manifest, unless a user removed the line ``GENERATED`` from the card.

    Empty class names or an empty license are taken from the card of the store ``like`` (default: ``store``).
    """
    old, known = _read(store)
    if old and GENERATED not in old:
        return
    known = _read(like)[1] if like else known
    names, license = names or known.get("class_names", ()), license or known.get("license", "")
    identity, knots = manifest.identity, manifest.identity.knot_columns
    rows = {guidance_folder(w).split("/")[1]: sum(b - a for a, b in manifest.ids(w)) for w in manifest.guidance}
    types: dict[str, Any] = {name: SCALAR_TYPES[name].to_pandas_dtype().__name__ for name in identity.scalar_columns}
    if names and identity.labels == "classes":
        types[LABEL] = {"class_label": {"names": list(names)}}
    flat = {"sequence": identity.dtype, "length": math.prod(identity.sample_shape)}  # `datasets` cannot read tensors
    features = [*({"name": k, "dtype": v} for k, v in types.items()), *({"name": k, **flat} for k in knots)]
    front = {
        "license": license,
        "tags": ["distillation", "flow-matching", "distillkac"],
        "size_categories": [SIZES[min(max(len(str(sum(rows.values()))) - 3, 0), len(SIZES) - 1)]],
        "class_names": list(names),
        "configs": [{"config_name": scale, "data_files": f"data/{scale}/*.parquet"} for scale in rows],
        "dataset_info": [{"config_name": scale, "features": copy.deepcopy(features)} for scale in rows],
    }
    times = ", ".join(f"{t:.4g}" for t in knot_times(identity.knots, identity.knot_grid).tolist())
    scale, last, states = next(iter(rows)), knots[-1], f"{identity.dtype} {list(identity.sample_shape)}"
    columns = f"| `{knots[0]}` to `{last}` | {states} | state at t = {times} |"
    if identity.is_forward:
        columns = f"| `interval` | int32 | k: the row leads from t_k to t_(k+1), with t_0, t_1, ... = {times} |\n"
        columns += f"| `{knots[0]}`, `{last}` | {states} | noised data at t_k; the teacher's state at t_(k+1) |"
    label = "null label" if identity.labels == "null" else list_classes(names) or "class"
    reshape = f".reshape({', '.join(map(str, (-1, *identity.sample_shape)))})"
    text = f"""---
{yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False, default_flow_style=None)}---
# {"Intervals" if identity.is_forward else "Trajectories"} of a flow model
States of a frozen teacher between t = 1 (noise) and t = 0 (data), for [distillation](https://arxiv.org/abs/2509.21513).
- teacher: `{manifest.teacher.rstrip("/").rsplit("/", 1)[-1]}`, sha256 of the weights `{identity.teacher_sha256}`
- path: {identity.path}; time factor: {identity.time_factor:g}
- solver: {identity.solver}, {identity.solver_steps} steps on a grid ({identity.knot_grid})
- precision: {identity.precision.dtype}; seed: {identity.seed}; fingerprint of the store: `{manifest.fingerprint}`
- rows: {", ".join(f"{scale} {count:,}" for scale, count in rows.items())} (guidance 0.0: no guidance)

| column | type | content |
|---|---|---|
| `sample_id` | int64 | id of the row; rows with the same id start at the same state at every guidance scale |
| `label` | int32 | {label} |
| `kinetic_energy` | float32 | integral of the squared velocity over time |
{columns}

Run these examples in this folder. `datasets`, pandas and DuckDB return states as flat arrays. To read single files with
`datasets.load_dataset("parquet", data_files=...)`, also give `features=rows.features`.
```python
import os, datasets
rows = datasets.load_dataset(os.getcwd(), "{scale}", split="train")  # or the dataset's name on the Hub
states = rows.with_format("numpy")["{last}"][:]{reshape}
```
```python
import pyarrow.parquet as pq
states = pq.read_table("data/{scale}")["{last}"].combine_chunks().to_numpy_ndarray()
```
```python
import duckdb, numpy as np
rows = duckdb.sql("select guidance, sample_id, {last} from 'data/*/*.parquet' order by all").fetchnumpy()
states = np.stack(rows["{last}"]){reshape}
```
{GENERATED}
"""
    files.write_bytes(files.join(store, CARD), text.encode())


def _read(store: str) -> tuple[str, dict[str, Any]]:
    """Return a store's card and the values of its front matter, which a user may have changed."""
    text = ""
    with contextlib.suppress(FileNotFoundError, yaml.YAMLError, TypeError, ValueError):
        text = files.read_bytes(files.join(store, CARD)).decode(errors="replace")
        return text, dict(yaml.safe_load(text.split("\n---\n")[0]))
    return text, {}
