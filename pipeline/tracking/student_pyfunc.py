"""The code of a logged model. MLflow runs a copy of this file, stored next to the weights and a copy of ``kac``.

This file imports only ``kac`` from this project, so a logged model needs neither Ray, a dataset nor this checkout.
"""

from typing import Any

import numpy as np
import pandas
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from kac import noise
from kac.conditioning import check_labels, known_classes
from kac.model import Model, image_shape, load_model
from kac.precision import Precision
from kac.sampling import BATCH_SIZE, draw, student_sampling, teacher_sampling
from kac.util.device import default_device
from kac.util.errors import DistillKacError


class SamplingModel(PythonModel):  # type: ignore[misc]
    """Draws the same images as ``jobs.sample`` for the same seed, labels and steps."""

    def load_context(self, context: Any) -> None:
        """Load the model onto the GPU if the machine has one, otherwise onto the CPU."""
        folder = context.artifacts["model"]
        network, config = load_model(folder, default_device())
        if config.data.autoencoder:
            data = config.data.model_copy(update={"autoencoder": f"{folder}/autoencoder"})
            config = config.model_copy(update={"data": data})
        self.model = Model(network, config)

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """Return images [rows, *sample], float32 in [-1, 1] on the 8-bit grid; row i is sample i of the seed.

        Args:
            context: unused.
            model_input: column ``label`` with a class per row; -1 draws a class by the data's class frequencies. An
                unconditional model accepts only -1.
            params: ``seed`` (default 0), ``steps`` and ``guidance`` (default: a student's own, or 100 and 0 for a
                teacher).

        Raises:
            MlflowException: the model does not know the class, was not trained for these steps or this guidance, or
                the seed is out of range.
        """
        try:
            return self._images(torch.tensor(model_input["label"].to_numpy(np.int64)), params or {})
        except DistillKacError as error:
            # MLflow's server answers this exception with its message, and any other exception with a traceback.
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _images(self, label: torch.Tensor, given: dict[str, Any]) -> "np.ndarray[Any, np.dtype[np.float32]]":
        config, seed = self.model.config, int(given.get("seed") or 0)
        if not 0 <= seed < 2**31:
            raise DistillKacError(f"`seed` is {seed}. Choose a number from 0 to {2**31 - 1}.")
        choose = teacher_sampling if config.kind == "teacher" else student_sampling
        sampling = choose(config, steps=given.get("steps"), guidance=given.get("guidance"))
        if sampling.steps < 1:
            raise DistillKacError(f"`steps` is {sampling.steps}. Choose at least 1.")
        if not len(label):
            return np.zeros((0, *image_shape(config)), np.float32)
        if chosen := tuple(label[label != -1].tolist()):
            check_labels(config, chosen, "`label`", any_class="-1")
        drawn = noise.labels(seed, range(len(label)), config.class_frequencies)
        classes = tuple(torch.where(label < 0, drawn, label).tolist()) if known_classes(config) else None
        return draw(self.model, sampling, Precision(), seed, len(label), BATCH_SIZE, classes).images.numpy()


set_model(SamplingModel())
