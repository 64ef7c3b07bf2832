"""Who computes when, where roles without GPUs share the processors of a machine."""

import os

import torch

_LAST = 19  # niceness; Ray gives all its workers 15


def use_processors(threads: int) -> None:
    """So many threads for the products of this actor, which has what the engines that sample leave.

    A decoding step is hundreds of short parallel parts, and each waits for its slowest thread: one that had to give
    its core away, for a scorer's pass, holds up the others for as long. A pass loses nothing by being put off until the
    rollout is done, and nobody samples while learners update. Of this thread, and those that it starts from here on:
    heartbeats keep their rank.
    """
    torch.set_num_threads(threads)
    os.nice(_LAST - os.nice(0))  # an actor may be set up again
