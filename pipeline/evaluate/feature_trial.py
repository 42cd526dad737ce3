"""A trial run of the user's feature networks before any other work, where the evaluation will run them."""

from collections.abc import Sequence

from kac.data import DataConfig, open_dataset
from kac.metrics.features import OWN, check_fits, try_space
from kac.util.device import default_device
from kac.util.errors import DistillKacError
from pipeline.cluster import connection as cluster
from pipeline.cluster.placement import choose_actors, wait_for_capacity
from pipeline.config import EvaluateSpec
from pipeline.evaluate.actors import task_error


def try_features(spec: EvaluateSpec, data: DataConfig) -> None:
    """Check that the feature spaces of an evaluation fit its data, and run the user's networks on a few images.

    The networks run in this process or, if the evaluation uses actors, in a Ray task with the resources of an actor,
    because the driver may lack the GPU or the package that a network needs.

    Raises:
        DistillKacError: a space does not fit the data, or a network does not give features.
    """
    dataset = open_dataset(data)
    for given in spec.features:
        check_fits(given, dataset)
    outside = [given for given in spec.features if given not in OWN]
    if not outside:
        return
    if spec.actors == 0:
        _try_all(outside, data)
    else:
        _try_on_ray(spec, outside, data)


def _try_all(outside: Sequence[str], data: DataConfig) -> None:
    for given in outside:
        try_space(given, open_dataset(data), default_device())


def _try_on_ray(spec: EvaluateSpec, outside: Sequence[str], data: DataConfig) -> None:
    import ray

    resources = choose_actors(spec).resources
    wait_for_capacity("evaluate", "`actors`", 1, resources)
    trial = ray.remote(_try_all).options(max_retries=0, **resources.remote_options)
    try:
        ray.get(trial.remote(outside, data))
    except ray.exceptions.RayTaskError as error:
        raise task_error(error) from None
    except ray.exceptions.RayError as error:
        raise DistillKacError(
            f"`features` {', '.join(outside)}: the trial run failed in Ray: {cluster.innermost(error)}"
        ) from None
