"""vLLM's multiprocess executor, which ends all ranks at once when one is gone.

Knows processes, not what they compute.
"""

from vllm.v1.executor.multiproc_executor import MultiprocExecutor


class EndingExecutor(MultiprocExecutor):
    """Callers have an error within seconds."""

    def shutdown(self) -> None:
        """As vLLM's; once a rank is gone the others are killed: they wait for it, on a GPU or another machine they heed
        nothing else, and vLLM would give them nine seconds before it tells anybody."""
        if self.is_failed:
            for worker in self.workers:
                worker.proc.kill()
        super().shutdown()
