"""Configs as JSON, as dotted overrides, and from files."""

import ast
import dataclasses
import difflib
import importlib.util
import json
import pathlib
import types
import typing
from typing import Any

from dsv3_jax.config.attention import LearnedGlobal, Sparse
from dsv3_jax.config.checks import ConfigError, check_types, describe, field_types, require, union_members
from dsv3_jax.config.model_validation import pattern_members, validate_pattern
from dsv3_jax.config.schema import Ablation, Config, PretrainedAblation
from dsv3_jax.config.validation import validate_domains

SCHEMA_VERSION = 1

# Fields that may change when a run is resumed: they do not alter the result up to a given step.
RESUMABLE_FIELDS = (
    "train.num_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "train.eval_rows",
    "mesh",
)


def to_dict(node: Any) -> Any:
    """Plain dicts, lists and scalars; a union member carries its `kind`."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        kind = getattr(node, "kind", None)
        tag = {"kind": kind} if kind else {}
        return tag | {f.name: to_dict(getattr(node, f.name)) for f in dataclasses.fields(node)}
    if isinstance(node, tuple):
        return [to_dict(child) for child in node]
    return node


def _from_dict(annotation: Any, value: Any, path: str) -> Any:
    members = union_members(annotation)
    if isinstance(value, dict):
        candidates = [m for m in members if dataclasses.is_dataclass(m)]
        if "kind" in value:
            candidates = [m for m in candidates if getattr(m, "kind", None) == value["kind"]]
        require(len(candidates) == 1, path, value.get("kind"), f"must be one of {describe(annotation)}")
        cls: Any = candidates[0]
        known, given = field_types(cls), {k: v for k, v in value.items() if k != "kind"}
        for name in given:
            require(name in known, f"{path}.{name}".lstrip("."), given[name], "is not a field of this version")
        return cls(**{k: _from_dict(known[k], v, f"{path}.{k}".lstrip(".")) for k, v in given.items()})
    if isinstance(value, list):
        element = typing.get_args(next(m for m in members if typing.get_origin(m) is tuple))[0]
        return tuple(_from_dict(element, v, f"{path}.{i}") for i, v in enumerate(value))
    return value


def to_json(config: Config) -> str:
    """The resolved config with its schema version, as indented JSON."""
    return json.dumps({"schema": SCHEMA_VERSION} | to_dict(config), indent=1) + "\n"


def from_json(text: str) -> Config:
    """Reads what `to_json` wrote. Raises `ConfigError` for another schema version or an unknown field."""
    tree = json.loads(text)
    version = tree.pop("schema", None)
    if version != SCHEMA_VERSION:
        raise ConfigError(f"config schema {version!r}: this code reads schema {SCHEMA_VERSION}; use a matching version")
    return _from_dict(Config, tree, "")


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> scalar, union members with their `kind` under `path.kind`."""
    tree = to_dict(node) if dataclasses.is_dataclass(node) else node
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, child in items for k, v in flatten(child, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (ours, theirs) for each field that differs and that a resumed run must not change."""
    a, b = flatten(ours), flatten(theirs)
    return {
        path: (a.get(path), b.get(path))
        for path in sorted(a.keys() | b.keys())
        if a.get(path) != b.get(path) and not any(path == f or path.startswith(f + ".") for f in RESUMABLE_FIELDS)
    }


def _parse_scalar(text: str, annotation: Any, path: str) -> Any:
    members = union_members(annotation)
    if text.lower() == "none" and types.NoneType in members:
        return None
    for member in members:
        if getattr(member, "kind", None) == text:
            return member()
        if member is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if member in (int, float):
            try:
                return member(text)
            except ValueError:
                continue
        if typing.get_origin(member) is tuple and not dataclasses.is_dataclass(typing.get_args(member)[0]):
            try:
                value = ast.literal_eval(text)
                return tuple(value) if isinstance(value, tuple | list) else (value,)
            except (ValueError, SyntaxError):
                continue
    if str in members:
        return text
    raise ConfigError(f"config.{path}={text}: must be of type {describe(annotation)}")


def apply_override(config: Config | PretrainedAblation, path: str, text: str) -> None:
    """Sets one dotted field from text, in place. A union member is chosen by its `kind`.

    `apply_override(config, "model.attention.pattern", "windowed")` then
    `apply_override(config, "model.attention.pattern.window", "128")`. Tuples are indexed by number.
    """
    node: Any = config
    *parents, last = path.split(".")
    for depth, name in enumerate(parents):
        node = _child(node, name, ".".join(parents[:depth]))
    parent = ".".join(parents)
    _child(node, last, parent)
    if isinstance(node, tuple):
        raise ConfigError(f"config.{path}={text}: a whole element cannot be set here; set one of its fields")
    setattr(node, last, _parse_scalar(text, field_types(type(node))[last], path))


def _child(node: Any, name: str, path: str) -> Any:
    where = f"config.{path}" if path else "config"
    if isinstance(node, tuple):
        if not name.isdigit() or int(name) >= len(node):
            raise ConfigError(f"{where} has {len(node)} elements, 0 to {len(node) - 1}; {name!r} was given")
        return node[int(name)]
    if not dataclasses.is_dataclass(node):
        raise ConfigError(f"{where} is {node!r}, which has no field {name!r}")
    names = [f.name for f in dataclasses.fields(node)]
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        kind = f" ({tag})" if (tag := getattr(node, "kind", "")) else ""
        raise ConfigError(f"{where}{kind} has no field {name!r}; {hint}fields: {', '.join(names) or 'none'}")
    return getattr(node, name)


def load_module(path: str) -> types.ModuleType:
    """Runs a Python file under `configs/` and returns its module. Raises `ConfigError` if there is none."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"--config={path}: no such file; expected a Python file that defines get_config()")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(path: str, overrides: typing.Iterable[tuple[str, str]] = ()) -> Config:
    """`get_config()` of a config file, or a run's `config.json`, with overrides applied in order, validated."""
    if path.endswith(".json"):
        file = pathlib.Path(path)
        if not file.is_file():
            raise ConfigError(f"{path}: no such file")
        config = from_json(file.read_text())
    else:
        module = load_module(path)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"--config={path}: defines no get_config()")
        config = module.get_config()
    for dotted, text in overrides:
        apply_override(config, dotted, text)
    return config.validate()


def _validate_pretrained(ablation: PretrainedAblation) -> None:
    check_types(ablation)
    names, contexts, tokens = list(ablation.rows), ablation.contexts, ablation.tokens
    require(ablation.baseline in names, "baseline", ablation.baseline, f"must be a row: {', '.join(names)}")
    others = [name for name in names if name != ablation.baseline]
    require(ablation.repeat in others, "repeat", ablation.repeat, f"must be another row: {', '.join(others)}")
    require(len(contexts) > 0, "contexts", contexts, "must hold at least one length")
    require(len(set(contexts)) == len(contexts), "contexts", contexts, "must name each length once")
    longest = max(contexts)
    fit = all(length >= 2 and longest % length == 0 for length in contexts)
    require(fit, "contexts", contexts, f"must each be at least 2 and divide the longest, {longest}")
    require(
        tokens >= 2 * longest and tokens % longest == 0,
        "tokens",
        tokens,
        f"must be a multiple of the longest context, {longest}, and at least twice that: margins need two texts",
    )
    for name, pattern in ablation.rows.items():
        validate_pattern(pattern, prefix=f"rows[{name!r}]")
        for member in pattern_members(pattern):
            free = not isinstance(member, LearnedGlobal | Sparse)
            require(free, f"rows[{name!r}]", member.kind, "has weights of its own, and nothing is trained here")
    validate_domains(ablation.domains, ablation.held_out_fraction, "")


def load_ablation(path: str, overrides: typing.Iterable[tuple[str, str]] = ()) -> Ablation | PretrainedAblation:
    """`get_ablation()` of a file, with overrides applied to every row, or to the table itself if it trains nothing.

    Rows that train are validated when they are run.
    """
    module = load_module(path)
    if not hasattr(module, "get_ablation"):
        raise ConfigError(f"{path}: defines no get_ablation()")
    ablation = module.get_ablation()
    if isinstance(ablation, PretrainedAblation):
        for dotted, text in overrides:
            apply_override(ablation, dotted, text)
        _validate_pretrained(ablation)
        return ablation
    if ablation.baseline not in ablation.rows:
        raise ConfigError(f"{path}: baseline {ablation.baseline!r} is not a row; rows: {', '.join(ablation.rows)}")
    for name in (*ablation.against, *ablation.against.values(), *ablation.own_length):
        if name not in ablation.rows:
            raise ConfigError(f"{path}: against or own_length names {name!r}, which is not a row")
    for config in ablation.rows.values():
        for dotted, text in overrides:
            apply_override(config, dotted, text)
    baseline = ablation.rows[ablation.baseline]
    for name, config in ablation.rows.items():
        same = config.data == baseline.data and config.train.batch_size == baseline.train.batch_size
        if not same or (name not in ablation.own_length and config.train.num_steps != baseline.train.num_steps):
            raise ConfigError(
                f"{path}: row {name!r} differs from {ablation.baseline!r} in data, batch_size or num_steps; "
                "every row must see the same tokens"
            )
    return ablation
