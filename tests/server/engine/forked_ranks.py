"""Ranks that start in a moment and leave each other the processor, for tests with many of them on two cores.

vLLM spawns a process a rank, which imports all anew. Here they are forked from one process that has imported it, has
one thread, and computes nothing. Between steps a rank waits to be told of the next one, where vLLM's looks for it all
the time for a second. This module is imported there, too.
"""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from unittest import mock

import torch
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

import ultrafuser.server.engine.worker.cpu_worker  # noqa: F401  for the ranks

torch.set_num_threads(1)
SpinCondition.__init__.__defaults__ = (0.0,)  # in the place of `busy_loop_s`, a second
shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = 20  # in the place of 5 s: now and then a word that wakes a rank is lost


@contextmanager
def forked_ranks() -> Iterator[None]:
    """vLLM's workers that are started within are forked."""
    with mock.patch("vllm.v1.executor.multiproc_executor.get_mp_context", _context):
        yield


def _context() -> BaseContext:
    multiprocessing.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")
