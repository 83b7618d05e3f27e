"""The table between published tensors and our parameter tree. Both directions, the shapes and the expected names of a
checkpoint are read off it."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dsv3_jax.config import GroupedQuery, Latent, ModelConfig, Sparse
from dsv3_jax.models.stack import layer_groups, prediction_group

ALL = slice(None)
BIASES = "selection_bias/"
BIAS = f"{BIASES}moe_layers/moe/bias"
EMBEDDING_PATH = "params/embedding"


class ExpertNames(NamedTuple):
    """How an architecture names its mixture of experts."""

    prefix: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Tensor(NamedTuple):
    """One published tensor and its place: the slice `index` of the leaf at `path`, of shape `shape`.

    A published matrix is [out, in]; `inputs` counts the leading axes of our shape that are its `in` (None: same layout
    on both sides). The last `rotated` features of our last axis are in halves where the published ones are neighbours
    (RoPE pairs feature i with i + R/2 here, 2i with 2i + 1 there). A `copy` repeats another tensor: it is written,
    compared when a checkpoint is opened, and not loaded.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()
    inputs: int | None = 1
    rotated: int = 0
    copy: bool = False

    @property
    def published_shape(self) -> tuple[int, ...]:
        """As a checkpoint has it."""
        if self.inputs is None:
            return self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def to_ours(self, published: np.ndarray) -> np.ndarray:
        """Published values in our layout: a view, but for rotated features."""
        ours = (published if self.inputs is None else published.T).reshape(self.shape)
        if not self.rotated:
            return ours
        even, odd = ours[..., -self.rotated :: 2], ours[..., 1 - self.rotated :: 2]
        return np.concatenate([ours[..., : -self.rotated], even, odd], axis=-1)

    def to_published(self, ours: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.rotated:
            halves, ours = ours[..., -self.rotated :], ours.copy()
            ours[..., -self.rotated :: 2], ours[..., 1 - self.rotated :: 2] = np.split(halves, 2, axis=-1)
        if self.inputs is None:
            return ours
        out, inputs = self.published_shape
        return ours.reshape(inputs, out).T


def _vector(name: str, path: str, *shape: int) -> Tensor:
    return Tensor(name, path, shape, inputs=None)


def _mlp(prefix: str, path: str, D: int, F: int, names: tuple[str, str, str]) -> Iterator[Tensor]:
    """Gate, up and down of a SwiGLU MLP."""
    gate, up, down = names
    yield Tensor(f"{prefix}.{gate}.weight", f"{path}/w_in", (D, F), (ALL, 0))
    yield Tensor(f"{prefix}.{up}.weight", f"{path}/w_in", (D, F), (ALL, 1))
    yield Tensor(f"{prefix}.{down}.weight", f"{path}/w_out", (F, D))


def _projection(config: ModelConfig, neighbours: bool) -> Iterator[Tensor]:
    D, prefix, path = config.dim, "self_attn", "attention/projection"
    match config.attention.projection:
        case GroupedQuery(num_heads=H, num_kv_heads=G, head_dim=N, qk_norm=qk_norm):
            yield Tensor(f"{prefix}.q_proj.weight", f"{path}/w_q", (D, H, N))
            yield Tensor(f"{prefix}.k_proj.weight", f"{path}/w_kv", (D, G, N), (ALL, 0))
            yield Tensor(f"{prefix}.v_proj.weight", f"{path}/w_kv", (D, G, N), (ALL, 1))
            if qk_norm:
                yield _vector(f"{prefix}.q_norm.weight", f"{path}/q_norm/scale", N)
                yield _vector(f"{prefix}.k_norm.weight", f"{path}/k_norm/scale", N)
            M = N
        case Latent(num_heads=H, query_latent_dim=Q, latent_dim=C, nope_head_dim=nope, rope_head_dim=R) as latent:
            M, rotated = latent.value_head_dim, R if neighbours else 0
            if Q is None:
                yield Tensor(f"{prefix}.q_proj.weight", f"{path}/w_q", (D, H, nope + R), rotated=rotated)
            else:
                yield Tensor(f"{prefix}.q_a_proj.weight", f"{path}/w_q_down", (D, Q))
                yield _vector(f"{prefix}.q_a_layernorm.weight", f"{path}/q_norm/scale", Q)
                yield Tensor(f"{prefix}.q_b_proj.weight", f"{path}/w_q_up", (Q, H, nope + R), rotated=rotated)
            yield Tensor(f"{prefix}.kv_a_proj_with_mqa.weight", f"{path}/w_kv_down", (D, C + R), rotated=rotated)
            yield _vector(f"{prefix}.kv_a_layernorm.weight", f"{path}/kv_norm/scale", C)
            yield Tensor(f"{prefix}.kv_b_proj.weight", f"{path}/w_kv_up", (C, H, nope + M))
    yield Tensor(f"{prefix}.o_proj.weight", "attention/w_out", (H, M, D), inputs=2)


def _indexer(config: ModelConfig) -> Iterator[Tensor]:
    """DeepSeek-V3.2's indexer. Its rotated features are in halves on both sides."""
    match config.attention.pattern, config.attention.projection:
        case Sparse(index_heads=heads, index_dim=width), Latent(query_latent_dim=int(Q)):
            prefix, path = "self_attn.indexer", "attention/indexer"
            yield Tensor(f"{prefix}.wq_b.weight", f"{path}/w_q", (Q, heads, width))
            yield Tensor(f"{prefix}.wk.weight", f"{path}/w_k", (config.dim, width))
            yield _vector(f"{prefix}.k_norm.weight", f"{path}/k_norm/scale", width)
            yield _vector(f"{prefix}.k_norm.bias", f"{path}/k_norm/bias", width)
            yield Tensor(f"{prefix}.weights_proj.weight", f"{path}/w_head", (config.dim, heads))


def _experts(config: ModelConfig, names: ExpertNames, has_bias: bool) -> Iterator[Tensor]:
    moe, D, prefix, matrices = config.moe, config.dim, names.prefix, (names.gate, names.up, names.down)
    assert moe is not None
    yield Tensor(f"{prefix}.gate.weight", "moe/w_router", (D, moe.num_experts))
    if has_bias:
        yield _vector(f"{prefix}.gate.e_score_correction_bias", "moe/bias", moe.num_experts)
    for expert in range(moe.num_experts):
        for tensor in _mlp(f"{prefix}.experts.{expert}", "moe", D, moe.expert_dim, matrices):
            yield tensor._replace(index=(expert, *tensor.index))
    if moe.num_shared_experts:
        width = moe.expert_dim * moe.num_shared_experts
        yield from _mlp(f"{prefix}.shared_experts", "moe/shared", D, width, matrices)


def _block(config: ModelConfig, experts: ExpertNames | None, has_bias: bool, neighbours: bool) -> Iterator[Tensor]:
    """One layer; `experts=None` is a dense one."""
    yield _vector("input_layernorm.weight", "attention_norm/scale", config.dim)
    yield from _projection(config, neighbours)
    yield from _indexer(config)
    yield _vector("post_attention_layernorm.weight", "mlp_norm/scale", config.dim)
    if experts is None:
        yield from _mlp("mlp", "mlp", config.dim, config.dense_dim, ExpertNames()[1:])
    else:
        yield from _experts(config, experts, has_bias)


def _stack(tensors: Iterable[Tensor], layer: int, group: str, index: int) -> Iterator[Tensor]:
    """The tensors of a layer, as the `index`-th of a stacked group. The selection bias has a collection of its own."""
    for tensor in tensors:
        collection = "selection_bias" if tensor.path == "moe/bias" else "params"
        name = f"model.layers.{layer}.{tensor.name}"
        yield tensor._replace(name=name, path=f"{collection}/{group}/{tensor.path}", index=(index, *tensor.index))


def _head(config: ModelConfig, name: str) -> Tensor:
    D, V = config.dim, config.vocab_size
    if config.tie_embeddings:
        return Tensor(name, EMBEDDING_PATH, (V, D), inputs=None)
    return Tensor(name, "params/head", (D, V))


def _prediction(config: ModelConfig, layer: int, index: int) -> Iterator[Tensor]:
    """What a multi-token-prediction module has beside its block. The embedding and the head are the main model's."""
    D, V, prefix = config.dim, config.vocab_size, f"model.layers.{layer}"
    own = [
        _vector("enorm.weight", "embedding_norm/scale", D),
        _vector("hnorm.weight", "hidden_norm/scale", D),
        Tensor("eh_proj.weight", "w_projection", (2 * D, D)),
        _vector("shared_head.norm.weight", "final_norm/scale", D),
    ]
    yield Tensor(f"{prefix}.embed_tokens.weight", EMBEDDING_PATH, (V, D), inputs=None, copy=True)
    yield from _stack(own, layer, "mtp", index)
    yield _head(config, f"{prefix}.shared_head.head.weight")._replace(copy=True)


def tensor_table(config: ModelConfig, experts: ExpertNames | None, has_bias: bool, neighbours: bool) -> list[Tensor]:
    """Every tensor of a published checkpoint of this model, multi-token-prediction modules as layers after the last.

    Args:
      experts: names of the mixture of experts, if the architecture has one.
      has_bias: whether selection biases are stored (`e_score_correction_bias`).
      neighbours: whether rotated features of latent attention are stored as neighbouring pairs.
    """
    D, V, modules = config.dim, config.vocab_size, prediction_group(config)
    table = [Tensor("model.embed_tokens.weight", EMBEDDING_PATH, (V, D), inputs=None)]
    for group in layer_groups(config):
        for index in range(group.count):
            block = _block(config, None if group.moe is None else experts, has_bias, neighbours)
            table += _stack(block, group.first + index, group.name, index)
    for index in range(0 if modules is None else modules.count):
        layer = config.num_layers + index
        table += _prediction(config, layer, index)
        table += _stack(_block(config, experts, has_bias, neighbours), layer, "mtp/block", index)
    table.append(_vector("model.norm.weight", "params/final_norm/scale", D))
    if not config.tie_embeddings:
        table.append(_head(config, "lm_head.weight"))
    return table


def leaf_shapes(table: list[Tensor]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each leaf that the table fills: an integer index counts up to the axis' length."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in table:
        sizes = iter(tensor.shape)
        index = tensor.index + (ALL,) * (len(tensor.shape) - tensor.index.count(ALL))
        shape = tuple(i + 1 if isinstance(i, int) else next(sizes) for i in index)
        known = shapes.get(tensor.path, shape)
        shapes[tensor.path] = tuple(map(max, known, shape))
    return shapes
