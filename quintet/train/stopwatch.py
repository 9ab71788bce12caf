"""How long calls take on this machine, and figures fitted to what was measured."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.spec.cluster import Calls
from quintet.train.device import synchronize

ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was measured: seconds, and what they went to."""

    seconds: float
    calls: float = 1.0
    flops: float = 0.0
    num_bytes: float = 0.0


def fit(samples: Sequence[Sample]) -> Calls:
    """The figures, none of them negative, with the least squares of relative errors."""
    weight = torch.tensor([1 / max(sample.seconds, 1e-9) for sample in samples], dtype=torch.float64)
    rows = torch.tensor([[s.calls, s.flops, s.num_bytes] for s in samples], dtype=torch.float64) * weight[:, None]
    best, chosen = float("inf"), torch.zeros(3, dtype=torch.float64)
    for used in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        columns = rows[:, list(used)]
        scale = columns.norm(dim=0)
        if (scale == 0).any():
            continue
        found = torch.linalg.lstsq(columns / scale, torch.ones(len(samples), 1, dtype=torch.float64)).solution[:, 0] / scale
        error = float((columns @ found - 1).square().sum())
        if (found >= 0).all() and error < best - 1e-9:
            best, chosen = error, torch.zeros(3, dtype=torch.float64).index_put((torch.tensor(used),), found)
    call, per_flop, per_byte = chosen.tolist()
    return Calls(call=call, per_flop=per_flop, per_byte=per_byte)


def seconds_of(work: Callable[[], object]) -> float:
    """Median seconds of a call, after one that does not count, in rounds of some milliseconds."""
    work()
    times, begin = 4, now()
    for _ in range(times):
        work()
    times = max(1, min(100, round(0.004 * times / max(now() - begin, 1e-9))))
    found = []
    for _ in range(ROUNDS):
        begin = now()
        for _ in range(times):
            work()
        found.append((now() - begin) / times)
    return statistics.median(found)


def both_ways(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> tuple[float, float]:
    """Median seconds of a forward and of its backward to the inputs."""
    held, there, back = tuple(inputs), list[float](), list[float]()
    for _ in range(3 * ROUNDS):
        begin = now()
        out = forward()
        middle = now()
        torch.autograd.grad(out, held, torch.ones_like(out), allow_unused=True)
        there.append(middle - begin)
        back.append(now() - middle)
    return statistics.median(there[1:]), statistics.median(back[1:])


def least(work: Callable[[], object], device: torch.device) -> float:
    """The least seconds of some rounds, after one that does not count."""
    work()
    best = float("inf")
    for _ in range(ROUNDS):
        synchronize(device)
        begin = now()
        work()
        synchronize(device)
        best = min(best, now() - begin)
    return best


def least_of_message(send: Callable[[], object]) -> float:
    """The least seconds of a message between ranks, which any other program may hold up."""
    found = []
    for _ in range(4 * ROUNDS):
        begin = time.perf_counter()
        send()
        found.append(time.perf_counter() - begin)
    return min(found)


def now() -> float:
    """Seconds of this thread on its core, where it computes alone, so that other programs disturb less; else of the clock."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
