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
        part: positions of every epoch's order that this machine trains on; None: all.
    """

    names: Sequence[str]
    lengths: Sequence[int]
    seed: int
    window: int
    repeats: int
    want: Callable[[Sequence[str]], None]
    part: range | None = None
    _told: tuple[int, int] = field(default=(-1, -1), init=False)
    _ends: tuple[int, list[int]] = field(default=(-1, []), init=False)

    def reached(self, epoch: int, position: int) -> None:
        """Training has come to a position of an epoch's order; cheap where it is in the same window as before."""
        if self._ends[0] != epoch:
            self._ends = (epoch, self._window_ends(epoch))
        ends, (first, end) = self._ends[1], self._samples()
        windows = bisect_right(ends, end - 1) + 1  # up to the last one that is needed
        sample = position // self.repeats
        number = bisect_right(ends, sample) if sample < end else windows
        if self._told != (epoch, number):
            self._told = (epoch, number)
            following = self._windows(epoch + 1)[bisect_right(self._window_ends(epoch + 1), first)]
            upcoming = [*self._windows(epoch)[number:windows], following][:2]
            self.want([self.names[shard] for shards in upcoming for shard in shards])

    def _samples(self) -> tuple[int, int]:
        """The first sample of the order that is needed, and the end of the last."""
        all_of_them = sum(self.lengths) // self.repeats
        if self.part is None:
            return 0, all_of_them
        return min(self.part.start // self.repeats, all_of_them - 1), min(
            -(-self.part.stop // self.repeats), all_of_them
        )

    def _window_ends(self, epoch: int) -> list[int]:
        return list(accumulate(sum(self.lengths[shard] for shard in shards) for shards in self._windows(epoch)))

    def _windows(self, epoch: int) -> list[list[int]]:
        return [shards.tolist() for shards in shard_windows(len(self.lengths), self.seed, epoch, self.window)]
