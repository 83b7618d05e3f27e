"""Compiles one line of `long_context` for a TPU, prints one JSON object a length: bytes and FLOPs, or why none.

python -m experiments.suites.long_context_programs '["layer", "full", "none", [8192]]'

A process of its own: the compiler reads its environment once.
"""

import hashlib
import importlib.metadata
import json
import math
import re
import sys
from typing import Any

from dsv3_jax.planning.topologies import on_one_device, prepare_tpu_compiler, tpu_topology
from dsv3_jax.runtime import cache_folder
from experiments.suites.long_context import KIND, Line, make_config

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(line: Line) -> None:
    """Compiles each length that is not in the cache."""
    prepare_tpu_compiler(KIND)
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_traceback_in_locations_limit", 0)  # kernels would name files and lines, and so would the key
    jax.default_backend = lambda: "tpu"  # or kernels would be interpreted
    folder = cache_folder() / "long_context"
    folder.mkdir(parents=True, exist_ok=True)
    for length in line.lengths:
        arguments, outputs, lowered = (_lower_layer if line.scope == "layer" else _lower_model)(line, length)
        text = f"{KIND} {importlib.metadata.version('libtpu')} {lowered.as_text()}"
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        if not path.exists():
            path.write_text(json.dumps(_compile(lowered, _bytes(arguments), _bytes(outputs))))
        print(json.dumps({"length": length} | json.loads(path.read_text())), flush=True)


def _compile(lowered: Any, arguments: int, outputs: int) -> dict[str, Any]:
    """Of one device. Where the program is too large, what it would need beside its arguments and outputs."""
    import jax

    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        needed = re.search(r"temporaries \(([\d.]+)([KMGT])\)", message)
        if needed is None:
            return {"error": message}
        temporaries = round(float(needed[1]) * UNITS[needed[2]])
        return {"error": message, "arguments": arguments, "temporaries": temporaries, "outputs": outputs}
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "flops": compiled.cost_analysis().get("flops"),
    }


def _bytes(tree: Any) -> int:
    """Of one device's part of shapes with shardings."""
    import jax

    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _lower_layer(line: Line, length: int) -> tuple[Any, Any, Any]:
    """Gradients of half the sum of squares of a block's output, by its parameters and its input, on one chip."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from dsv3_jax.layers.block import Block
    from dsv3_jax.layers.inputs import make_packing
    from dsv3_jax.models.stack import layer_pattern
    from dsv3_jax.ops.patterns import Place, task_windows

    config = make_config(line, length)
    model, block = config.model, Block(config.model, None, layer_pattern(config.model, 0), parent=None)
    windows = task_windows(model.attention.pattern, [domain.name for domain in config.data.domains])

    def packing(length: int, domain_BT: Any):
        window_BT = None if windows is None else jnp.asarray(windows)[domain_BT]
        place = Place(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32), window_BT)
        return make_packing(model, place, config.data.max_segments)

    def init(key):
        return block.init(key, jnp.zeros((1, 2, model.dim), model.compute_dtype), packing(2, jnp.zeros((1, 2), int)))

    def loss(variables, x_BTD, domain_BT):
        y_BTD, _ = block.apply(variables, x_BTD, packing(length, domain_BT))
        return 0.5 * jnp.sum(jnp.square(y_BTD.astype(jnp.float32)))

    sharding = on_one_device(tpu_topology(KIND))
    shapes = (
        nn.unbox(jax.eval_shape(init, jax.random.key(0))),
        jax.ShapeDtypeStruct((1, length, model.dim), model.compute_dtype),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    return arguments, arguments[:2], jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments)


def _lower_model(line: Line, length: int) -> tuple[Any, Any, Any]:
    """Gradients of the mean loss of a row by all parameters."""
    import jax
    from flax import linen as nn

    from dsv3_jax.models.transformer import Transformer, summed_loss
    from dsv3_jax.sharding import batch_sharding, make_mesh, shardings
    from dsv3_jax.training.step import batch_shapes

    config = make_config(line, length)
    mesh = make_mesh(config.mesh, tpu_topology(KIND).devices)
    tokens = jax.ShapeDtypeStruct((1, 2), "int32")
    boxed = jax.eval_shape(Transformer(config.model).init, jax.random.key(0), tokens)

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    variables = jax.tree.map(place, nn.unbox(boxed), shardings(mesh, boxed))
    batch = {name: place(x, batch_sharding(mesh)) for name, x in batch_shapes(config).items()}

    def loss(variables, batch):
        return summed_loss(config, variables, batch)[0] / length

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=shardings(mesh, boxed))
        return (variables, batch), variables, step.lower(variables, batch)


if __name__ == "__main__":
    scope, contender, remat, lengths = json.loads(sys.argv[1])
    main(Line(scope, contender, remat, tuple(lengths)))
