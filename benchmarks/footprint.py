"""What a running server holds: memory, files and threads of all its processes, and what its metrics say."""

import httpx
import psutil  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.measure import Frozen


class Footprint(Frozen):
    """One look at a server."""

    num_requests: int
    """How many requests it has had since the first look."""

    rss_bytes: int
    """Resident memory of all its processes."""

    num_fds: int
    """Their open files and sockets."""

    num_threads: int
    """Their threads."""

    kv_usage: float
    """Share of the KV blocks that requests hold, 0 to 1."""

    num_running: int
    """Requests in the engine's batch."""

    num_waiting: int
    """Requests that wait for the engine."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is left in it."""
        return self.num_running == self.num_waiting == 0 and self.kv_usage == 0


def look_at(pid: int, url: str, num_requests: int) -> Footprint:
    """Look at the server with this process id and address."""
    metrics = read_metrics(url)
    server = psutil.Process(pid)
    processes = [server, *server.children(recursive=True)]
    return Footprint(
        num_requests=num_requests,
        rss_bytes=sum(process.memory_info().rss for process in processes),
        num_fds=sum(process.num_fds() for process in processes),
        num_threads=sum(process.num_threads() for process in processes),
        kv_usage=metrics["vllm:kv_cache_usage_perc"],
        num_running=int(metrics["vllm:num_requests_running"]),
        num_waiting=int(metrics["vllm:num_requests_waiting"]),
    )


def read_metrics(url: str) -> dict[str, float]:
    """Every sample, summed over its labels."""
    sums: dict[str, float] = {}
    with httpx.Client(trust_env=False) as client:
        text = client.get(f"{url}/metrics").text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums
