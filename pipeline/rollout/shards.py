"""One shard: adopt it if it is there, else compute and publish it. The same in this process and in an actor."""

import threading
import time
from typing import NamedTuple

from kac.errors import DistillKacError, one_line
from pipeline.config import RolloutSpec
from pipeline.rollout.teacher import FrozenTeacher, RolloutError, check_finite, join
from pipeline.store.layout import INTERVAL, KINETIC_ENERGY, LABEL, Shard, StoreIdentity
from pipeline.store.shards import DamagedShard, Receipt, adopt, column_array, encode, make_table, publish


class Outcome(NamedTuple):
    """What became of a planned shard."""

    receipt: Receipt
    computed_rows: int
    finished: float  # when it was there, seconds since the epoch


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
            return self._adopt_or_compute(shard)
        except DistillKacError as error:
            raise RolloutError(str(error)) from error
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise RolloutError(f"{self.spec.store}/{shard.name}: {reason}") from error

    def _adopt_or_compute(self, shard: Shard) -> Outcome:
        there, is_damaged = None, False
        try:
            receipt, there = adopt(self.spec.store, shard, self.identity)
            if receipt.rows >= shard.rows:
                return Outcome(receipt, 0, time.time())
        except FileNotFoundError:
            pass  # the usual case: the shard has yet to be made
        except DamagedShard as damage:
            print(f"rollout: {damage}: redoing it", flush=True)
            is_damaged = True
        # Encoded under the lock as well: two threads that both need Python's own lock only get in each other's way.
        with self.computing:
            missing = shard.ids if there is None else range(shard.start + there.num_rows, shard.ids.stop)
            rows = self.teacher.follow(shard.guidance, missing)
            if there is not None:
                rows = join([{name: column_array(there[name]) for name in rows}, rows])
            check_finite(self.spec.store, shard, rows)
            knots = [rows[name] for name in self.identity.knot_columns]
            table = make_table(self.identity, shard, rows[LABEL], rows[KINETIC_ENERGY], knots, rows.get(INTERVAL))
            data = encode(table, self.spec.compression)
        receipt = publish(self.spec.store, shard, self.identity, data, replace=is_damaged or there is not None)
        return Outcome(receipt, len(missing), time.time())
