"""What the processes of a world say to each other, with threads in their place."""

import threading
from collections.abc import Callable

import pytest
import torch

from fractaltrain import distributed as module
from fractaltrain.distributed import World


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], threading.Semaphore]:
    """Lets threads be the processes of a world of so many; the semaphore counts the rounds in which one was at work."""

    def start(size: int) -> threading.Semaphore:
        said: dict[int, int] = {}
        meeting = threading.Barrier(size, timeout=30)
        rounds = threading.Semaphore(0)

        def largest(self: World, value: int) -> int:
            said[self.rank] = value
            meeting.wait()
            found = max(said.values())
            if meeting.wait() == 0 and found:
                rounds.release()
            return found

        monkeypatch.setattr(World, "max", largest)
        monkeypatch.setattr(module, "_AT_WORK_SECONDS", 0.0)
        return rounds

    return start


def test_all_wait_as_long_as_a_process_of_any_machine_is_at_work(talking):
    """Two machines of two processes; the first process of the second machine takes longest."""
    rounds = talking(4)
    done: list[int] = []
    slow_may_end = threading.Event()

    def take_part(rank: int) -> None:
        world = World(rank=rank, size=4, local_size=2, device=torch.device("cpu"), local_rank=rank % 2)
        with world.local_main_first():
            if rank == 2:
                slow_may_end.wait(30)
            done.append(rank)

    threads = [threading.Thread(target=take_part, args=(rank,), daemon=True) for rank in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert rounds.acquire(timeout=30)
    assert done in ([], [0])
    slow_may_end.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert done[:2] == [0, 2]
    assert sorted(done) == [0, 1, 2, 3]
