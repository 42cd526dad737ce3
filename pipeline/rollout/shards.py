"""One shard: adopt it if it is there, else compute and publish it. The same in this process and in an actor."""

import contextlib
import threading
import time

from kac.util.errors import DistillKacError, one_line
from kac.util.log import log
from kac.util.options import Options
from pipeline.config.specs import RolloutSpec
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


class Outcome(Options):
    """What became of a planned shard."""

    receipt: Receipt
    computed_rows: int
    compute_seconds: float  # that the teacher took
    finished: float  # when it was there, seconds since the epoch
    peak_memory: int | None  # of the process that made it, as of then


class ShardMaker:
    """Makes the shards of a store; of two threads, one computes while the other reads or publishes."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        self.spec, self.identity = spec, identity
        self.teacher = FrozenTeacher(spec, identity)
        self.computing = threading.Lock()

    def make(self, shard: Shard) -> Outcome:
        """Bring the shard into the store, unless it is there and whole.

        Raises:
            RolloutError: it cannot be; the message names it.
        """
        try:
            receipt, computed, seconds = self._adopt_or_compute(shard)
        except NotFiniteShard as error:
            advice = "check the teacher's weights, the solver steps and `dtype`"
            raise RolloutError(f"{error}: nothing of the shard was published; {advice}") from error
        except DistillKacError as error:
            raise RolloutError(str(error)) from error
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise RolloutError(f"{self.spec.store}/{shard.name}: {reason}") from error
        return Outcome(
            receipt=receipt,
            computed_rows=computed,
            compute_seconds=seconds,
            finished=time.time(),
            peak_memory=peak_memory(),
        )

    def _adopt_or_compute(self, shard: Shard) -> tuple[Receipt, int, float]:
        """The receipt, how many rows were computed, and the seconds that took.

        Nothing is published of a shard with NaN or infinity.
        """
        there, is_damaged = None, False
        try:
            receipt, there = adopt(self.spec.store, shard, self.identity)
            if receipt.rows >= shard.rows:
                return receipt, 0, 0.0
        except FileNotFoundError:
            pass  # the usual case: the shard has yet to be made
        except DamagedShard as damage:
            log.info(f"rollout: {damage}: redoing it")
            is_damaged = True
        with contextlib.ExitStack() as at_work:
            at_work.enter_context(self.computing)
            started = time.perf_counter()
            missing = shard.ids if there is None else range(shard.start + there.num_rows, shard.ids.stop)
            rows = self.teacher.follow(shard.guidance, missing)
            seconds = time.perf_counter() - started
            # A GPU goes on with the other thread's shard while this one is encoded. Without, two threads that both need
            # the same core, and Python's own lock, would only get in each other's way.
            if self.teacher.on_gpu:
                at_work.close()
            if there is not None:
                rows = join([{name: column_array(there[name]) for name in rows}, rows])
            table = make_table(self.identity, shard, rows)
            check_rows(f"{self.spec.store}/{shard.name}", shard, self.identity, table)
            data = encode(table, self.spec.compression)
        receipt = publish(self.spec.store, shard, self.identity, data, replace=is_damaged or there is not None)
        return receipt, len(missing), seconds
