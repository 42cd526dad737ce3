"""Idempotent outputs: a folder belongs to one spec; work in it is finished or resumed, and another spec is refused.

OUT/spec.json      the resolved spec and its fingerprint, written before the work starts
OUT/claim.json     the process that works there now: see ``claims``
OUT/training/      what a stopped training goes on from
OUT/run.json       the run of MLflow that it is made in
OUT/<result>       written last; with the same fingerprint it says that the work is done
"""

import json
from typing import Any

from torch import Tensor

from kac.model import ModelConfig, save_model
from kac.util import files, probes
from kac.util.errors import DistillKacError
from kac.util.fingerprint import hashed_fields
from kac.util.options import flatten
from pipeline import claims
from pipeline.config.specs import Spec
from pipeline.tracking import RUN_FILE, TrackedRun, run_of_output

SPEC_FILE = "spec.json"
TRAINING_FOLDER, STATE_FILE = "training", "state.pt"


def begin(out: str, spec: Spec, result: str, **content: Any) -> bool:
    """Take the folder ``out`` for what ``spec`` makes from inputs of this ``content``; False if it is made already.

    A folder in which another spec has left neither a result nor anything to go on from is free to take.

    Args:
        result: the file that is written last.

    Raises:
        DistillKacError: the folder belongs to another spec, another job works there now, or it cannot be written to.
    """
    mine = {**hashed_fields(spec), **content}
    done, begun = (_read_json(files.join(out, name)) for name in (result, SPEC_FILE))
    found = [record.get("fingerprint") for record in (done, begun) if record is not None]
    is_anothers = any(fingerprint != spec.fingerprint(**content) for fingerprint in found)
    if is_anothers and (done is not None or _holds_work(out)):
        raise DistillKacError(
            f"{out}: expected a new folder or one of this spec, found one of another spec"
            f"{_difference(mine, (begun or {}).get('identity', {}))}: choose another `out`, or remove it"
        )
    if done is not None:
        return False
    probes.check_writable(out)
    claims.take(out)
    if is_anothers:  # Ray Train keeps records of a run that left no checkpoint, and would go on with it
        files.remove_tree(files.join(out, TRAINING_FOLDER))
    record = {
        "stage": spec.stage,
        "fingerprint": spec.fingerprint(**content),
        "identity": mine,
        "options": spec.model_dump(mode="json"),
    }
    files.write_bytes(files.join(out, SPEC_FILE), json.dumps(record, indent=2).encode())
    return True


def check_owner(out: str, fingerprint: str) -> None:
    """Refuse to write a result into a folder that another job has taken meanwhile.

    Raises:
        DistillKacError: it has.
    """
    found = (_read_json(files.join(out, SPEC_FILE)) or {}).get("fingerprint")
    if found != fingerprint:
        raise DistillKacError(
            f"{out}: expected the folder of this job, found that another has taken it meanwhile: choose another `out`"
        )
    claims.check(out, claims.token_of(out))


def write_model(out: str, config: ModelConfig, weights: dict[str, Tensor], run: TrackedRun) -> ModelConfig:
    """Write the model folder ``out``, tag its run, and remove what the training would have gone on from.

    Raises:
        DistillKacError: another job has taken the folder meanwhile.
    """
    check_owner(out, config.fingerprint)
    config = save_model(out, config, weights)
    _close(out, config, run)
    return config


def go_on_after_model(out: str, config: ModelConfig) -> TrackedRun | None:
    """The run of a complete model folder whose job was stopped before it could end it; None if that is over.

    Whoever asks ends it.
    """
    run = run_of_output(out)
    if run is None or run.status() in {"", "FINISHED"}:
        return None
    _close(out, config, run)
    return run


def _close(out: str, config: ModelConfig, run: TrackedRun) -> None:
    run.tags({"distillkac.weights_sha256": config.weights_sha256, "distillkac.path": out})
    files.remove_tree(files.join(out, TRAINING_FOLDER))


def _holds_work(out: str) -> bool:
    """Whether there is anything but options, the name of a run, and records of a training without a checkpoint."""
    return any(
        name.rsplit("/", 1)[-1] == STATE_FILE
        if name.startswith(f"{TRAINING_FOLDER}/")
        else name not in {SPEC_FILE, RUN_FILE, claims.CLAIM_FILE}
        for name in files.list_sizes(out)
    )


def _read_json(path: str) -> dict[str, Any] | None:
    try:
        raw = files.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        values = json.loads(raw)
    except ValueError as error:
        raise DistillKacError(f"{path}: expected JSON, found {error}: remove the folder and start again") from None
    return values if isinstance(values, dict) else {}


def _difference(mine: dict[str, Any], found: dict[str, Any]) -> str:
    flat_mine, flat_found = flatten(mine), flatten(found)
    parts = [
        f"{name.replace('_', '-')} is {flat_found[name]}, not {value}"
        for name, value in flat_mine.items()
        if name in flat_found and flat_found[name] != value
    ]
    return f" ({'; '.join(parts[:4])})" if parts else ""
