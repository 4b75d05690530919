"""YAML that users wrote: its value, or in a few words why it cannot be used. Knows no files.

Stricter than the YAML of Python's library: of a key that is given twice one value would be lost.
"""

from typing import Any

import yaml


class YamlError(ValueError):
    """A text is no usable YAML; the message says what is wrong, and in which line."""


def parse_yaml(content: bytes) -> Any:
    """The value of a YAML text in UTF-8.

    Raises:
        YamlError: what is wrong.
    """
    try:
        return yaml.load(content.decode(), _Loader)
    except YamlError:
        raise
    except RecursionError as error:
        raise YamlError("nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # also numbers and dates that Python cannot hold
        raise YamlError(" ".join(str(error).split())) from error


class _Loader(yaml.SafeLoader):
    """Looks at keys as they are written, before `<<` merges other mappings into theirs."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                raise YamlError(f"line {line}: {key.value!r:.60} is given twice, first in line {lines[key.value]}")
            lines[key.value] = line
        return node
