"""Block hashes over the tokens of n specialists, so that a block is shared only if all of them have the same in it."""

from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.request import Request


def lag(num_canonical_prompt: int, num_shortest_prompt: int) -> int:
    """How many tokens behind the canonical length a block may be announced: L - min(l) + 1.

    Up to that many tokens before the end of the canonical sequence, every specialist has computed its own.
    """
    return num_canonical_prompt - num_shortest_prompt + 1


def fused_block_hasher(
    prompts: list[list[int]], num_canonical_prompt: int, block_size: int, hash_fn: Callable[[Any], bytes]
) -> Callable[[Request], list[BlockHash]]:
    """Hashes of a request's new full blocks, over all specialists' own tokens, chained.

    The hash of block j covers the own tokens [j*B, (j+1)*B) of every specialist, so a block is found again
    only by a request for which every specialist has the same tokens in it and before it.
    """
    request_lag = lag(num_canonical_prompt, min(len(prompt) for prompt in prompts))

    def new_hashes(request: Request) -> list[BlockHash]:
        hashes: list[BlockHash] = []
        parent = request.block_hashes[-1] if request.block_hashes else None
        start = len(request.block_hashes) * block_size
        while start + block_size <= request.num_tokens - request_lag:
            end = start + block_size
            extra_keys, _ = generate_block_hash_extra_keys(request, start, end, 0)
            tokens = [token for prompt in prompts for token in _own_tokens(prompt, request, start, end)]
            parent = hash_block_tokens(hash_fn, parent, tokens, extra_keys)
            hashes.append(parent)
            start = end
        return hashes

    return new_hashes


def _own_tokens(prompt: list[int], request: Request, start: int, end: int) -> list[int]:
    """One specialist's tokens [start, end): its own prompt, then the outputs."""
    if end <= len(prompt):
        return prompt[start:end]
    outputs = request.output_token_ids[max(start - len(prompt), 0) : end - len(prompt)]
    return [*prompt[start:], *outputs]
