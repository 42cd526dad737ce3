"""Make one shard: reuse it if it exists, otherwise compute and publish it. Runs in this process or in an actor."""

import contextlib
import threading
import time

from kac.util.errors import DistillKacError, one_line
from kac.util.log import log
from kac.util.options import Options
from pipeline.config import RolloutSpec
from pipeline.memory import peak_memory
from pipeline.rollout.teacher import FrozenTeacher, RolloutError, join
from pipeline.store.layout import Shard, StoreIdentity
from pipeline.store.shards import (
    DamagedShard,
    NotFiniteShard,
    Receipt,
    adopt,
    check_rows,
    column_array,
    encode,
    make_table,
    publish,
)


class ShardOutcome(Options):
    """The result of making a planned shard."""

    receipt: Receipt
    computed_rows: int  # 0 if the shard was reused
    compute_seconds: float  # in the teacher
    finished: float  # time, in seconds since the epoch
    peak_memory: int | None  # bytes, of the process that made the shard


class ShardMaker:
    """Makes the shards of a store. One thread computes while another reads or publishes."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        self.spec, self.identity = spec, identity
        self.teacher = FrozenTeacher(spec, identity)
        self.computing = threading.Lock()

    def make(self, shard: Shard) -> ShardOutcome:
        """Publish the shard, unless it exists and is intact.

        Raises:
            RolloutError: the shard failed. The message names it.
        """
        try:
            receipt, computed, seconds = self._adopt_or_compute(shard)
        except NotFiniteShard as error:
            advice = "Check the teacher's weights, `solver_steps` and `dtype`."
            raise RolloutError(f"{error} The shard was not published. {advice}") from error
        except DistillKacError as error:
            raise RolloutError(str(error)) from error
        except Exception as error:
            problem = f"{type(error).__name__}: {one_line(error)}"
            raise RolloutError(f"{self.spec.store}/{shard.name} failed with {problem}") from error
        return ShardOutcome(
            receipt=receipt,
            computed_rows=computed,
            compute_seconds=seconds,
            finished=time.time(),
            peak_memory=peak_memory(),
        )

    def _adopt_or_compute(self, shard: Shard) -> tuple[Receipt, int, float]:
        """Return the receipt, the number of computed rows, and the seconds of computing.

        A shard with NaN or infinity is not published.
        """
        existing, is_damaged = None, False
        try:
            receipt, existing = adopt(self.spec.store, shard, self.identity)
            if receipt.rows >= shard.rows:
                return receipt, 0, 0.0
        except FileNotFoundError:
            pass  # the usual case
        except DamagedShard as damage:
            log.info(f"rollout: {damage} Recomputing it.")
            is_damaged = True
        with contextlib.ExitStack() as computing:
            computing.enter_context(self.computing)
            started = time.perf_counter()
            missing = shard.ids if existing is None else range(shard.start + existing.num_rows, shard.ids.stop)
            rows = self.teacher.follow(shard.guidance, missing)
            seconds = time.perf_counter() - started
            # A GPU computes the shard of the other thread while this shard is encoded. On a CPU, the two threads would
            # compete for the same core and for Python's global lock.
            if self.teacher.on_gpu:
                computing.close()
            if existing is not None:
                rows = join([{name: column_array(existing[name]) for name in rows}, rows])
            table = make_table(self.identity, shard, rows)
            check_rows(f"{self.spec.store}/{shard.name}", shard, self.identity, table)
            data = encode(table, self.spec.compression)
        receipt = publish(self.spec.store, shard, self.identity, data, replace=is_damaged or existing is not None)
        return receipt, len(missing), seconds
