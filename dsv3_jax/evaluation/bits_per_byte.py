"""Held-out bits per byte, by domain: independent of the tokenizer, so that models with different ones compare."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.data.packing import PackedRows
from dsv3_jax.data.pipeline import Dataset, batches
from dsv3_jax.models.transformer import summed_loss
from dsv3_jax.sharding import batch_sharding


class HeldOut(NamedTuple):
    """loss: nats a token. bits_per_byte: Σ nats / ln 2 / Σ UTF-8 bytes of the predicted tokens. tokens, bytes: their
    numbers."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int


EvalStep = Callable[[Any, Any, dict[str, np.ndarray]], Any]


def make_eval_step(config: Config, mesh: Mesh) -> EvalStep:
    """(params, selection_bias, batch) -> summed loss in nats, compiled once."""

    def eval_step(params, selection_bias, batch):
        variables = {"params": params, "selection_bias": selection_bias}
        return summed_loss(config, variables, batch)[0]

    jitted = jax.jit(eval_step, in_shardings=(None, None, batch_sharding(mesh)))

    def run(params, selection_bias, batch):
        with jax.set_mesh(mesh):
            return jitted(params, selection_bias, batch)

    return run


def evaluate_rows(
    eval_step: EvalStep, variables: Any, rows: PackedRows, bytes_V: np.ndarray, batch_size: int, limit: int | None
) -> HeldOut:
    """Measures `limit` rows, spread evenly over `rows`, or all of them."""
    nats, tokens, size = 0.0, 0, 0
    for batch in batches(rows, batch_size, limit):
        counted = batch["segment_ids"] > 0
        nats += float(eval_step(variables["params"], variables.get("selection_bias", {}), batch))
        tokens += int(counted.sum())
        size += int(bytes_V[batch["targets"]][counted].sum())
    return HeldOut(nats / tokens, nats / math.log(2) / size, tokens, size)


def evaluate(
    config: Config, variables: Any, dataset: Dataset, mesh: Mesh, limit: int | None = None
) -> dict[str, HeldOut]:
    """Bits per byte on the held-out documents of each domain."""
    eval_step = make_eval_step(config, mesh)
    rows_a_batch = config.train.batch_size // config.train.microbatches
    return {
        name: evaluate_rows(eval_step, variables, rows, dataset.tokenizer.bytes_V, rows_a_batch, limit)
        for name, rows in dataset.held_out.items()
    }
