"""Experts that join a model while it trains: whose copies they are, and how they come into use.

All of `moe.num_experts` are allocated from the start; those whose selection bias is −inf are inactive (`ops.routing`).
What happens at a step follows from the state and the step alone, so that a run resumes exactly. Experts are found in
the variables by their logical axis.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import axes
from dsv3_jax.config import AddedExpert, Expansion, Growth, MixtureOfExperts
from dsv3_jax.ops.routing import active_experts, update_selection_bias

BELOW = 1.5  # of a new bias under the lowest: scores lie between 0 and 1, so no token chooses the new expert
MOE_LAYERS = "moe_layers"  # where the layers that `AddedExpert.layer` counts are
ExpertAxes = dict[tuple[str, ...], int]


class Stage(NamedTuple):
    """step: the number of updates made before it. experts: the number from then on. parents: the expert that each is
    a copy of; itself, unless it is new."""

    step: int
    experts: int
    parents: tuple[int, ...]

    @property
    def parent_E(self) -> np.ndarray:
        """`parents` as an array."""
        return np.asarray(self.parents)

    @property
    def new_E(self) -> np.ndarray:
        """Which experts come with it, bool."""
        return self.parent_E != np.arange(len(self.parents))


def stages(growth: Growth | None, moe: MixtureOfExperts | None) -> list[Stage]:
    """The stages of a run, in order. Each group of the router grows alike: its expert j is a copy of j − active."""
    if growth is None or moe is None:
        return []
    E, groups = moe.num_experts, moe.router.num_groups
    expert_E = np.arange(E)
    match growth:
        case AddedExpert(parent=parent):
            return [Stage(0, E, (*range(E - 1), parent))]
        case Expansion(initial_experts=first, steps=steps):
            place_E, planned = expert_E % (E // groups), []
            for index, step in enumerate(steps):
                active = first * 2**index // groups  # of a group, before this stage
                new_E = (place_E >= active) & (place_E < 2 * active)
                parent_E = np.where(new_E, expert_E - active, expert_E)
                planned.append(Stage(step, 2 * active * groups, tuple(parent_E.tolist())))
            return planned


def first_experts(growth: Growth | None, moe: MixtureOfExperts) -> np.ndarray:
    """The experts that are active before the first stage, bool: as many of each group, the first ones."""
    E, groups = moe.num_experts, moe.router.num_groups
    match growth:
        case None:
            count = E
        case AddedExpert():
            count = E - 1
        case Expansion(initial_experts=count):
            pass
    return np.arange(E) % (E // groups) < count // groups


def find_expert_axes(boxed: Any) -> ExpertAxes:
    """Path below its collection -> the axis that counts experts, of variables that have one: those of a boxed tree."""
    leaves = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=lambda x: hasattr(x, "names"))[0]
    return {
        tuple(key.key for key in path[1:]): axis
        for path, x in leaves
        for axis, name in enumerate(x.names)
        if name in (axes.EXPERTS, axes.ROUTED)
    }


def _axis_of(expert_axes: ExpertAxes, path: tuple[Any, ...]) -> int | None:
    """Of a parameter, or of a moment: the path of one ends in the path of the other."""
    names = tuple(getattr(key, "key", "") for key in path)
    return next((expert_axes[names[i:]] for i in range(len(names)) if names[i:] in expert_axes), None)


def _map_biases(function: Any, selection_bias: Any) -> Any:
    """Maps (path, bias_LE) over the biases; what else loads move stays."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: function(path, x) if path[-1].key == "bias" else x, selection_bias
    )


def first_biases(growth: Growth | None, moe: MixtureOfExperts | None, selection_bias: Any) -> Any:
    """Selection biases of which those that come later are inactive."""
    if growth is None or moe is None:
        return selection_bias
    active_E = first_experts(growth, moe)
    return _map_biases(lambda _, bias_LE: jnp.where(active_E, bias_LE, -jnp.inf), selection_bias)


def is_done(stage: Stage, selection_bias: Any) -> bool:
    """Whether the new experts of a stage are active in some layer."""
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(selection_bias))[0]
    return any(np.any(x[..., stage.new_E] > -np.inf) for path, x in leaves if path[-1].key == "bias")


def grow(state: Any, growth: Growth, expert_axes: ExpertAxes, stage: Stage) -> Any:
    """The `TrainState` with the new experts of a stage: copies of their parents, with the moments of the optimizer.

    Their selection biases are so low that no token chooses them: the model computes what it did, and the language-model
    loss has the gradients it had. They are active all the same: to the balance loss, whose value copies of all experts
    leave as it was, they give a gradient at once. `AddedExpert` gives one in its layer only, so that the copies in
    other layers stay inactive.
    """
    (new_N,) = np.nonzero(stage.new_E)

    def copy(path, x):
        axis = _axis_of(expert_axes, path)
        if axis is None:
            return x
        # New experts alone are read and written: to take all of them would gather the state on every device.
        return x.at[(slice(None),) * axis + (new_N,)].set(jnp.take(x, stage.parent_E[new_N], axis=axis))

    def start(path, bias_LE):
        opens_LE = stage.new_E & ~active_experts(bias_LE)
        if isinstance(growth, AddedExpert):
            opens_LE &= (jnp.arange(len(bias_LE)) == growth.layer)[:, None] & (path[0].key == MOE_LAYERS)
        lowest_L1 = jnp.min(bias_LE, axis=-1, keepdims=True, where=active_experts(bias_LE), initial=jnp.inf)
        return jnp.where(opens_LE, lowest_L1 - BELOW, bias_LE)

    return dataclasses.replace(
        state,
        params=jax.tree_util.tree_map_with_path(copy, state.params),
        opt_state=jax.tree_util.tree_map_with_path(copy, state.opt_state),
        selection_bias=_map_biases(start, state.selection_bias),
    )


def update_bias(
    growth: Growth | None, moe: MixtureOfExperts, bias_LE: jax.Array, load_LE: jax.Array, step: jax.Array
) -> jax.Array:
    """The selection biases of a group of layers after the step that follows `step` updates.

    Over `ramp_steps` steps the gap between the bias of a new expert and that of its parent closes linearly. Until then
    loads move the others only, and they alone are balanced among themselves. With `AddedExpert` loads move no bias.
    """
    rate = 0.0 if isinstance(growth, AddedExpert) else moe.router.bias_update_rate
    if growth is None:
        return update_selection_bias(bias_LE, load_LE, rate)
    planned = stages(growth, moe)
    steps_S = jnp.asarray([stage.step for stage in planned])
    last = jnp.sum(steps_S <= step) - 1
    parent_E = jnp.asarray(np.stack([stage.parent_E for stage in planned]))[last]
    left = steps_S[last] + growth.ramp_steps - step  # steps, this one included
    rising_E = (parent_E != jnp.arange(moe.num_experts)) & (last >= 0) & (left > 0)
    rising_LE = rising_E & active_experts(bias_LE)
    settled_LE = update_selection_bias(jnp.where(rising_LE, -jnp.inf, bias_LE), jnp.where(rising_LE, 0, load_LE), rate)
    gap_LE = jnp.where(rising_LE, bias_LE - jnp.take(bias_LE, parent_E, axis=-1), 0)
    risen_LE = jnp.take(settled_LE, parent_E, axis=-1) + gap_LE * (1 - 1 / jnp.maximum(left, 1))
    return jnp.where(rising_LE, risen_LE, settled_LE)


def keep_added(updates: Any, growth: AddedExpert, expert_axes: ExpertAxes) -> Any:
    """Zeros for everything but the new expert in its layer: its weights, and its column of the router."""

    def leaf(path, x):
        axis = _axis_of(expert_axes, path)
        if axis is None or path[0].key != MOE_LAYERS:
            return jnp.zeros_like(x)
        own = (growth.layer, *[slice(None)] * (axis - 1), -1)
        return jnp.zeros_like(x).at[own].set(x[own])

    return jax.tree_util.tree_map_with_path(leaf, updates)
