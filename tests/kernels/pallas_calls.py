"""What a traced program asks of Pallas."""

from typing import Any

import jax


def calls(function, *args) -> list[dict[str, Any]]:
    """Of every kernel that a function calls: the parameters of the call, and its grid."""
    found = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append(equation.params | {"grid": tuple(equation.params["grid_mapping"].grid)})
                continue
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    look(inner)

    look(jax.make_jaxpr(function)(*args).jaxpr)
    return found
