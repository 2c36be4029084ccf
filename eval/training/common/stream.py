"""An endless, seeded stream of training batches, made by a worker process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

AnyBatch = TypeVar("AnyBatch")

TEST_SEED = 20_000_000
"""Seeds from here on belong to the test set; training seeds stay far below."""


class BatchStream(IterableDataset[AnyBatch]):
    """What `make` draws as batches `start`, `start + 1`, ... of a seed; batch n is the same however the stream is cut."""

    def __init__(self, make: Callable[[np.random.Generator], AnyBatch], seed: int, start: int = 0) -> None:
        if seed >= TEST_SEED:
            raise ValueError(f"training seed {seed} is not below {TEST_SEED}")
        self.make, self.seed, self.start = make, seed, start

    def __iter__(self) -> Iterator[AnyBatch]:
        info = torch.utils.data.get_worker_info()
        number, step = (info.id, info.num_workers) if info else (0, 1)
        for index in range(self.start + number, 2**31, step):
            yield self.make(np.random.default_rng([self.seed, index]))


def stream_from(make: Callable[[np.random.Generator], AnyBatch], seed: int, start: int = 0) -> Iterator[AnyBatch]:
    """Iterate over a `BatchStream` in a worker process."""
    return iter(DataLoader(BatchStream(make, seed, start), batch_size=None, num_workers=1, prefetch_factor=4))
