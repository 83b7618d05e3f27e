"""The device mesh and the rules from logical axes to mesh axes. Strict: a typo or a collision raises.

Linen would turn an unknown logical axis silently into "replicated"; here it is an error, and so is a spec that would
use one mesh axis for two dimensions of the same array.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax import axes
from dsv3_jax.config import ConfigError, MeshConfig

# Logical axis -> mesh axes. The batch is split over data, fsdp and expert alike (every device of an expert group works
# on other tokens until the experts are reached); parameters are split over fsdp along the model width (ZeRO-3) and over
# `model` along heads, feed-forward units and vocabulary (tensor parallelism); experts live on the expert axis.
RULES: dict[str, tuple[str, ...]] = {
    axes.BATCH: ("data", "fsdp", "expert"),
    axes.LENGTH: (),
    axes.EMBED: (),
    axes.FSDP_EMBED: ("fsdp",),
    axes.HEADS: ("model",),
    axes.KV_HEADS: ("model",),
    axes.HEAD_DIM: (),
    axes.LATENT: (),
    axes.MLP: ("model",),
    axes.EXPERTS: ("expert",),
    axes.ROUTED: (),
    axes.EXPERT_MLP: ("model",),
    axes.VOCAB: ("model",),
    axes.LAYERS: (),
    axes.NORM: (),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes of `MeshConfig`, sizes of one included. Raises `ConfigError` if devices are missing."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis.name: getattr(config, axis.name) for axis in dataclasses.fields(config)}
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise ConfigError(
            f"config.mesh={sizes}: needs {needed} devices, {len(devices)} are visible; lower an axis, or on CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    grid = np.asarray(devices[:needed]).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def partition_spec(logical: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes for the logical axes of one array; None is a dimension that is never split.

    Raises:
      ValueError: an axis that is not in `axes.LOGICAL_AXES`, or two dimensions that ask for one mesh axis.
    """
    spec, owner = [], {}
    for name in logical:
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r} in {tuple(logical)}; known: {', '.join(sorted(RULES))}")
        mesh_axes = () if name is None else RULES[name]
        for mesh_axis in mesh_axes:
            if mesh_axis in owner:
                raise ValueError(
                    f"logical axes {owner[mesh_axis]!r} and {name!r} of {tuple(logical)} both map to mesh axis "
                    f"{mesh_axis!r}; an array can use it once"
                )
            owner[mesh_axis] = name
        spec.append(mesh_axes or None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, logical: Sequence[str | None]) -> jax.Array:
    """Asks for the sharding of an activation under the ambient mesh (`jax.set_mesh`); without one, returns `x`."""
    if len(logical) != x.ndim:
        raise ValueError(f"{tuple(logical)} names {len(logical)} axes, the array has shape {x.shape}")
    spec = partition_spec(logical)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def num_shards(name: str) -> int:
    """Into how many parts the ambient mesh splits a logical axis; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES[name])


def repeat_key_heads(num_heads: int, x_BTGN: jax.Array) -> jax.Array:
    """Keys or values with their heads repeated so often that the ambient mesh can split them together with `num_heads`
    query heads, each device having the keys of its queries; as they are where it cannot."""
    G = x_BTGN.shape[2]
    split = math.lcm(G, num_shards(axes.KV_HEADS))
    return x_BTGN if num_heads % split else jnp.repeat(x_BTGN, split // G, axis=2)


def per_shard(function: Callable[..., Any], inputs: Sequence[tuple[Any, Sequence[str | None]]], outputs: Any) -> Any:
    """function(*arrays) on each device's own part of them, under the ambient mesh: for kernels, which XLA cannot split.

    Args:
      inputs: (array or None, its logical axes). A logical axis is split where it divides the shards in every input,
        else each device works on all of it.
      outputs: a tree of tuples of logical axes, one for each result.
    """
    mesh, arrays = jax.sharding.get_abstract_mesh(), [x for x, _ in inputs]
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    sizes: dict[str, list[int]] = {}
    for x, logical in inputs:
        for name, size in zip(logical, () if x is None else x.shape, strict=x is not None):
            if name is not None:
                sizes.setdefault(name, []).append(size)
    splits = {name: num_shards(name) for name in sizes}
    whole = {name for name, of in sizes.items() if any(size % splits[name] for size in of)}
    # Axes that share mesh axes, as the heads of queries and of keys do, are split together or not at all.
    whole = {name for name in sizes if any(set(RULES[name]) & set(RULES[other]) for other in whole)}

    def spec(logical: Sequence[str | None]) -> PartitionSpec:
        return partition_spec([None if name in whole else name for name in logical])

    in_specs = tuple(spec(logical) for _, logical in inputs)
    out_specs = jax.tree.map(
        spec, outputs, is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(n, str | None) for n in x)
    )
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """A tree of `NamedSharding` for a tree of boxed variables (as `model.init` returns them, arrays or shapes).

    Raises:
      ValueError: a leaf without logical axes, or with axes that do not fit its shape or the mesh.
    """

    def leaf(path, x):
        if not isinstance(x, nn.LogicallyPartitioned):
            raise ValueError(f"variable {jax.tree_util.keystr(path)} has no logical axes")
        shape, spec = x.value.shape, partition_spec(x.names)
        if len(shape) != len(x.names):
            raise ValueError(f"variable {jax.tree_util.keystr(path)} of shape {shape} names axes {x.names}")
        for size, name in zip(shape, x.names, strict=True):
            mesh_axes = RULES[name] if name else ()
            shards = math.prod(mesh.shape[a] for a in mesh_axes)
            if size % shards:
                raise ConfigError(
                    f"config.mesh: axis {name!r} of {jax.tree_util.keystr(path)} has size {size}, which {shards} "
                    f"shards over {mesh_axes} do not divide; change the mesh or the model's width"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh, logical: Sequence[str | None] = (axes.BATCH, axes.LENGTH)) -> NamedSharding:
    """The sharding of an input array of tokens."""
    return NamedSharding(mesh, partition_spec(logical))
