"""What the official client's types say of a request: which fields may be null, and a small value of each type."""

from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin

from typing_extensions import get_type_hints, is_typeddict

Path = tuple[str | int, ...]


def fields_of(model: Any) -> Mapping[str, Any]:
    """Fields of one of the client's typed dictionaries, with their types."""
    hints: dict[str, Any] = get_type_hints(model, include_extras=True)
    return hints


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type that it is; without the marks of required fields."""
    if get_origin(annotation) in (Required, NotRequired):
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in kinds_of(member))
    return (annotation,)


def item_of(kind: Any) -> Any:
    """What a kind of list has in it; None if it is no list."""
    name = getattr(get_origin(kind), "__name__", "")
    return get_args(kind)[0] if name in ("list", "Iterable", "SequenceNotStr") else None


def example(annotation: Any) -> Any:
    """A small value of this type; of a dictionary only what is required."""
    kind = next(kind for kind in kinds_of(annotation) if kind is not NoneType)
    if is_typeddict(kind):
        return {name: example(kind_) for name, kind_ in fields_of(kind).items() if get_origin(kind_) is Required}
    if (item := item_of(kind)) is not None:
        return [example(item)]
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    return {str: "text", int: 1, float: 1.0, bool: True}.get(kind, {})


def nullable_places(model: Any) -> Iterator[tuple[dict[str, Any], Path]]:
    """Every place at which the client may write null: fields around it as they must be, and the way to it."""
    for name, annotation in fields_of(model).items():
        if NoneType in kinds_of(annotation):
            yield example(model), (name,)
        for value, path in _within(annotation):
            yield {**example(model), name: value}, (name, *path)


def _within(annotation: Any) -> Iterable[tuple[Any, Path]]:
    for kind in kinds_of(annotation):
        if is_typeddict(kind):
            yield from nullable_places(kind)
        elif (item := item_of(kind)) is not None:
            yield from (([value], (0, *path)) for value, path in _within(item))
