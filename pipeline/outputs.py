"""Output folders. Each folder belongs to one spec, so a rerun of a stage resumes its work or finds it complete.

OUT/spec.json      the resolved spec and its fingerprint, written before the work starts
OUT/claim.json     the process that is writing to the folder (``claims``)
OUT/training/      checkpoints of unfinished training
OUT/run.json       the MLflow run of this output
OUT/<result>       written last; if it has the spec's fingerprint, the work is done
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from kac.data import DataDescription
from kac.model import ModelConfig, load_config, save_model
from kac.util import files, probes
from kac.util.errors import DistillKacError
from kac.util.fingerprint import hashed_fields
from kac.util.log import log
from kac.util.options import flatten
from pipeline import claims, decode
from pipeline.config import ConvertSpec, Spec, TeachSpec
from pipeline.tracking import RUN_FILE, LoggedDataset, TrackedRun, run_of_output, start_run

SPEC_FILE = "spec.json"
TRAINING_FOLDER, STATE_FILE = "training", "state.pt"


def begin(out: str, spec: Spec, result: str, **content: Any) -> bool:
    """Claim the folder ``out`` for the output of a spec. Return False if the output is already complete.

    The file ``result`` is written last. ``content`` holds the hashes of the inputs. Files of another spec are replaced
    if they include neither a result nor a checkpoint.

    Raises:
        DistillKacError: the folder belongs to another spec, another job is writing to it, or it is not writable.
    """
    identity, fingerprint = {**hashed_fields(spec), **content}, spec.fingerprint(**content)
    if _read_folder(out, result, identity, fingerprint).is_finished:
        return False
    probes.check_writable(out)
    claims.take(out)
    try:
        found = _read_folder(out, result, identity, fingerprint)  # another job may have finished before the claim
    except DistillKacError:
        claims.release(out)
        raise
    if found.is_finished:
        claims.release(out)
        return False
    if found.is_of_another_spec:  # Ray Train also records runs without checkpoints, and would resume them
        files.remove_tree(files.join(out, TRAINING_FOLDER))
    options = spec.model_dump(mode="json")
    record = {"stage": spec.stage, "fingerprint": fingerprint, "identity": identity, "options": options}
    files.write_bytes(files.join(out, SPEC_FILE), json.dumps(record, indent=2).encode())
    return True


class _Folder(NamedTuple):
    is_finished: bool
    is_of_another_spec: bool


def _read_folder(out: str, result: str, identity: dict[str, Any], fingerprint: str) -> _Folder:
    """Compare an output folder with a spec. Raise ``DistillKacError`` if it has another spec's result or checkpoint."""
    finished, started = (read_json(files.join(out, name)) for name in (result, SPEC_FILE))
    records = [record for record in (finished, started) if record is not None]
    is_of_another_spec = any(record.get("fingerprint") != fingerprint for record in records)
    if is_of_another_spec and (finished is not None or _holds_work(out)):
        raise DistillKacError(
            f"{out} belongs to another spec{_difference(identity, (started or {}).get('identity', {}))}. "
            "Choose another `out`, or remove the folder."
        )
    return _Folder(finished is not None, is_of_another_spec)


def check_owner(out: str, fingerprint: str) -> None:
    """Raise ``DistillKacError`` if another job has taken over the folder. Call this before writing a result."""
    if (read_json(files.join(out, SPEC_FILE)) or {}).get("fingerprint") != fingerprint:
        raise DistillKacError(f"{out}: a job with another spec has taken over this folder. Choose another `out`.")
    claims.check(out, claims.token_of(out))


@contextmanager
def teacher_run(
    spec: TeachSpec | ConvertSpec,
    data: DataDescription,
    content: dict[str, str],
    parent: TrackedRun | None,
    is_trial: bool = False,
) -> Iterator[TrackedRun]:
    """Start or resume the MLflow run of a stage that makes a teacher, and log the data.

    ``content`` maps NAME_sha256 to the hash of each input.
    """
    with start_run(
        spec=spec,
        fingerprint=spec.fingerprint(**content),
        inputs={name.removesuffix("_sha256"): sha256 for name, sha256 in content.items()},
        output=spec.out,
        parent=parent,
        name=spec.out.rsplit("/", 1)[-1] if is_trial else f"{spec.stage}-{spec.data.kind}",
        datasets=[LoggedDataset(spec.data.kind, data.sha256, spec.data.origin)],
    ) as run:
        decode.log_data(run, data)
        yield run


def write_model(out: str, config: ModelConfig, weights: dict[str, Tensor], run: TrackedRun) -> ModelConfig:
    """Write the model into the folder ``out``, tag its run, and remove the checkpoints. Calls ``check_owner`` first."""
    check_owner(out, config.fingerprint)
    config = save_model(out, config, weights)
    _tag_and_clean(out, config, run)
    return config


def complete_model(stage: str, out: str) -> ModelConfig:
    """Log that a model folder is complete, finish its run if necessary, and return its config."""
    log.info(f"{stage}: {out} is complete: nothing to do")
    finish_run(out)
    return load_config(out)


def finish_run(out: str, before_end: Callable[[TrackedRun, ModelConfig], Any] | None = None) -> bool:
    """Finish a complete model folder's run if its job left the run unfinished. Return whether this was necessary."""
    run = run_of_output(out)
    if run is None or run.status() in {"", "FINISHED"}:
        return False
    config = load_config(out)
    _tag_and_clean(out, config, run)
    if before_end is not None:
        before_end(run, config)
    run.end("FINISHED")
    return True


def _tag_and_clean(out: str, config: ModelConfig, run: TrackedRun) -> None:
    run.tags({"distillkac.weights_sha256": config.weights_sha256, "distillkac.path": out})
    files.remove_tree(files.join(out, TRAINING_FOLDER))


def _holds_work(out: str) -> bool:
    """Whether the folder has a checkpoint or a result, besides the files that name its spec, run and claim."""
    return any(
        name.rsplit("/", 1)[-1] == STATE_FILE
        if name.startswith(f"{TRAINING_FOLDER}/")
        else name not in {SPEC_FILE, RUN_FILE, claims.CLAIM_FILE}
        for name in files.list_sizes(out)
    )


def read_json(path: str) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is no file. Raises ``DistillKacError`` if it is damaged."""
    try:
        values = json.loads(files.read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DistillKacError(f"{path} is damaged ({error}). Remove the folder and start again.") from None
    return values if isinstance(values, dict) else {}


def _difference(identity: dict[str, Any], found: dict[str, Any]) -> str:
    ours, theirs = flatten(identity), flatten(found)
    parts = [
        f"{name.replace('_', '-')} is {theirs[name]}, not {value}"
        for name, value in ours.items()
        if name in theirs and theirs[name] != value
    ]
    return f" ({'; '.join(parts[:4])})" if parts else ""
