"""GGUF checkpoints of the Llama architecture, as llama.cpp writes them."""

import pathlib
from typing import Any

import numpy as np

from dsv3_jax.config import (
    Attention,
    ConfigError,
    GroupedQuery,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    Yarn,
)
from dsv3_jax.data.gguf_file import GgufFile, open_gguf
from dsv3_jax.data.gguf_tokenizer import gguf_tokenizer

__all__ = ["gguf_tokenizer", "load_gguf"]

ARCHITECTURES = ("llama",)
REQUIRED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
# What is read, and what says nothing that the tensors' shapes do not.
KNOWN = (
    *REQUIRED,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "context_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "vocab_size",
)
# Metadata that is harmless at one value and refused at any other.
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.attn_factor": 1.0}
FREQUENCIES = "rope_freqs.weight"


def load_gguf(path: str | pathlib.Path, dtype: Any = np.float32) -> tuple[ModelConfig, dict[str, Any]]:
    """A GGUF checkpoint as our config and weights. Its tensors are read, dequantised and placed one by one.

    Query and key rows are stored with rotated neighbours side by side; here the halves of a head are paired.

    Args:
      dtype: of the weights that are returned, as numpy arrays.

    Raises:
      ConfigError: no GGUF file, or truncated; another architecture; metadata that this model cannot follow; a tensor
        that is missing, unknown, of another shape than the metadata says, or of a type that cannot be read.
    """
    file = open_gguf(path)
    config = _model_config(file)
    expected = _expected_shapes(config)
    _check_tensors(file, expected)
    return config, {"params": _params(file, config, dtype)}


def _fail(file: GgufFile, what: str) -> ConfigError:
    return ConfigError(f"{file.path}: {what}")


def _model_config(file: GgufFile) -> ModelConfig:
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise _fail(file, f"general.architecture={architecture!r} is not read; those that are: llama")
    prefix = f"{architecture}."
    found = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    for name in REQUIRED:
        if name not in found:
            raise _fail(file, f"has no {prefix}{name}, which every llama file must have")
    for name, value in found.items():
        if value != NEUTRAL[name] if name in NEUTRAL else name not in KNOWN:
            raise _fail(file, f"{prefix}{name}={value!r} is not supported: the model would differ from its publisher's")
    heads, dim = found["attention.head_count"], found["embedding_length"]
    kv_heads = found.get("attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise _fail(file, "the number of heads differs between layers, which is not supported")
    width = found.get("attention.key_length", dim // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if found.get(name, width) != width:
            raise _fail(file, f"{prefix}{name}={found[name]}: must equal the head width, {width}")
    if "token_embd.weight" not in file.shapes:
        raise _fail(file, "tensor token_embd.weight is missing")
    theta = _short(found.get("rope.freq_base", 10_000.0))
    return ModelConfig(
        vocab_size=file.shapes["token_embd.weight"][0],
        dim=dim,
        num_layers=found["block_count"],
        num_dense_layers=found["block_count"],
        dense_dim=found["feed_forward_length"],
        attention=Attention(
            projection=GroupedQuery(heads, kv_heads, width),
            rope_theta=theta,
            rope_scaling=_rope_scaling(file, found, theta, width),
        ),
        moe=None,
        tie_embeddings="output.weight" not in file.shapes,
        norm_epsilon=_short(found["attention.layer_norm_rms_epsilon"]),
        context_length=found.get("context_length"),
    )


def _short(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GgufFile, found: dict[str, Any], theta: float, width: int) -> RopeScaling | None:
    kind = found.get("rope.scaling.type", "linear" if "rope.scale_linear" in found else "none")
    factor = _short(found.get("rope.scaling.factor", found.get("rope.scale_linear", 1.0)))
    original = found.get("rope.scaling.original_context_length")
    if FREQUENCIES in file.shapes:
        if kind not in ("none", "llama3"):
            raise _fail(file, f"tensor {FREQUENCIES} together with llama.rope.scaling.type={kind!r} is not supported")
        return _llama3_scaling(file, theta, width, original)
    match kind:
        case "none":
            return None
        case "linear":
            return LinearScaling(factor) if factor != 1 else None
        case "yarn":
            if original is None:
                raise _fail(file, "YaRN without llama.rope.scaling.original_context_length is not supported")
            return Yarn(factor, original, mscale=1.0, mscale_all_dim=0.0)
        case _:
            raise _fail(file, f"llama.rope.scaling.type={kind!r} is not supported; none, linear and yarn are")


def _llama3_scaling(file: GgufFile, theta: float, width: int, original: int | None) -> Llama3Scaling:
    """The file holds what the rule gave, one divisor a frequency: the rule is found again, and checked."""
    divisors = file.tensor(FREQUENCIES)
    scaling = Llama3Scaling(_short(divisors.max()), original or 8192)
    wavelengths = 2 * np.pi * theta ** (np.arange(width // 2) / (width // 2))
    share = scaling.original_length / wavelengths - scaling.low_factor
    kept = np.clip(share / (scaling.high_factor - scaling.low_factor), 0, 1)
    expected = 1 / (kept + (1 - kept) / scaling.factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise _fail(
            file, f"tensor {FREQUENCIES} does not follow Llama 3.1's rule from {scaling.original_length} positions"
        )
    return scaling


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, as stored: outputs before inputs."""
    p = config.attention.projection
    assert isinstance(p, GroupedQuery)
    V, D, F = config.vocab_size, config.dim, config.dense_dim
    Q, K = p.num_heads * p.head_dim, p.num_kv_heads * p.head_dim
    layer = {
        "attn_norm": (D,),
        "attn_q": (Q, D),
        "attn_k": (K, D),
        "attn_v": (K, D),
        "attn_output": (D, Q),
        "ffn_norm": (D,),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
    }
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    if not config.tie_embeddings:
        shapes["output.weight"] = (V, D)
    if isinstance(config.attention.rope_scaling, Llama3Scaling):
        shapes[FREQUENCIES] = (p.head_dim // 2,)
    for i in range(config.num_layers):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _check_tensors(file: GgufFile, expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if name not in file.shapes:
            raise _fail(file, f"tensor {name} is missing")
        if file.shapes[name] != shape:
            raise _fail(file, f"tensor {name} has shape {file.shapes[name]}, expected {shape}")
    for name in file.shapes:
        if name not in expected:
            raise _fail(file, f"tensor {name} has no place in this model: it would be ignored")


def _params(file: GgufFile, config: ModelConfig, dtype: Any) -> dict[str, Any]:
    p = config.attention.projection
    assert isinstance(p, GroupedQuery)
    L, D, F, H, G, N = config.num_layers, config.dim, config.dense_dim, p.num_heads, p.num_kv_heads, p.head_dim
    attention_norm, mlp_norm = np.empty((L, D), dtype), np.empty((L, D), dtype)
    w_q, w_kv, w_out = np.empty((L, D, H, N), dtype), np.empty((L, D, 2, G, N), dtype), np.empty((L, H, N, D), dtype)
    w_in, w_down = np.empty((L, D, 2, F), dtype), np.empty((L, F, D), dtype)

    def halves(rows: np.ndarray) -> np.ndarray:
        """[D, heads, N] of rows stored as [heads, N/2, 2]."""
        return rows.reshape(-1, N // 2, 2, D).swapaxes(1, 2).reshape(-1, N, D).transpose(2, 0, 1)

    for i in range(L):

        def read(name: str, layer: int = i) -> np.ndarray:
            return file.tensor(f"blk.{layer}.{name}.weight")

        attention_norm[i], mlp_norm[i] = read("attn_norm"), read("ffn_norm")
        w_q[i] = halves(read("attn_q"))
        w_kv[i, :, 0] = halves(read("attn_k"))
        w_kv[i, :, 1] = read("attn_v").reshape(G, N, D).transpose(2, 0, 1)
        w_out[i] = read("attn_output").T.reshape(H, N, D)
        w_in[i, :, 0], w_in[i, :, 1] = read("ffn_gate").T, read("ffn_up").T
        w_down[i] = read("ffn_down").T
    params = {
        "embedding": file.tensor("token_embd.weight").astype(dtype),
        "final_norm": {"scale": file.tensor("output_norm.weight").astype(dtype)},
        "dense_layers": {
            "attention_norm": {"scale": attention_norm},
            "attention": {"projection": {"w_q": w_q, "w_kv": w_kv}, "w_out": w_out},
            "mlp_norm": {"scale": mlp_norm},
            "mlp": {"w_in": w_in, "w_out": w_down},
        },
    }
    if not config.tie_embeddings:
        params["head"] = np.ascontiguousarray(file.tensor("output.weight").T, dtype)
    return params
