"""Settings that several commands have: their types, and the words of their help. Knows no command."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
NotNegative = Annotated[int, Field(ge=0, le=2**31 - 1)]
Connections = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""As NumPy's generators take it."""
Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Precision = Literal["auto", "float32", "bfloat16"]

CacheFolder = Annotated[
    str | None,
    Field(description="Folder for prepared models, encoded data and hidden states; default: ~/.cache/ultrafuser."),
]


class CommandSettings(BaseModel):
    """What a command is asked for: a flag for each field, whose docstring is the flag's help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
