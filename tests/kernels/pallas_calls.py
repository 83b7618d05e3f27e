"""What a traced program asks of Pallas."""

from collections.abc import Iterator
from typing import Any

import jax


def _equations(jaxpr) -> Iterator[Any]:
    """All that is not a kernel's own, depth first."""
    for equation in jaxpr.eqns:
        yield equation
        if "cost_estimate" not in equation.params:  # as kernels have
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def costs(function, *args) -> list[Any]:
    """The cost estimate of every kernel that a function calls."""
    equations = _equations(jax.make_jaxpr(function)(*args).jaxpr)
    return [equation.params["cost_estimate"] for equation in equations if "cost_estimate" in equation.params]


def calls(function, *args) -> list[dict[str, Any]]:
    """Of every TPU kernel that a function calls: the parameters of the call, and its grid."""
    equations = _equations(jax.make_jaxpr(function)(*args).jaxpr)
    kernels = [equation.params for equation in equations if equation.primitive.name == "pallas_call"]
    return [params | {"grid": tuple(params["grid_mapping"].grid)} for params in kernels]
