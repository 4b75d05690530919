"""What the fused engine gains: against the same model in plain Transformers, and against client-mixed plain servers.

Run: python -m benchmarks.peers [--quick]
"""

from benchmarks.command import Options, run_benchmark
from benchmarks.measure import Comparison
from benchmarks.peers_servers import compare_with_servers
from benchmarks.peers_transformers import compare_with_transformers
from benchmarks.result import Question

QUESTION = Question(
    name="peers",
    text="How much quicker is the fused engine than what people do without it?",
    fused="fused engine",
    baseline="peer",
    ratio="times quicker",
    method=(
        "The Transformers loop (batched, cached, n models in lockstep, the quicker of its two kinds of cache) and the "
        "engine share one process and take turns: at equal lengths step by step, at unequal lengths with as many "
        "requests at a time, static batches against continuous batching. The client-mixed servers (full-vocabulary log "
        "probabilities, one HTTP request per specialist and token, fixed weights) and the fused server run one after "
        "the other."
    ),
)


def measure(options: Options) -> list[Comparison]:
    """The servers first: later an engine in this process would hold memory beside them."""
    servers = compare_with_servers(options)
    return [*compare_with_transformers(options), *servers]


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
