"""RoPE settings of config.json: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`."""

import math
from typing import Any

from dsv3_jax.config import Attention, ConfigError, LinearScaling, Llama3Scaling, RopeScaling, Yarn

LINEAR = {"factor": "factor"}
YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
LLAMA3 = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_factor",
    "high_freq_factor": "high_factor",
}
KINDS: dict[str, tuple[type, dict[str, str]]] = {
    "linear": (LinearScaling, LINEAR),
    "yarn": (Yarn, YARN),
    "llama3": (Llama3Scaling, LLAMA3),
}
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}


def _amplitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _yarn_scales(values: dict[str, Any], attention_factor: float | None, scales_softmax: bool) -> dict[str, Any]:
    """Our mscale and mscale_all_dim from theirs.

    transformers scales rotations by `attention_factor`; without it by m(mscale) / m(mscale_all_dim) if both are given
    and not zero, else by m(1). Latent attention scales its softmax by m(mscale_all_dim)² besides, others do not.
    """
    factor, mscale, all_dim = values["factor"], values["mscale"], values["mscale_all_dim"]
    if attention_factor is None:
        if scales_softmax and bool(mscale) != bool(all_dim) and mscale != 1:
            raise ConfigError(
                f"config.json: rope mscale={mscale}, mscale_all_dim={all_dim}: published implementations disagree on "
                "one without the other; give both"
            )
        if not (mscale and all_dim):
            return values | {"mscale": 1.0, "mscale_all_dim": 0.0}
        if scales_softmax:
            return values
        attention_factor = _amplitude(factor, mscale) / _amplitude(factor, all_dim)
    all_dim = all_dim if scales_softmax else 0.0
    excess = attention_factor * _amplitude(factor, all_dim) - 1
    if factor == 1 and excess:
        raise ConfigError(f"config.json: rope attention_factor={attention_factor} needs a factor above 1")
    mscale = round(excess / (0.1 * math.log(factor)), 12) if factor > 1 else 1.0
    return values | {"mscale": mscale, "mscale_all_dim": all_dim}


def read_rope(
    given: dict[str, Any], default_theta: float, scales_softmax: bool
) -> tuple[float, RopeScaling | None, dict[str, Any]]:
    """Takes the RoPE fields out of config.json: theta, scaling, and the fields that are left.

    Raises:
      ConfigError: a kind or a parameter of scaling that we cannot represent.
    """
    left = dict(given)
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(left.get(name) or {}, dict):
            raise ConfigError(f"config.json: {name}={left[name]!r}: must be an object or null")
    rope = dict(left.pop("rope_scaling", None) or {}) | dict(left.pop("rope_parameters", None) or {})
    rope.setdefault("partial_rotary_factor", left.pop("partial_rotary_factor", 1))
    outer_theta = left.pop("rope_theta", default_theta)
    theta = rope.pop("rope_theta", outer_theta)
    if "rope_theta" in given and theta != outer_theta:
        raise ConfigError(f"config.json: rope_theta={outer_theta} and {theta} in rope_parameters; give one")
    kinds = {str(rope.pop(name)) for name in ("rope_type", "type") if rope.get(name) is not None} or {"default"}
    kind = kinds.pop()
    original = left.pop("original_max_position_embeddings", left.get("max_position_embeddings"))
    rope = {name: value for name, value in rope.items() if value is not None}
    for name, harmless in (("partial_rotary_factor", 1), ("truncate", True)):
        if rope.pop(name, harmless) != harmless:
            raise ConfigError(f"config.json: rope {name} must be {harmless}; RoPE of part of a head is not supported")
    if kinds or (kind != "default" and kind not in KINDS):
        raise ConfigError(f"config.json: rope type {kind!r}: must be default, {', '.join(KINDS)}")
    outer = {"rope_theta": theta, "original_max_position_embeddings": original or 0}
    for name, value in (outer | rope).items():
        if not isinstance(value, int | float):
            raise ConfigError(f"config.json: rope parameter {name}={value!r}: must be a number")
    scaling = None
    if kind != "default":
        cls, names = KINDS[kind]
        attention_factor = rope.pop("attention_factor", None) if cls is Yarn else None
        optional = YARN_DEFAULTS if cls is Yarn else {}
        values: dict[str, Any] = dict(optional)
        for theirs, ours in names.items():
            if theirs in rope:
                values[ours] = float(rope.pop(theirs))
        if "original_length" in names.values():
            values.setdefault("original_length", original)
            values["original_length"] = int(values["original_length"] or 0)
        absent = set(names.values()) - values.keys()
        if absent or values["factor"] < 1 or values.get("original_length", 1) < 1:
            raise ConfigError(f"config.json: rope type {kind!r} needs {', '.join(names)}, and a factor of at least 1")
        if cls is Yarn:
            values = _yarn_scales(values, attention_factor, scales_softmax)
        scaling = cls(**values)
    if rope:
        name = min(rope)
        raise ConfigError(f"config.json: rope parameter {name}={rope[name]!r} is not supported with type {kind!r}")
    return float(theta), scaling, left


def write_rope(attention: Attention, scales_softmax: bool) -> dict[str, Any]:
    """The fields `rope_theta` and `rope_scaling`, which old and new readers understand."""
    scaling = attention.rope_scaling
    if scaling is None:
        return {"rope_theta": attention.rope_theta, "rope_scaling": None}
    names = KINDS[scaling.kind][1]
    values = {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
    if isinstance(scaling, Yarn) and not (scales_softmax and scaling.mscale and scaling.mscale_all_dim):
        # Readers differ on one of the two without the other: the scale of the rotations is said outright.
        mscale, all_dim = values.pop("mscale"), values.pop("mscale_all_dim")
        if (mscale, all_dim) != (1, 0):
            values["attention_factor"] = _amplitude(scaling.factor, mscale) / _amplitude(scaling.factor, all_dim)
        if all_dim:
            values["mscale_all_dim"] = all_dim
    return {"rope_theta": attention.rope_theta, "rope_scaling": {"rope_type": scaling.kind} | values}
