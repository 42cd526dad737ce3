"""Train a student with a few macro steps on a store's trajectories."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch

from kac.conditioning import known_classes, network_labels
from kac.losses import Interval, LossTerms, Objective
from kac.losses.refinement import (
    DataRefinementConfig,
    RefinementLoss,
    SpaceInputs,
    check_spaces,
    open_spaces,
    straight_through,
)
from kac.model import (
    CONFIG_FILE,
    ModelConfig,
    decoder_of,
    image_shape,
    learned_data,
    learned_images,
    load_config,
    load_model,
    main_weights,
)
from kac.networks import NetworkConfig, VelocityNetwork, build_network, load_weights
from kac.networks.cost import network_cost
from kac.sampling import Sampling, integrate
from kac.util.device import to_device
from kac.util.errors import ArgumentError, CheckpointError, DistillKacError
from kac.util.log import log
from kac.util.options import most
from kac.util.path_options import check_apart
from pipeline import decode, outputs, store, tracking, training
from pipeline.cluster import connection as cluster
from pipeline.cluster import storage
from pipeline.config import DistillSpec, SweepSpec
from pipeline.tracking import logged_models
from pipeline.training.batches import seed_dropout, slot_generator, update_generator


def distill(
    spec: DistillSpec,
    parent: tracking.TrackedRun | None = None,
    on_report: training.OnReport | None = None,
    *,
    is_trial: bool = False,
) -> ModelConfig | None:
    """Train a student and write its model folder. A complete folder stays unchanged.

    Args:
        parent: the run of the sweep or demo that this student is part of.
        on_report: called with the metrics of validations and checkpoints.
        is_trial: whether a sweep trains this student. If so, log no lines, because the sweep logs its own lines.

    Returns:
        The student's config, or None after a dry run.

    Raises:
        DistillKacError: the store, guidance scale, step count, initial weights and folder do not fit together.
    """
    spec = resolve_spec(check_paths(spec, lambda: bool(training.choose_workers(spec).workers)))
    plan, group = plan_student(spec), training.choose_workers(spec)
    student = plan.student
    data = student.data.paths(" of the teacher") if spec.refine.kind == "data" else {}
    storage.check_shared({"`init`": plan.init, "`teacher`": plan.teacher, **data}, lambda: bool(group.workers))
    _check_passes(spec, group)
    network = network_cost(student.network, student.sample_shape, student.num_classes)
    cost = training.describe_cost(spec.optimizer, network, plan.rows, calls_per_sample(spec))
    if spec.dry_run:
        log.info(f"distill: {cost}")
        return None
    if not outputs.begin(spec.out, spec, CONFIG_FILE, **plan.content):
        log.info(f"distill: {spec.out} is complete: nothing to do")
        if not finish_stopped_student(spec) and spec.register:
            logged_models.register_folder(spec.out, spec.register)
        return load_config(spec.out)
    training.await_workers("distill", spec.optimizer, group)
    if not is_trial:
        log.info(f"distill: {cost}\ndistill: {group}, {spec.precision.resolved(group.on_gpu)}")
        if load_config(plan.init).network.bounded and not student.network.bounded:
            reason = "guided velocities" if spec.guidance != 0 else "the straight lines of reflow"
            log.info(f"distill: the student is not bounded, because {reason} can exceed the speed limit")
    steps_taken = f"{spec.steps} steps" if not spec.objective.is_any_step else "any steps"
    summary = f"{steps_taken}, guidance {spec.guidance if spec.guidance == 'all' else format(spec.guidance, 'g')}"
    held_out = training.HeldOut(spec.store, plan.scales, spec.held_out_rows)
    with start_student_run(spec, plan, parent) as run:
        task = DistillTask(spec, plan.init)
        config = training.train_model(spec, task, f"distill {summary}", student, run, group, on_report, held_out)
        logged_models.log_finished(run, spec, config)
    if not is_trial:
        log.info(f"distill: wrote {spec.out} ({summary})")
    return config


def finish_stopped_student(spec: DistillSpec) -> bool:
    """Finish a complete student's run if its job left the run unfinished. Return whether this was necessary."""
    return outputs.finish_run(spec.out, lambda run, config: logged_models.log_finished(run, spec, config))


@dataclass(frozen=True)
class DistillPlan:
    """A student to train, whose inputs have been checked."""

    content: dict[str, str]  # fingerprints of the inputs, which are part of the student's fingerprint
    init: str  # model folder of the initial weights
    teacher: str | None  # model folder of the teacher, if the loss uses its features
    student: ModelConfig  # the config to write
    rows: int  # number of training rows
    scales: tuple[float, ...]  # guidance scales to learn


def start_student_run(
    spec: DistillSpec, plan: DistillPlan, parent: tracking.TrackedRun | None = None
) -> AbstractContextManager[tracking.TrackedRun]:
    """Start the student's run, or resume it."""
    return tracking.start_run(
        spec=spec,
        fingerprint=plan.student.fingerprint,
        inputs={"rollout": plan.content["store"], "teacher": str(plan.student.teacher_sha256)},
        output=spec.out,
        parent=parent,
        # A trial's folder name contains the values of the sweep's axes.
        name=spec.out.rsplit("/", 1)[-1] if parent else f"distill-steps-{spec.steps}-guidance-{spec.guidance}",
        datasets=[tracking.LoggedDataset("store", plan.content["store"], spec.store)],
    )


def resolve_spec(spec: DistillSpec) -> DistillSpec:
    """Return the spec with absolute paths and a settled precision."""
    spec = _absolute(spec)
    return spec.settled(lambda: training.choose_workers(spec).on_gpu)


StudentSpec = TypeVar("StudentSpec", DistillSpec, SweepSpec)


def check_paths(spec: StudentSpec, is_spread: Callable[[], bool]) -> StudentSpec:
    """Check that all machines can use the paths. Return the spec with absolute paths.

    Raises:
        DistillKacError: the cluster has several machines, but a path is local to this machine.
    """
    spec = _absolute(spec)
    init = None if spec.init == "teacher" else spec.init
    paths = {"`store`": spec.store, "`out`": spec.out, "`init`": init, "`teacher`": spec.teacher}
    cache = storage.cache_of(spec.refine.kind == "data")
    storage.check_shared({**paths, **cache}, is_spread, writes_to_mlflow=spec.out)
    return spec


def _absolute(spec: StudentSpec) -> StudentSpec:
    init = () if spec.init == "teacher" else ("init",)
    return cluster.absolute_paths(spec, "store", "out", "teacher", *init)


def plan_student(spec: DistillSpec) -> DistillPlan:
    """Check the inputs before any work starts, and return the plan.

    Raises:
        DistillKacError: an input is missing or does not fit the spec.
    """
    source = store.open(spec.store)
    identity, manifest, objective = source.identity, source.manifest, objective_of(spec)
    assert manifest is not None
    source.check_objective(objective)
    if spec.guidance != "all":
        source.check_guidance(spec.guidance)
    scales = source.guidance if spec.guidance == "all" else (spec.guidance,)
    if spec.held_out_rows and identity.source == "forward":
        raise ArgumentError(
            f"`held_out_rows` is {spec.held_out_rows}, but this is a forward store, whose rows are single intervals. "
            "Set `held_out_rows` to 0."
        )
    init = spec.init if spec.init != "teacher" else (spec.teacher or manifest.teacher)
    first = load_model(init).config
    check_apart(spec, {"the teacher of the store": init, **first.data.paths(" of the teacher")})
    _check_init(spec, objective, identity, init, first)
    decoder_of(first)
    teacher = None
    if spec.refine.kind == "data":
        check_spaces(spec.refine.spaces, image_shape(first), first.num_classes)
        decode.prepare(first.data)
        learned_data(init, first)
        if "teacher" in spec.refine.spaces:
            teacher = _check_teacher(spec, spec.teacher or manifest.teacher, identity.teacher_sha256)
    elif spec.validation_updates != 0 and not cluster.is_worker():
        # Decode the validation images now, so that no worker waits for another worker to decode them. Training does not
        # need the images; if they are missing, validation reports that.
        with contextlib.suppress(DistillKacError, OSError):
            decode.prepare(first.data.images)
    sample_ids = {w: [list(part) for part in manifest.ids(w)] for w in scales}
    content = {
        "store": manifest.fingerprint,
        "init_sha256": first.weights_sha256,
        "sample_ids": str(sample_ids if len(scales) > 1 else sample_ids[scales[0]]),
        **({"data": first.data_sha256} if spec.refine.kind == "data" else {}),
    }
    student = first.model_copy(
        update={
            "kind": "student",
            "network": student_network(spec, first),
            "steps": spec.steps,
            "knot_grid": identity.knot_grid,
            "guidance": scales[0],
            "guidance_scales": scales if spec.guidance == "all" else (),
            "conditioning": "none" if identity.labels == "null" else "classes",
            "has_guide": False,
            "refined_in": tuple(dict.fromkeys((*first.refined_in, *getattr(spec.refine, "spaces", ())))),
            "fingerprint": spec.fingerprint(**content),
            "teacher_sha256": identity.teacher_sha256,
            "store_fingerprint": manifest.fingerprint,
        }
    )
    return DistillPlan(content, init, teacher, student, source.without_last(spec.held_out_rows).rows(scales), scales)


def _check_passes(spec: DistillSpec, group: training.WorkerGroup) -> None:
    """Check that every refinement pass has at least two images, because the loss uses the distances between them."""
    passes = max(1, most(group.workers)) * spec.optimizer.accumulation
    if spec.refine.kind == "data" and min(spec.refine.real_images, spec.optimizer.batch_size) < 2 * passes:
        raise ArgumentError(
            f"`refine.real_images` is {spec.refine.real_images} and `optimizer.batch_size` is "
            f"{spec.optimizer.batch_size}, but with {passes} passes per update, both must be at least {2 * passes}."
        )


def _check_teacher(spec: DistillSpec, folder: str, sha256: str) -> str:
    """Return the teacher's model folder. Raises ``DistillKacError`` unless it has the weights with this sha256."""
    try:
        problem = "" if load_config(folder).weights_sha256 == sha256 else "has other weights"
    except CheckpointError as error:
        problem = f"cannot be used ({error})"
    if problem:
        raise ArgumentError(
            f"`refine.spaces` teacher needs the teacher that the store was rolled out with, but {folder} {problem}. "
            "Give its folder as `teacher`, or choose other spaces."
        )
    return folder


def calls_per_sample(spec: DistillSpec) -> float:
    """Return the network calls per training sample: one for the objective, and one per step of a refined image."""
    if spec.refine.kind == "none":
        return 1.0
    steps = spec.refine.steps if spec.objective.is_any_step else (spec.steps,)
    return 1 + sum(steps) / len(steps)


def objective_of(spec: DistillSpec) -> Objective:
    """Return the objective of a student."""
    return spec.objective.build(spec.steps, ("guidance",) if spec.guidance == "all" else ())


def student_network(spec: DistillSpec, first: ModelConfig) -> NetworkConfig:
    """Return the config of a student's network.

    A bounded teacher's student is bounded, too, unless its velocities may exceed the speed limit at their time. The
    velocities of a guided teacher and the straight lines of reflow may.
    """
    bounded = first.network.bounded and spec.guidance == 0 and spec.objective.kind != "reflow"
    return first.network.for_student(objective_of(spec).conditions, bounded)


def _check_init(
    spec: DistillSpec, objective: Objective, identity: store.StoreIdentity, init: str, first: ModelConfig
) -> None:
    teacher_sha256 = first.weights_sha256 if first.kind == "teacher" else first.teacher_sha256
    if teacher_sha256 != identity.teacher_sha256:
        raise CheckpointError(
            f"{init} belongs to the teacher {str(teacher_sha256)[:12]}..., but the store was rolled out with the "
            f"teacher {identity.teacher_sha256[:12]}.... Give a different `init` or `teacher`, or roll this teacher "
            "out into a different store."
        )
    is_conditional = bool(known_classes(first))
    if is_conditional != (identity.labels == "classes"):
        its, stores = ("with", "without") if is_conditional else ("without", "with")
        raise CheckpointError(
            f"{init}: this {first.kind} was trained {its} class labels, but the store was rolled out {stores} them. "
            "Give a different `init` or `teacher`, or roll the teacher out again."
        )
    if "end_time" in set(first.network.conditions) - set(objective.conditions):
        raise CheckpointError(
            f"{init} is an any-step student, which cannot initialise a student with `objective` {spec.objective.kind}. "
            "Set `objective` to flow-map or reflow."
        )
    known = "all" if first.takes_guidance else first.guidance
    if first.kind == "student" and known != spec.guidance:
        raise CheckpointError(
            f"{init} is a student of guidance {known}, but `guidance` is {spec.guidance}. Choose a different `init`."
        )


@dataclass(frozen=True)
class DistillTask:
    """Train a student's objective on the intervals of a store.

    Attributes:
        init: model folder of the initial weights: a teacher or another student.
        batch: returns a worker's intervals for an update, on its device. By default, they are read from the store.
    """

    spec: DistillSpec
    init: str
    batch: Callable[[int], Interval] | None = None

    def build(self, worker: training.Worker) -> training.Learner:
        """Return a learner for a student with initial weights."""
        spec, first, given = self.spec, load_model(self.init), self.batch
        objective = objective_of(spec)
        torch.manual_seed(spec.seed)
        config = student_network(spec, first.config)
        network = build_network(config, first.config.sample_shape, first.config.num_classes, first.config.path.build())
        load_weights(network, main_weights(first.network))
        read = _store_reader(spec, objective, worker) if given is None else lambda update, seat: given(update)
        # Each of a seat's passes uses a part of the seat's batch, so the whole batch is read once and cached.
        batch = functools.lru_cache(maxsize=1)(read)
        refine = None
        if spec.refine.kind == "data":
            refine = _refinement(spec, spec.refine, self.init, first.config, worker.device)

        def losses(network: VelocityNetwork, micro: training.MicroBatch) -> LossTerms:
            seed_dropout(spec.seed, micro)
            parts = batch(micro.update, micro.seat)
            share = Interval(*(part[micro.slot % micro.accumulation :: micro.accumulation] for part in parts))
            distillation = objective.losses(network, share)
            return distillation if refine is None else refine(network, micro, distillation)

        return training.Learner(network, losses, spec.optimizer, worker, spec.precision)


def _store_reader(spec: DistillSpec, objective: Objective, worker: training.Worker) -> Callable[[int, int], Interval]:
    """Return a function (update, seat) that reads the seat's next batch onto the worker's device.

    A worker with several seats must read each seat's batches in the same order as a worker that has only that seat. The
    order depends on the memory limit, so every seat gets the full limit. Streamed columns can use this much memory for
    each seat, but loaded columns use it only once per worker.
    """
    source = store.open(spec.store).without_last(spec.held_out_rows)
    readers: dict[int, Iterator[Interval]] = {}  # by seat

    def read(update: int, seat: int) -> Interval:
        if seat not in readers:  # a resumed run does not start at update 0
            readers[seat] = source.interval_batches(
                spec.optimizer.batch_size // worker.seats,
                objective,
                source.guidance if spec.guidance == "all" else spec.guidance,
                rank=seat,
                world_size=worker.seats,
                seed=spec.seed,
                start_batch=update,
                memory_bytes=int(spec.memory_gib * 2**30),
            )
        return Interval(*(to_device(part, worker.device) for part in next(readers[seat])))  # the reader prefetches

    return read


def _refinement(
    spec: DistillSpec, options: DataRefinementConfig, init: str, model: ModelConfig, device: torch.device
) -> Callable[[VelocityNetwork, training.MicroBatch, LossTerms], LossTerms]:
    """Return a function that adds the distance between student and training images to the distillation losses.

    The distillation losses are the anchor, weighted by ``options.anchor``. Diagnostics are not weighted.
    """
    source, path = store.open(spec.store), model.path.build()
    data, latents, decode = learned_images(init, model), learned_data(init, model), decoder_of(model)
    assert source.manifest is not None
    teacher = spec.teacher or source.manifest.teacher
    spaces = open_spaces(options.spaces, SpaceInputs(data, device, lambda: load_model(teacher), spec.precision))
    num_classes = model.num_classes if known_classes(model) else 0
    weight, in_latents = options.class_weight, bool(model.data.autoencoder)
    distance = RefinementLoss(data.train, spaces, num_classes, options.distance, weight, device, latents.train)
    sees_images = not in_latents or not all(space.takes_latents for space in spaces)
    frequencies, size = torch.tensor(model.class_frequencies), spec.optimizer.batch_size

    def refine(network: VelocityNetwork, micro: training.MicroBatch, distillation: LossTerms) -> LossTerms:
        rows, draws = size // micro.slots, update_generator(spec.seed, micro.update)
        if options.real_images < distance.count:
            real_rows = torch.randint(distance.count, (options.real_images,), generator=draws)
        else:
            real_rows = torch.randperm(distance.count, generator=draws)
        label = to_device(micro.share(torch.multinomial(frequencies, size, True, generator=draws)), device)
        noise = slot_generator(spec.seed, micro)
        zeros, ones = torch.zeros(rows, *model.sample_shape, device=device), torch.ones(rows, device=device)
        x_1 = path.sample(zeros, ones, noise).x_t
        steps = options.steps[micro.update % len(options.steps)] if "end_time" in network.takes else spec.steps
        sampling = Sampling(0.0, steps, "euler", source.identity.knot_grid)
        x_0 = integrate(network, x_1, network_labels(model, label), sampling).x
        images = straight_through(decode(x_0)) if sees_images else x_0
        loss = distance(images, label, micro.share(real_rows), micro.update, x_0 if in_latents else None)
        anchored = {name: options.anchor * loss for name, loss in distillation.losses.items()}
        return LossTerms({**anchored, options.distance: loss}, distillation.diagnostics)

    return refine
