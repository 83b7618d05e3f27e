"""A source of weights as a larger model: with more experts, or with experts where it has dense MLPs."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import AddedExpert, CapacityDispatch, Config, ConfigError, FeedForward, ModelConfig, WeightedSum
from dsv3_jax.config.checks import require
from dsv3_jax.interop.huggingface import flat, nested
from dsv3_jax.interop.tensors import BIAS
from dsv3_jax.training.growth import ExpertAxes, first_experts
from dsv3_jax.training.sources import Abstract, Source

ROUTER_PARTS = ("w_router", "w_condition", "condition_embedding", "selection_bias")
DENSE, MOE, MTP = "params/dense_layers/", "params/moe_layers/", "params/mtp/"


class Part(NamedTuple):
    """A leaf of the larger model. path: of the source's leaf that `make` makes it of. shape: its own. expert_axis: of
    its axes the one that counts experts, if any; the source's leaf has fewer there, or lacks the axis."""

    path: str
    shape: tuple[int, ...]
    make: Callable[[jax.Array], jax.Array]
    expert_axis: int | None = None


def fit_experts(source: Source, config: Config, expert_axes: ExpertAxes, wanted: Abstract) -> Source:
    """The source as it is, or as the model that a run of `config` can start from.

    `train.growth` begins with fewer experts than the model has room for: they are the source's. A source without
    experts is upcycled (Komatsuzaki et al. 2023, arXiv:2212.05055): every expert of a layer is that layer's MLP, the
    routers start fresh, and the model computes what the source does.

    Args:
      expert_axes: see `growth`. wanted: path -> shape, dtype and sharding of the variables of `config`.

    Raises:
      ConfigError: the source has another number of experts than the run begins with, or inactive ones that would be
        copied; or a mixture of experts like the run's could not compute what the source's MLPs do.
    """
    growth, model = config.train.growth, config.model
    theirs, ours = source.model.moe, model.moe
    if ours is None or model.num_dense_layers == model.num_layers:
        return source
    if theirs is None and not isinstance(growth, AddedExpert):
        return _upcycled(source, model)
    if growth is None:
        return source
    begins = int(first_experts(growth, ours).sum())
    if theirs is None or theirs.num_experts != begins:
        given = "no experts" if theirs is None else f"{theirs.num_experts} experts"
        raise ConfigError(
            f"--init_from={source.name}: has {given}; config.train.growth={growth.kind} with"
            f" model.moe.num_experts={ours.num_experts} begins with {begins}: start from a model with that many"
        )
    missing = sorted(path for path in wanted if path not in source.leaves)
    if isinstance(growth, AddedExpert) and missing:
        raise ConfigError(
            f"--init_from={source.name}: has no {missing[0]}, and config.train.growth=added_expert would not train it"
        )
    _check_parents(source, config, wanted)
    return _widened(source, config, expert_axes)


def _check_parents(source: Source, config: Config, wanted: Abstract) -> None:
    """Raises `ConfigError` if an expert that is to be copied is inactive in the source."""
    growth = config.train.growth
    biases = [path for path in source.leaves.keys() & wanted.keys() if path.startswith("selection_bias/")]
    read = {
        path: jax.ShapeDtypeStruct(source.leaves[path].shape, jnp.float32, sharding=wanted[path].sharding)
        for path in biases
    }
    for path, bias_LE in flat(source.load(read)).items():
        copied = np.asarray(bias_LE)
        if isinstance(growth, AddedExpert):
            copied = copied[growth.layer, growth.parent] if path == BIAS else np.zeros(1)
        if not np.all(np.isfinite(copied)):
            raise ConfigError(
                f"--init_from={source.name}: {path} holds experts that are inactive (-inf), of which"
                f" config.train.growth={growth} would make copies; "
                + ("choose another parent" if isinstance(growth, AddedExpert) else "train that run to its last stage")
            )


def _widened(source: Source, config: Config, expert_axes: ExpertAxes) -> Source:
    """With room for all experts of `config`; the new ones are inactive, and some copy of the old ones."""
    moe, growth = config.model.moe, config.train.growth
    assert moe is not None and growth is not None and source.model.moe is not None
    E, old_E = moe.num_experts, first_experts(growth, moe)
    groups = moe.router.num_groups
    place_E, group_E = np.arange(E) % (E // groups), np.arange(E) // (E // groups)
    size = source.model.moe.num_experts // groups
    index_E = group_E * size + place_E % size

    def part(path: str, leaf: jax.ShapeDtypeStruct) -> Part:
        axis = expert_axes.get(tuple(path.split("/")[1:]))
        if axis is None:
            return Part(path, leaf.shape, lambda x: x)
        shape = (*leaf.shape[:axis], E, *leaf.shape[axis + 1 :])
        if path.startswith("selection_bias/"):
            return Part(path, shape, lambda x: jnp.where(old_E, jnp.take(x, index_E, axis=axis), -jnp.inf), axis)
        return Part(path, shape, lambda x: jnp.take(x, index_E, axis=axis), axis)

    model = dataclasses.replace(source.model, moe=dataclasses.replace(source.model.moe, num_experts=E))
    return _made_of(source, model, {path: part(path, leaf) for path, leaf in source.leaves.items()})


def _upcycled(source: Source, model: ModelConfig) -> Source:
    """With copies of each layer's MLP as its experts, from layer `num_dense_layers` on.

    Its multi-token-prediction modules are left out: a run's modules have experts too, and start fresh.
    """
    moe, why = model.moe, f"to start from --init_from={source.name}, of whose MLPs every expert is a copy"
    assert moe is not None
    for name, given, expected in (
        ("model.moe.expert_dim", moe.expert_dim, source.model.dense_dim),
        ("model.moe.num_shared_experts", moe.num_shared_experts, 0),
        ("model.moe.router.normalize_weights", moe.router.normalize_weights, True),
        ("model.moe.router.route_scale", moe.router.route_scale, 1),
        ("model.moe.expert.kind", moe.expert.kind, FeedForward.kind),
        ("model.moe.expert.widths", getattr(moe.expert, "widths", ()), ()),
        ("model.moe.combination.kind", moe.combination.kind, WeightedSum.kind),
        ("model.unit_gate", model.unit_gate, None),
    ):
        require(given == expected, name, given, f"must be {expected!r} {why}")
    dropping = isinstance(moe.dispatch, CapacityDispatch)
    require(not dropping, "model.moe.dispatch.kind", moe.dispatch.kind, f"drops tokens; must be grouped or dense {why}")
    dense, E = model.num_dense_layers, moe.num_experts

    def layers(path: str, leaf: jax.ShapeDtypeStruct) -> dict[str, Part]:
        """The part of a leaf that stays dense, and the one that becomes a layer with experts."""
        inner, (count, *rest) = path.removeprefix(DENSE), leaf.shape
        parts = {path: Part(path, (dense, *rest), lambda x: x[:dense])} if dense else {}
        if not inner.startswith("mlp/"):
            return parts | {MOE + inner: Part(path, (count - dense, *rest), lambda x: x[dense:])}
        shape = (count - dense, E, *rest)
        experts = Part(path, shape, lambda x: jnp.broadcast_to(x[dense:, None], shape), 1)
        return parts | {f"{MOE}moe/{inner.removeprefix('mlp/')}": experts}

    parts: dict[str, Part] = {}
    for path, leaf in source.leaves.items():
        if not path.startswith(MTP):
            parts |= layers(path, leaf) if path.startswith(DENSE) else {path: Part(path, leaf.shape, lambda x: x)}
    larger = dataclasses.replace(source.model, moe=moe, num_dense_layers=dense, mtp=None)
    made = _made_of(source, larger, parts)
    left_out = () if source.model.mtp is None else ("its multi-token-prediction layers are left out",)
    note = f"upcycled: from layer {dense} on, {E} experts are copies of each layer's MLP, {moe.router.top_k} a token"
    return made._replace(notes=(*source.notes, *left_out, note), fresh=(*source.fresh, *ROUTER_PARTS))


def _made_of(source: Source, model: ModelConfig, parts: dict[str, Part]) -> Source:
    leaves = {path: jax.ShapeDtypeStruct(p.shape, source.leaves[p.path].dtype) for path, p in parts.items()}

    def load(wanted: Abstract) -> Any:
        read: Abstract = {}
        for path, x in wanted.items():
            part = parts[path]
            shape = source.leaves[part.path].shape
            read[part.path] = jax.ShapeDtypeStruct(shape, x.dtype, sharding=_sharding(x, part.expert_axis, len(shape)))

        def make(taken: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return {path: parts[path].make(taken[parts[path].path]) for path in wanted}

        taken = flat(source.load(read))
        return nested(jax.jit(make, out_shardings={path: x.sharding for path, x in wanted.items()})(taken))

    return source._replace(model=model, leaves=leaves, load=load)


def _sharding(wanted: jax.ShapeDtypeStruct, expert_axis: int | None, ndim: int) -> NamedSharding:
    """Of the source's leaf: that of the leaf that is made of it, with experts, if it has that axis, on every device."""
    assert isinstance(wanted.sharding, NamedSharding)
    spec = [*wanted.sharding.spec, *[None] * (len(wanted.shape) - len(wanted.sharding.spec))]
    if expert_axis is not None:
        spec[expert_axis : expert_axis + 1] = [None] * (ndim + 1 - len(spec))
    return NamedSharding(wanted.sharding.mesh, PartitionSpec(*spec))
