"""Generations of several threads at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def generated_at_once(model, prompts, options):
    """Return what `generate` gives for every prompt, each in a thread of its own, all begun together; their errors are raised."""
    barrier = threading.Barrier(len(prompts))

    def work(prompt):
        barrier.wait()
        with torch.no_grad():
            return model.generate(**prompt, **options)

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(work, prompts))
