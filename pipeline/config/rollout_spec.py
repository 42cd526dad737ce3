"""The options of rollout."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from kac.precision import Precision
from kac.solvers import KnotGrid, SolverName
from kac.util.fingerprint import unhashed
from kac.util.options import Options
from kac.util.path_options import input_path, output_path
from pipeline.config.spec import DRY_RUN, SEED, TIME_FACTOR, ActorOptions, Spec


class RolloutRecipe(Options):
    """The options that determine a rollout's rows, and how the rows are split into shards.

    Together with the teacher, these options identify a store.
    """

    source: Literal["trajectory", "forward"] = Field(
        "trajectory",
        description="trajectory: integrate the teacher from noise and store every knot; forward: add noise to an image "
        "up to the start of a random interval, and integrate the teacher to its end time (arXiv 2509.21513, Alg. 1)",
    )
    knots: PositiveInt = Field(20, description="intervals per trajectory; knot 0 is the noise, the last knot the image")
    knot_grid: KnotGrid = Field("uniform", description="spacing of the knots and solver steps from t = 1 to t = 0")
    solver: SolverName = Field("ab2", description="the teacher's solver")
    solver_steps: PositiveInt = Field(100, description="solver steps from noise to image, a multiple of `knots`")
    time_factor: float = TIME_FACTOR
    precision: Precision = Precision()
    seed: int = SEED
    shard_size: PositiveInt = Field(1024, description="trajectories per shard")
    dtype: Literal["float32", "float16"] = Field("float32", description="data type of the stored knots")

    @model_validator(mode="after")
    def _check_solver_steps(self) -> Self:
        if self.solver_steps % self.knots:
            raise ValueError(
                f"`solver_steps` {self.solver_steps} is not a multiple of `knots` {self.knots}. "
                f"Choose {self.solver_steps // self.knots * self.knots + self.knots}, for example."
            )
        return self


class RolloutSpec(ActorOptions, RolloutRecipe, Spec):
    """Store the frozen teacher's trajectories in an endpoint store (Ray Data)."""

    stage = "rollout"
    common = ("trajectories", "guidance", "knots", "solver", "solver_steps", "seed", "dry_run")
    teacher: str = input_path(..., "the teacher's model folder: path or s3:// URI")
    store: str = output_path(..., "store to write: path or s3:// URI")
    trajectories: PositiveInt = unhashed(12000, "trajectories per guidance scale; a rerun can add more")
    first_sample: NonNegativeInt = unhashed(
        0, "id of the first trajectory, a multiple of `shard_size`; set it to make stores that can be merged"
    )
    guidance: tuple[float, ...] = unhashed(
        (0.0,), "guidance scales w, such as 0 1 2 (0: no guidance); a rerun can add more", min_length=1
    )
    compression: Literal["none", "zstd", "lz4"] = unhashed(
        "lz4", "Parquet compression of the knots, after byte-stream splitting"
    )
    batch_size: PositiveInt = unhashed(512, "trajectories per network call")
    license: str = unhashed("", "license in the dataset card, such as cc-by-4.0", pattern="^[a-z0-9.+-]*$")
    dry_run: bool = DRY_RUN

    @field_validator("guidance")
    @classmethod
    def _remove_duplicates(cls, guidance: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(dict.fromkeys(float(w) + 0.0 for w in guidance))

    @model_validator(mode="after")
    def _check_first_sample(self) -> Self:
        if self.first_sample % self.shard_size:
            raise ValueError(
                f"`first_sample` {self.first_sample} is not a multiple of `shard_size` {self.shard_size}. Choose "
                f"{self.first_sample // self.shard_size * self.shard_size + self.shard_size}, for example."
            )
        return self
