"""Study: test the claims of the Kac-flow papers on a teacher, its store, its students and its rivals.

The modules in ``kac/study/`` measure the claims. A claim whose inputs are missing is left out, and its line says why.
"""

import json
import math
import re
from collections import Counter
from functools import partial
from typing import Any

import torch

from kac.conditioning import known_classes
from kac.guidance import check_guidance
from kac.metrics import Metric
from kac.model import ModelConfig, learned_data, learned_images, load_teacher_config
from kac.sampling import Sampling
from kac.study import MEASURES, Inputs, StudyModel, Training, Trajectories
from kac.util import files
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.log import log
from kac.util.options import flatten
from kac.util.path_options import check_apart
from pipeline import outputs, store, tracking
from pipeline.cluster import connection as cluster
from pipeline.config import DistillSpec, StudySpec
from pipeline.distill import calls_per_sample, objective_of
from pipeline.evaluate.inputs import load_student_config, student_folders, unique_names

STUDY_FILE = "study.json"


def study(spec: StudySpec, parent: tracking.TrackedRun | None = None) -> dict[str, str]:
    """Measure every claim, print one line per claim, and write ``study.json`` and the pictures.

    Returns:
        The printed lines, by claim.

    Raises:
        DistillKacError: a model or the store is missing or belongs to another teacher, or a rival is not comparable.
    """
    spec = spec.settled(torch.cuda.is_available)
    spec = cluster.absolute_paths(spec, "teacher", "store", "students", "rivals", "out")
    opened = None if spec.store is None else store.open(spec.store)
    inputs = _open(spec, opened)
    check_apart(spec, inputs.teacher.config.data.paths(" of the teacher"))
    content = _content(spec, inputs, opened)
    if not outputs.begin(spec.out, spec, STUDY_FILE, **content):
        log.info(f"study: {spec.out} is complete: nothing to do")
        return _log_table(json.loads(files.read_bytes(files.join(spec.out, STUDY_FILE)))["claims"])
    fingerprint = spec.fingerprint(**content)
    sources = {f"student.{model.name}": model.config.fingerprint for model in inputs.students}
    sources["teacher"] = inputs.teacher.config.weights_sha256
    sources |= {f"rival.{number}": model.config.fingerprint for number, model in enumerate(inputs.rivals, 1)}
    sources |= {"rollout": opened.identity.fingerprint()} if opened is not None else {}
    claims: dict[str, dict[str, Any]] = {}
    with tracking.start_run(spec=spec, fingerprint=fingerprint, inputs=sources, output=spec.out, parent=parent) as run:
        for claim in spec.claims:
            outcome = MEASURES[claim](inputs)
            if isinstance(outcome, str):
                claims[claim] = {"found": f"left out: {outcome}"}
                continue
            claims[claim] = {"found": outcome.text, "values": outcome.values}
            # MLflow allows only some characters in names, and only finite values.
            metrics = {re.sub(r"[^\w./ -]", "_", f"{claim}/{name}"): value for name, value in outcome.metrics.items()}
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            tracking.declare(*(Metric(name, f"measures the claim {claim}; see {STUDY_FILE}") for name in finite))
            run.metrics(finite)
            _write(spec, run, fingerprint, f"{claim}.png", outcome.picture)
            if outcome.table:
                _write(spec, run, fingerprint, f"{claim}.md", outcome.table.encode())
        record = {"fingerprint": fingerprint, "samples": spec.samples, "seed": spec.seed, "claims": claims}
        finite_record = json.loads(json.dumps(record), parse_constant=lambda name: None)  # None instead of NaN
        _write(spec, run, fingerprint, STUDY_FILE, json.dumps(finite_record, indent=2).encode())
    return _log_table(claims)


def _open(spec: StudySpec, opened: store.Store | None) -> Inputs:
    """Open the inputs and check that they belong together."""
    teacher = load_teacher_config(spec.teacher)
    own = StudyModel("teacher", spec.teacher, teacher)
    data, images = learned_data(spec.teacher, teacher), learned_images(spec.teacher, teacher)
    names = unique_names(path for given in spec.students for path in student_folders(given))
    students = [StudyModel(n, path, load_student_config(path, spec.teacher, teacher)) for path, n in names.items()]
    check_guidance(teacher, [w for _, _, config in students if (w := config.guidance) is not None])
    if opened is not None and opened.identity.teacher_sha256 != teacher.weights_sha256:
        raise DistillKacError(
            f"{spec.store} belongs to another teacher ({opened.identity.teacher_sha256[:12]}...), not to "
            f"{spec.teacher} ({teacher.weights_sha256[:12]}...). Give the teacher of the store."
        )
    rivals = _open_rivals(spec.rivals)
    for number, rival in enumerate(rivals):
        _check_rival(rival, own, rivals[:number])
    trajectories = None
    if opened is not None:
        identity, w = opened.identity, min(opened.guidance)
        sampling = Sampling(w, identity.solver_steps, identity.solver, identity.knot_grid, identity.time_factor)
        read = partial(opened.first, spec.samples, w)
        is_forward, rows = identity.source == "forward", {w: opened.rows(w) for w in opened.guidance}
        trajectories = Trajectories(sampling, is_forward, identity.knots, identity.knot_columns, read, rows)
    options = (spec.samples, spec.steps, spec.precision, spec.seed, spec.batch_size)
    trainings = {spec.teacher: _teaching(spec.teacher)}
    trainings |= {model.path: _distillations(model, opened) for model in students if opened is not None}
    return Inputs(own, students, rivals, trajectories, data, images, *options, trainings)


def _teaching(path: str) -> list[Training]:
    """The trainings of a teacher and of its initial weights; empty if one is unknown."""
    trainings: list[Training] = []
    while path:
        options = _record(path).get("options", {})
        if not (optimizer := options.get("optimizer")):
            return []
        trainings.append(Training(path, optimizer["updates"] * optimizer["batch_size"]))
        path = options.get("init") or ""
    return trainings


def _distillations(student: StudyModel, opened: store.Store) -> list[Training]:
    """The trainings of a student and of its initial weights; empty if one is unknown, or did not use the store."""
    path, trainings = student.path, []
    while path != "teacher" and (record := _record(path)).get("stage") not in {"teach", "convert"}:
        if record.get("stage") != "distill" or record["identity"]["store"] != opened.identity.fingerprint():
            return []
        try:
            spec = DistillSpec(**record["options"])
            length = objective_of(spec).mean_length(opened.identity.knots)
        except ArgumentError:  # another version wrote the record
            return []
        samples = spec.optimizer.updates * spec.optimizer.batch_size
        trainings.append(Training(path, samples, calls_per_sample(spec), length))
        path = spec.init
    return trainings if set(student.scales) <= set(opened.guidance) else []


def _record(path: str) -> dict[str, Any]:
    """The record of a model folder's spec; empty if the folder is missing, or was made elsewhere."""
    try:
        return dict(json.loads(files.read_bytes(files.join(path, outputs.SPEC_FILE))))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _open_rivals(folders: tuple[str, ...]) -> list[StudyModel]:
    """Open the rivals. Each is named after its path. If several have the same path, the name includes the folder."""
    names = unique_names(folders)
    configs = {path: load_teacher_config(path) for path in names}
    counts = Counter(str(config.path) for config in configs.values())
    return [
        StudyModel(f"{config.path}" + (f" ({names[path]})" if counts[str(config.path)] > 1 else ""), path, config)
        for path, config in configs.items()
    ]


def _check_rival(rival: StudyModel, teacher: StudyModel, others: list[StudyModel]) -> None:
    """Raise ``ArgumentError`` unless the rival is another model that differs from the teacher only in path and seed."""
    for other in (teacher, *others):
        if (rival.config.weights_sha256, rival.config.path) == (other.config.weights_sha256, other.config.path):
            raise ArgumentError(f"`rivals` {rival.path} is the same model as {other.path}. Leave it out.")
    ours, theirs = (_training_choices(model.path, model.config) for model in (teacher, rival))
    differences = [
        f"{name} is {theirs[name]} instead of {value}"
        for name, value in ours.items()
        if name in theirs and theirs[name] != value
    ]
    if differences:
        raise ArgumentError(
            f"`rivals` {rival.path} was not trained like the teacher: {', '.join(differences)}. Train a rival with the "
            "teacher's values."
        )


def _training_choices(path: str, config: ModelConfig) -> dict[str, Any]:
    """The model's data and network and, unless it was converted, the samples and batch size of its training."""
    choices: dict[str, Any] = {"data": config.data_sha256[:12], "conditional": bool(known_classes(config))}
    choices |= flatten({"network": config.network.model_dump(mode="json", exclude={"bounded"})})
    optimizer, trainings = _record(path).get("options", {}).get("optimizer", {}), _teaching(path)
    choices |= {name: optimizer[name] for name in ("updates", "batch_size") if name in optimizer}
    # With the weights of an earlier training, the budget is the sum of both.
    return choices | ({"training samples": sum(each.samples for each in trainings)} if trainings else {})


def _content(spec: StudySpec, inputs: Inputs, opened: store.Store | None) -> dict[str, Any]:
    """The inputs that are part of a study's fingerprint."""
    students = {model.name: model.config.weights_sha256 for model in inputs.students}
    content: dict[str, Any] = {"teacher": inputs.teacher.config.weights_sha256, "students": students}
    rivals = {model.name: model.config.weights_sha256 for model in inputs.rivals}
    if list(rivals) == ["gaussian"] and "paths" not in spec.claims:
        content["rival"] = rivals["gaussian"]  # the form of earlier studies, which had no other rivals
    elif rivals:
        content["rivals"] = rivals
    if opened is not None:
        w = min(opened.guidance)
        rows = min(inputs.samples, opened.rows(w))
        content["store"] = {"identity": opened.identity.fingerprint(), "guidance": w, "rows": rows}
    return content


def _write(spec: StudySpec, run: tracking.TrackedRun, fingerprint: str, name: str, content: bytes) -> None:
    run.artifact(name, content)
    outputs.check_owner(spec.out, fingerprint)
    files.write_bytes(files.join(spec.out, name), content)


def _log_table(claims: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Log and return one line per claim."""
    lines = {claim: entry["found"] for claim, entry in claims.items()}
    width = max(map(len, lines))
    log.info("\n".join(f"{claim.ljust(width)}  {line}" for claim, line in lines.items()))
    return lines
