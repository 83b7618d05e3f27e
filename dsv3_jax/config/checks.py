"""What a value must be to fit its annotation."""

import dataclasses
import types
import typing
from typing import Any


class ConfigError(ValueError):
    """A config that cannot run. The message names the field, what was given and what to do."""


def require(condition: bool, name: str, given: Any, expected: str) -> None:
    """Raises `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(f"config.{name}={given!r}: {expected}")


def require_positive(owner: Any, prefix: str, *names: str, minimum: float = 1) -> None:
    """Raises `ConfigError` for the first field of `owner` below the minimum."""
    for name in names:
        value = getattr(owner, name)
        require(value >= minimum, f"{prefix}.{name}", value, f"must be at least {minimum}")


def require_one_of(owner: Any, prefix: str, name: str, choices: tuple[str, ...]) -> None:
    """Raises `ConfigError` for a field of `owner` that is none of the choices."""
    value = getattr(owner, name)
    require(value in choices, f"{prefix}.{name}", value, f"must be one of {', '.join(choices)}")


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def field_types(cls: type) -> dict[str, Any]:
    """Annotated type of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def describe(annotation: Any) -> str:
    """An annotation as an error says it; union members by their kind."""
    names = []
    for member in union_members(annotation):
        if member is types.NoneType:
            names.append("none")
        elif hasattr(member, "kind"):
            names.append(member.kind)
        else:
            names.append(getattr(member, "__name__", str(member)) if typing.get_origin(member) is None else str(member))
    return " | ".join(names)


def _matches(value: Any, annotation: Any) -> bool:
    if annotation is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(annotation) is tuple:
        element = typing.get_args(annotation)[0]
        return isinstance(value, tuple) and all(_matches(v, element) for v in value)
    if typing.get_origin(annotation) is dict:
        members = union_members(typing.get_args(annotation)[1])
        return isinstance(value, dict) and all(any(_matches(v, m) for m in members) for v in value.values())
    return isinstance(value, annotation)


def _children(value: Any, path: str) -> list[tuple[str, Any]]:
    """Elements of a tuple or dict with their paths, or the value itself."""
    match value:
        case tuple():
            return [(f"{path}.{index}", child) for index, child in enumerate(value)]
        case dict():
            return [(f"{path}[{name!r}]", child) for name, child in value.items()]
    return [(path, value)]


def check_types(node: Any, prefix: str = "") -> None:
    """Raises `ConfigError` for the first field, at any depth, whose value is not of its annotated type."""
    for name, annotation in field_types(type(node)).items():
        value, path = getattr(node, name), f"{prefix}{name}"
        members = union_members(annotation)
        require(
            any(_matches(value, member) for member in members), path, value, f"must be of type {describe(annotation)}"
        )
        for where, child in _children(value, path):
            if dataclasses.is_dataclass(child):
                check_types(child, f"{where}.")
