"""The head of a GGUF file: settings and the sizes of tensors, read in a tenth of a second.

The library's reader makes an array of every token, which takes seconds. Format: github.com/ggml-org/ggml,
docs/gguf.md. Knows no weights.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def read_head(path: Path) -> tuple[dict[str, Any], int]:
    """Settings by name, without those that are arrays, and the number of all tensors' elements.

    Raises:
        ValueError: it is no GGUF file, or is cut off.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file; install its package again")
        try:
            _, num_tensors, num_settings = _unpack(file, "IQQ")
            settings = {}
            for _ in range(num_settings):
                name = _text(file)
                (kind,) = _unpack(file, "I")
                settings[name] = _value(file, kind)
            elements = sum(_tensor(file) for _ in range(num_tensors))
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: its head cannot be read ({error!r}); install its package again") from error
    return {name: value for name, value in settings.items() if value is not None}, elements


def _value(file: BinaryIO, kind: int) -> Any:
    """A value; None for an array, which is passed over."""
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        return _unpack(file, _NUMBERS[kind])[0]
    of, count = _unpack(file, "IQ")
    if of in _NUMBERS:
        file.seek(count * struct.calcsize(f"<{_NUMBERS[of]}"), 1)
    else:
        for _ in range(count):
            _value(file, of)
    return None


def _tensor(file: BinaryIO) -> int:
    """The number of a tensor's elements."""
    _text(file)
    (num_dimensions,) = _unpack(file, "I")
    shape = _unpack(file, f"{num_dimensions}Q")
    _unpack(file, "IQ")  # its type, and where it is
    return math.prod(shape)


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return file.read(length).decode()


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))
