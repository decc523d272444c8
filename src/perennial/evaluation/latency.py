"""How long does it take to score one row?"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

WARM_UP = 10


@dataclass(frozen=True)
class Latency:
    """Time to score one row in this process, without any server around it."""

    requests: int
    p50_ms: float
    p95_ms: float


def measure(
    score: Callable[[Array], Array],
    matrix: Array,
    requests: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Score rows of ``matrix`` one by one, going round when they run out."""
    for place in range(WARM_UP):
        score(_row(matrix, place))
    took_ms = []
    for place in range(requests):
        begin = clock()
        score(_row(matrix, place))
        took_ms.append((clock() - begin) * 1000)
    p50, p95 = np.quantile(took_ms, [0.5, 0.95])
    return Latency(requests, float(p50), float(p95))


def _row(matrix: Array, place: int) -> Array:
    place %= len(matrix)
    return matrix[place : place + 1]
