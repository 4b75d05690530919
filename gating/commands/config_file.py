"""A command's settings in a YAML file, by the names of their flags; what the command line says wins.

Knows YAML, and fields of models as `flags.py` does; no command. Imports no torch, so that `--help` answers at once.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ultrafuser.gating.commands.flags import Parser, Settings, build_parser, flag_of, kind_of, resolve, value_of
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.files import input_file, write_file
from ultrafuser.gating.yaml_text import YamlError, parse_yaml

_CONFIG = "config"


def parse_configured(
    model: type[Settings], argv: Sequence[str], cache: str | None = None, *, prog: str, **description: str
) -> Settings:
    """As `parse_command`, of a model whose field `config` names a file that may have said the rest.

    Raises:
        CommandError: an unknown flag or key, or a value that does not fit.
    """
    finder = Parser(prog=prog, add_help=False)
    finder.add_argument(flag_of(_CONFIG))
    path = getattr(finder.parse_known_args(argv)[0], _CONFIG, None)
    content = {} if path is None else read_config(path, model)
    parser = build_parser(model, prog=prog, **description, given=content)
    return resolve(model, {"cache": cache, **content, **vars(parser.parse_args(argv))})


def read_config(path: str, model: type[BaseModel]) -> dict[str, Any]:
    """A file's settings, by field, each of them a value that fits.

    Raises:
        CommandError: it cannot be read, or has an unknown key or a value of a wrong type; names file and key.
    """
    source = f"{flag_of(_CONFIG)}: {path}"
    fields = {_key(name): name for name in model.model_fields if name != _CONFIG}
    try:
        content = parse_yaml(input_file(path, "name a YAML file of settings").read_bytes())
    except YamlError as error:
        raise CommandError(f"{source}: not usable as YAML ({error})") from error
    if not isinstance(content, dict):
        raise CommandError(f"{source}: is no mapping; write one setting a line, as learning-rate: 0.001")
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            way_out = f"did you mean {near[0]}?" if near else "see --help for the flags, whose names are the keys"
            raise CommandError(f"{source}: {key!r:.60} is no setting; {way_out}")
    return {fields[key]: _read(f"{source}: {key}", model.model_fields[fields[key]], content[key]) for key in content}


def write_config(path: Path, content: Mapping[str, Any]) -> None:
    """Write settings, given by field as JSON values, as `read_config` reads them."""
    text = yaml.safe_dump({_key(name): value for name, value in content.items()}, sort_keys=False, allow_unicode=True)
    write_file(path, text.encode())


def _key(name: str) -> str:
    return flag_of(name).removeprefix("--")


def _read(source: str, field: FieldInfo, value: Any) -> Any:
    """A value of the very type; YAML takes 1e-3 for a text, which as a number's is read as on a command line."""
    is_number_text = isinstance(value, str) and kind_of(field) in (int, float)
    given = value_of(field, value) if is_number_text else tuple(value) if isinstance(value, list) else value
    if isinstance(value, bool) and kind_of(field) is not bool:  # Python takes it for 1 or 0
        raise CommandError(f"{source}: takes no {str(value).lower()}; change the value")
    kind: Any = Annotated[field.annotation, field]
    adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    try:
        return adapter.validate_python(given, strict=not is_number_text)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        reason = (
            str(cause).split(": ", 1)[-1] if isinstance(cause, CommandError) else first["msg"].replace("tuple", "list")
        )
        raise CommandError(f"{source}: {reason}, got {value!r:.80}; change the value") from error
