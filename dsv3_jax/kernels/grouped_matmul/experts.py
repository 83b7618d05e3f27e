"""Routed SwiGLU experts, and one grouped matmul, with gradients, over the products that a platform supplies.

Rows are gathered in their own dtype, sorted by expert. The combination weights are applied to the last product as it is
written, and each token adds up its rows in float32, so that nothing of the size of all rows is ever float32. What lies
between the two products of the backward pass is left to XLA, which makes one pass over the hidden units of it.
"""

import functools
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.grouped_matmul.quantized import Quantized, Weights
from dsv3_jax.ops.dispatch import sort_by_expert


class SwigluProduct(Protocol):
    """(x_ND, w_ED2F with the gates' columns first, sizes_E) -> (silu(x · gate) · (x · up), x · gate, x · up), [N, F].

    The last two are for the gradient: None without `save`.
    """

    def __call__(
        self, x_ND: jax.Array, w_ED2F: Weights, sizes_E: jax.Array, *, save: bool
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]: ...


class RowsProduct(Protocol):
    """(x_ND, w_EDF, or `transposed` w_EFD, sizes_E) -> [N, F], each row times its entry of `factor_N`, float32."""

    def __call__(
        self,
        x_ND: jax.Array,
        w_EDF: Weights,
        sizes_E: jax.Array,
        *,
        transposed: bool = False,
        factor_N: jax.Array | None = None,
    ) -> jax.Array: ...


class GroupsProduct(Protocol):
    """(x_ND, dy_NF, sizes_E) -> Σ xᵀ · dy over the rows of each group, [E, D, F]; zeros for an empty one."""

    def __call__(self, x_ND: jax.Array, dy_NF: jax.Array, sizes_E: jax.Array) -> jax.Array: ...


class Products(NamedTuple):
    """What a platform supplies. Rows are sorted by group; sums are float32, results in the dtype of x.

    Rows past the last group may hold anything, what is given and what is returned; they must change nothing else.
    """

    swiglu: SwigluProduct
    rows: RowsProduct
    groups: GroupsProduct


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(products: Products, x_ND: jax.Array, w_EDF: Weights, sizes_E: jax.Array) -> jax.Array:
    return products.rows(x_ND, w_EDF, sizes_E)


def _product_forward(products: Products, *operands: Any) -> tuple[jax.Array, Any]:
    return products.rows(*operands), operands


def _product_backward(products: Products, operands: Any, dy_NF: jax.Array) -> tuple[Any, Any, None]:
    x_ND, w_EDF, sizes_E = operands
    dw_EDF = None if isinstance(w_EDF, Quantized) else products.groups(x_ND, dy_NF, sizes_E).astype(w_EDF.dtype)
    return products.rows(dy_NF, w_EDF, sizes_E, transposed=True), dw_EDF, None


_product.defvjp(_product_forward, _product_backward)


def product(products: Products, x_ND: jax.Array, w_EDF: Weights, sizes_E: jax.Array) -> jax.Array:
    """See `api.pick_matmul`."""
    return cast(jax.Array, _product(products, x_ND, w_EDF, sizes_E))


def _merged(w_in_ED2F: Weights) -> Weights:
    """[E, D, 2F], gates first; of a scale [E, 1, 2F]."""
    return jax.tree.map(lambda w: w.reshape(*w.shape[:2], -1), w_in_ED2F)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="clip")


def _of_tokens(y_ND: jax.Array, place_PK: jax.Array, present_PK: jax.Array) -> jax.Array:
    """Each token's sum of its rows, in float32."""
    y_KPD = jnp.where(present_PK.T[..., None], _take(y_ND, place_PK.T), 0)
    return jnp.sum(y_KPD, axis=0, dtype=jnp.float32).astype(y_ND.dtype)


def _forward(products: Products, combine: bool, save: bool, x_PD, weights_PK, experts_PK, w_in_ED2F, w_out_EFD):
    E, (P, K) = jax.tree.leaves(w_in_ED2F)[0].shape[0], experts_PK.shape
    by_expert = sort_by_expert(experts_PK.reshape(-1), E)
    x_ND = _take(x_PD, by_expert.order_N // K)
    hidden_NF, *saved = products.swiglu(x_ND, _merged(w_in_ED2F), by_expert.sizes_E, save=save)
    factor_N = _take(weights_PK.reshape(-1), by_expert.order_N).astype(jnp.float32) if combine else None
    y_ND = products.rows(hidden_NF, w_out_EFD, by_expert.sizes_E, factor_N=factor_N)
    present_PK, place_PK = experts_PK < E, by_expert.place_N.reshape(P, K)
    if combine:
        y = _of_tokens(y_ND, place_PK, present_PK)
    else:
        y = jnp.where(present_PK[..., None], _take(y_ND, place_PK), 0)
    return y, (x_PD, weights_PK, w_in_ED2F, w_out_EFD, by_expert, present_PK, factor_N, saved)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(products: Products, combine: bool, *operands: Any) -> jax.Array:
    return _forward(products, combine, False, *operands)[0]


def _experts_forward(products: Products, combine: bool, *operands: Any) -> tuple[jax.Array, Any]:
    return _forward(products, combine, True, *operands)


def _experts_backward(products: Products, combine: bool, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    x_PD, weights_PK, w_in_ED2F, w_out_EFD, by_expert, present_PK, factor_N, gate_and_up = saved
    (P, K), D, sizes_E = weights_PK.shape, x_PD.shape[1], by_expert.sizes_E
    order_N, place_PK = by_expert.order_N, by_expert.place_N.reshape(P, K)
    dy_ND = _take(dy, order_N // K) if combine else _take(dy.reshape(-1, D), order_N)
    dhidden_NF = products.rows(dy_ND, w_out_EFD, sizes_E, transposed=True).astype(jnp.float32)
    gate_NF, up_NF = (x_NF.astype(jnp.float32) for x_NF in gate_and_up)
    hidden_NF, of_hidden = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate_NF, up_NF)
    dweights_PK = jnp.zeros_like(weights_PK)
    if combine:
        dweights_N = jnp.sum(hidden_NF * dhidden_NF, axis=-1)
        dweights_PK = jnp.where(present_PK, _take(dweights_N, place_PK), 0).astype(weights_PK.dtype)
        hidden_NF, dhidden_NF = hidden_NF * factor_N[:, None], dhidden_NF * factor_N[:, None]
    dgate_up_N2F = jnp.concatenate([d.astype(x_PD.dtype) for d in of_hidden(dhidden_NF)], axis=1)
    dx_ND = products.rows(dgate_up_N2F, _merged(w_in_ED2F), sizes_E, transposed=True)
    dw_in_ED2F = dw_out_EFD = None
    if not isinstance(w_in_ED2F, Quantized):
        dw_in_ED2F = products.groups(_take(x_PD, order_N // K), dgate_up_N2F, sizes_E)
        dw_in_ED2F = dw_in_ED2F.astype(w_in_ED2F.dtype).reshape(w_in_ED2F.shape)
    if not isinstance(w_out_EFD, Quantized):
        dw_out_EFD = products.groups(hidden_NF.astype(x_PD.dtype), dy_ND, sizes_E).astype(w_out_EFD.dtype)
    return _of_tokens(dx_ND, place_PK, present_PK), dweights_PK, None, dw_in_ED2F, dw_out_EFD


_experts.defvjp(_experts_forward, _experts_backward)


def routed_experts(
    products: Products,
    x_PD: jax.Array,
    weights_PK: jax.Array,
    experts_PK: jax.Array,
    w_in_ED2F: Weights,
    w_out_EFD: Weights,
    *,
    combine: bool = True,
) -> jax.Array:
    """See `api.grouped_experts`."""
    return cast(jax.Array, _experts(products, combine, x_PD, weights_PK, experts_PK, w_in_ED2F, w_out_EFD))
