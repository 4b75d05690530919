"""vLLM's groups of ranks where there are several models: what one model must not see.

vLLM makes them on all ranks as the leader's configuration says: were each rank to go by its own specialist's, some
would wait for groups that others do not make.
"""

from vllm.distributed import get_tp_group, parallel_state


def make_own_ranks_the_world() -> None:
    """From now on the world is one specialist's ranks to whoever asks vLLM for it: FlashInfer's tuning and loaders that
    share the reading of weights exchange across the world, and would mix different models."""
    parallel_state._WORLD = get_tp_group()
