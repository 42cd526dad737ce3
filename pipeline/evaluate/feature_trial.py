"""A trial of feature networks that others made, before any other work, where the evaluation will call them."""

from collections.abc import Sequence

from kac.data import DataConfig, open_dataset
from kac.metrics.features import OWN, check_fits, try_space
from kac.util.device import default_device
from kac.util.errors import DistillKacError
from pipeline.cluster import connection as cluster
from pipeline.cluster.actor_place import choose_place
from pipeline.cluster.placement import await_room
from pipeline.config.specs import EvaluateSpec
from pipeline.evaluate.actors import task_error


def try_features(spec: EvaluateSpec, data: DataConfig) -> None:
    """Check that the feature spaces of an evaluation fit its data, and call networks of others on a few images.

    The networks run in this process or, if the evaluation uses actors, in a Ray task with the resources of an actor:
    the driver may lack the GPU or the package that a network needs.

    Raises:
        DistillKacError: a space does not fit, or a network does not give features of the images.
    """
    dataset = open_dataset(data)
    for given in spec.features:
        check_fits(given, dataset)
    foreign = [given for given in spec.features if given not in OWN]
    if not foreign:
        return
    if spec.actors == 0:
        _try_all(foreign, data)
    else:
        _try_on_ray(spec, foreign, data)


def _try_all(foreign: Sequence[str], data: DataConfig) -> None:
    for given in foreign:
        try_space(given, open_dataset(data), default_device())


def _try_on_ray(spec: EvaluateSpec, foreign: Sequence[str], data: DataConfig) -> None:
    import ray

    share = choose_place(spec).share
    await_room("evaluate", "`actors`", 1, share)
    trial = ray.remote(_try_all).options(max_retries=0, **share.remote_options)
    try:
        ray.get(trial.remote(foreign, data))
    except ray.exceptions.RayTaskError as error:
        raise task_error(error) from None
    except ray.exceptions.RayError as error:
        raise DistillKacError(
            f"`features` {', '.join(foreign)}: the trial of the networks failed in Ray: {cluster.innermost(error)}"
        ) from None
