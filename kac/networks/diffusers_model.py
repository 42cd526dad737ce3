"""Networks of kind ``diffusers``: a diffusion or flow model of diffusers, in its own architecture and prediction."""

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from kac.networks.schedule import EDM, FLOW, STUDENT_GAP, read_schedule
from kac.networks.velocity import (
    CONDITIONING,
    Condition,
    ConditionEmbedding,
    Conditioning,
    LabelChoice,
    NetworkModule,
    NetworkOptions,
)

MODELS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
TIME_EMBEDDINGS = ("time_embedding", "timestep_embedder")
"""Names of the modules that embed the time. Conditions are added to their output."""


class DiffusersModelConfig(NetworkOptions):
    """A model of diffusers with its scheduler. ``jobs.convert`` writes this config; it is not an option of a job."""

    kind: Literal["diffusers"] = Field("diffusers", description="diffusers: a converted diffusion or flow model")
    model: dict[str, Any] = Field(description="the model's config.json, with its _class_name")
    scheduler: dict[str, Any] = Field(description="the config of the scheduler that the model was trained with")
    labels: LabelChoice = Field(description="labels that the model accepts")
    student: bool = Field(False, description="call the model also outside of the times on which it was trained")

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        if model.get("_class_name") not in MODELS:
            raise ValueError(f"{model.get('_class_name')} is not supported. Supported models are {', '.join(MODELS)}.")
        return model

    @property
    def conditioning(self) -> Conditioning:
        """What the model can be conditioned on, according to ``labels``."""
        return CONDITIONING[self.labels]

    def describe(self) -> str:
        """Describe what the model predicts, the times on which it was trained, and its labels."""
        schedule = read_schedule(self.scheduler)
        labels = {"with_null": "classes and a null label", "without_null": "classes", "none": "no classes"}[self.labels]
        first, last = schedule.t_range
        return f"predicts {schedule.prediction}, trained for t from {first:.3g} to {last:.5g}, {labels}"

    def for_student(self, conditions: tuple[Condition, ...], bounded: bool) -> Self:
        """Return the config of a student of this network."""
        return super().for_student(conditions, bounded).model_copy(update={"student": True})


class DiffusersModel(NetworkModule):
    """A model of diffusers as a velocity network on the Gaussian path.

    Between the first and the last trained time, the velocity is exact (``kac.networks.schedule``). Below the first
    trained time, the model is called at that time. Above the last trained time, the velocity takes unit noise straight
    to the point from which diffusers' samplers start. A student's model is called there, at its last trained time.
    """

    log_ratio: Tensor
    timestep: Tensor

    def __init__(
        self, config: DiffusersModelConfig, sample_shape: tuple[int, ...], num_classes: int, model: Any = None
    ) -> None:
        import diffusers

        super().__init__()
        self.null_label, self.takes = num_classes if config.has_null_label else None, config.conditions
        self.has_labels, self.is_student = config.labels != "none", config.student
        self._condition: Tensor | None = None  # the conditions' embedding during a call
        self.diffusers_name = "transformer" if "Transformer" in config.model["_class_name"] else "unet"
        if model is None:
            model = getattr(diffusers, config.model["_class_name"]).from_config(config.model)
        self.add_module(self.diffusers_name, model)
        if config.conditions:
            embeddings = [module for name, module in model.named_modules() if name.endswith(TIME_EMBEDDINGS)]
            self.width = embeddings[0].linear_2.out_features
            self.conditions = ConditionEmbedding(config.conditions, self.width)
            for embedding in embeddings:
                embedding.register_forward_hook(self._add_conditions)
        for name, module in model.named_modules():
            if name.endswith("class_embedder"):
                module.dropout_prob = 0.0  # the labels of a batch are those of the teacher's trajectories
        with torch.device("cpu"):
            self.schedule = schedule = read_schedule(config.scheduler)
            self.t_range, self.slope = schedule.t_range, schedule.slope
        device = next(model.parameters()).device
        self.register_buffer("log_ratio", schedule.log_ratio.float().to(device), persistent=False)
        self.register_buffer("timestep", schedule.timestep.float().to(device), persistent=False)

    def feature_layers(self) -> Sequence[nn.Module]:
        """Return the blocks of the U-Net or of the transformer."""
        model: Any = self.get_submodule(str(self.diffusers_name))
        if self.diffusers_name == "transformer":
            return list(model.transformer_blocks)
        return [*model.down_blocks, model.mid_block, *model.up_blocks]

    def forward(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """Return the velocity at x [batch, channels, height, width], t (scalar or [batch]) and label [batch]."""
        schedule, (first, last) = self.schedule, self.t_range
        given_t = t.float().expand(x.shape[0])
        t_each = given_t.clamp(first, last)
        t_wide = t_each.reshape(-1, *[1] * (x.ndim - 1))
        alpha, sigma = schedule.levels(t_wide)
        z = (alpha + sigma) * x
        scale = (sigma**2 + schedule.sigma_data**2).rsqrt() if schedule.prediction == EDM else 1.0
        if self.takes:
            model: Any = self.get_submodule(str(self.diffusers_name))
            self._condition = self.conditions(x.new_zeros(1, self.width, dtype=model.dtype), conditions)
        output = self._call(z * scale, self._timesteps(t_each), label)[:, : x.shape[1]].float()
        self._condition = None  # free the graph
        u = output
        if schedule.prediction == "epsilon":
            u = (output - x) / (1 - t_wide).clamp(min=STUDENT_GAP if self.is_student else 0.0)
        elif schedule.prediction == "sample":
            u = (x - output) / t_wide
        elif schedule.prediction == "v_prediction":
            u = (sigma - alpha) * z + (alpha + sigma) * output
        elif schedule.prediction == EDM:
            skip, out = schedule.sigma_data**2 * scale**2, schedule.sign * sigma * schedule.sigma_data * scale
            u = (x - skip * z - out * output) / t_wide
        if self.is_student:
            return u
        t_wide = given_t.reshape(t_wide.shape)
        return torch.where(t_wide > last, self.slope * x / (1 - self.slope * (1 - t_wide)), u)

    def _timesteps(self, t: Tensor) -> Tensor:
        """Return the model's time input at the trained times ``t`` [batch]."""
        if self.schedule.prediction == FLOW:
            return t * self.timestep[-1]
        log_ratio = torch.logit(t)
        # The number of levels below. ONNX has no torch.searchsorted.
        right = (self.log_ratio < log_ratio[:, None]).sum(1).clamp(1, len(self.log_ratio) - 1)
        low, high = self.log_ratio[right - 1], self.log_ratio[right]
        return torch.lerp(self.timestep[right - 1], self.timestep[right], (log_ratio - low) / (high - low))

    def _call(self, z: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        model: Any = self.get_submodule(str(self.diffusers_name))
        labels = {"class_labels": label} if self.has_labels else {}
        text = {"encoder_hidden_states": None} if type(model).__name__ == "UNet2DConditionModel" else {}
        return model(z.to(model.dtype), timestep, **labels, **text).sample  # type: ignore[no-any-return]

    def _add_conditions(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self._condition is None else output + self._condition
