"""A tiny Llama as a GGUF file, its tokenizer inside."""

import json
import pathlib

import gguf
import numpy as np
import tokenizers
from gguf import GGMLQuantizationType as Q

TYPES = (Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1)
L, D, H, G, N, F = 2, 64, 4, 2, 16, 96
TEMPLATE = "{% for m in messages %}<|bos|>{{ m.role }}: {{ m.content }}{% endfor %}{{ eos_token }}"


def interleaved(w_ND: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves (0 1 … | 8 9 …) to neighbours (0 8 1 9 …), row by row."""
    result = np.empty_like(w_ND)
    for head in range(heads):
        for i in range(N // 2):
            result[head * N + 2 * i] = w_ND[head * N + i]
            result[head * N + 2 * i + 1] = w_ND[head * N + N // 2 + i]
    return result


def make_tensors(vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)

    def matrix(*shape):
        return (random.normal(size=shape) / np.sqrt(shape[-1]) * 2).astype(np.float32)

    tensors = {"token_embd.weight": matrix(vocab, D), "output_norm.weight": 1 + matrix(D) / 4}
    for i in range(L):
        layer = {
            "attn_norm": 1 + matrix(D) / 4,
            "attn_q": interleaved(matrix(H * N, D), H),
            "attn_k": interleaved(matrix(G * N, D), G),
            "attn_v": matrix(G * N, D),
            "attn_output": matrix(D, H * N),
            "ffn_norm": 1 + matrix(D) / 4,
            "ffn_gate": matrix(F, D),
            "ffn_up": matrix(F, D),
            "ffn_down": matrix(D, F),
        }
        tensors |= {f"blk.{i}.{name}.weight": value for name, value in layer.items()}
    return tensors


def metadata() -> dict:
    return {
        "llama.block_count": L,
        "llama.context_length": 64,
        "llama.embedding_length": D,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": H,
        "llama.attention.head_count_kv": G,
        "llama.rope.dimension_count": N,
        "llama.rope.freq_base": 5000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }


def add_vocabulary(writer: gguf.GGUFWriter, bpe: tokenizers.Tokenizer, pre: str, add_bos: bool | None) -> None:
    vocabulary = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index < 3 else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)


def write(
    path, tensors, values, bpe=None, kinds=None, architecture="llama", pre="gpt-2", add_bos: bool | None = True
) -> pathlib.Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    if bpe is not None:
        add_vocabulary(writer, bpe, pre, add_bos)
    for name, value in tensors.items():
        kind = (kinds or {}).get(name, Q.F32)
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mixed_types(tensors) -> dict[str, Q]:
    matrices = [name for name, value in tensors.items() if value.ndim == 2]
    return {name: TYPES[i % len(TYPES)] for i, name in enumerate(matrices)}
