"""Says which shards training needs next, whenever it comes to another window."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from fractaltrain.stream.order import shard_windows


@dataclass
class Ahead:
    """Follows a run through the windows of its epochs, see ``order``.

    Attributes:
        names: of the training shards.
        lengths: samples in each.
        seed: of the run.
        window: shards that are shuffled together.
        repeats: how often in a row each sample is taken, see ``order.repeated``.
        want: told the names of the shards of this window and then of the next one, in their order, once per window.
    """

    names: Sequence[str]
    lengths: Sequence[int]
    seed: int
    window: int
    repeats: int
    want: Callable[[Sequence[str]], None]
    _told: tuple[int, int] = field(default=(-1, -1), init=False)
    _ends: tuple[int, list[int]] = field(default=(-1, []), init=False)

    def reached(self, epoch: int, position: int) -> None:
        """Training has come to a position of an epoch's order; cheap where it is in the same window as before."""
        if self._ends[0] != epoch:
            sizes = (sum(self.lengths[shard] for shard in shards) for shards in self._windows(epoch))
            self._ends = (epoch, list(accumulate(sizes)))
        ends, taken = self._ends[1], sum(self.lengths) // self.repeats  # the first so many samples of the order
        windows = bisect_right(ends, taken - 1) + 1  # that hold them
        sample = position // self.repeats
        number = bisect_right(ends, sample) if sample < taken else windows
        if self._told != (epoch, number):
            self._told = (epoch, number)
            upcoming = [*self._windows(epoch)[:windows], *self._windows(epoch + 1)[:1]][number : number + 2]
            self.want([self.names[shard] for shards in upcoming for shard in shards])

    def _windows(self, epoch: int) -> list[list[int]]:
        return [shards.tolist() for shards in shard_windows(len(self.lengths), self.seed, epoch, self.window)]
