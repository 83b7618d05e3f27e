"""A published model with its attention replaced, without training: what of its quality is kept, at what cost."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ConfigError, ModelConfig, Pattern, PretrainedAblation, to_dict
from dsv3_jax.data import corpora
from dsv3_jax.data.tokenizers import Tokenizer
from dsv3_jax.inference.sources import Source, open_published
from dsv3_jax.models.transformer import Transformer, head_weight, make_cache
from dsv3_jax.ops.losses import cross_entropy
from dsv3_jax.planning.flops import forward_flops


@dataclasses.dataclass
class Cell:
    """One row at one context length. nats: mean loss of the second half of each context, by domain.
    temporary_bytes: of the compiled forward pass of one context. Speed is not this table's: cells are measured one
    after another, so a busy machine would look like a slow row."""

    row: str
    context: int
    nats: dict[str, list[float]]
    flops_a_token: float
    cache_bytes: int
    temporary_bytes: int


def held_out_texts(ablation: PretrainedAblation, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Tokens of each domain, int32 [texts, longest context + 1], spread evenly over its held-out documents.

    Raises:
      ConfigError: a domain's held-out documents are too short or too few.
    """
    longest, texts = max(ablation.contexts), {}
    count = ablation.tokens // longest
    for index, domain in enumerate(ablation.domains):
        found = corpora.documents(domain.corpus)
        _, held_out = corpora.split(found, ablation.held_out_fraction, f"config.domains.{index}")
        rows = []
        for document in held_out:
            ids = tokenizer.encode(document.text)
            rows += [ids[at : at + longest + 1] for at in range(0, len(ids) - longest, longest)]
        if len(rows) < count:
            raise ConfigError(
                f"config.tokens={ablation.tokens}: the held-out documents of {domain.name} hold {len(rows)} texts of"
                f" {longest} tokens, {count} are needed; lower it, or the longest context"
            )
        chosen = np.linspace(0, len(rows) - 1, count).round().astype(int)
        texts[domain.name] = np.stack([rows[i] for i in chosen]).astype(np.int32)
    return texts


def _with_pattern(config: ModelConfig, pattern: Pattern) -> ModelConfig:
    attention = dataclasses.replace(config.attention, pattern=pattern)
    return dataclasses.replace(config, attention=attention, unroll=False)  # many programs: a scan compiles sooner


def _loss(config: ModelConfig) -> Callable[[Any, jax.Array], jax.Array]:
    """(variables, tokens [1, context + 1]) -> mean nats of the context's second half."""

    def loss(variables, tokens):
        output: Any = Transformer(config).apply(variables, tokens[:, :-1], return_logits=False)
        half = tokens.shape[1] // 2
        hidden, targets = output.hidden_BTD[:, half:], tokens[:, 1 + half :]
        head_DV = head_weight(config, variables["params"])
        return cross_entropy(hidden, head_DV, targets, jnp.ones(targets.shape)) / targets.size

    return loss


def _measure(source: Source, variables: Any, row: str, pattern: Pattern, context: int, texts: Any) -> Cell:
    config = _with_pattern(source.config, pattern)
    shape = jax.ShapeDtypeStruct((1, context + 1), jnp.int32)
    compiled = jax.jit(_loss(config)).lower(variables, shape).compile()
    nats: dict[str, list[float]] = {}
    for domain, rows in texts.items():
        # The last token of a context is the first target of none: contexts tile the text and share their border.
        pieces = [text[at : at + context + 1] for text in rows for at in range(0, len(text) - 1, context)]
        nats[domain] = [float(compiled(variables, piece[None])) for piece in pieces]
    cache = jax.eval_shape(lambda: make_cache(config, 1, context))
    memory = compiled.memory_analysis()
    return Cell(
        row=row,
        context=context,
        nats=nats,
        flops_a_token=sum(forward_flops(config, context).values()),
        cache_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers)),
        temporary_bytes=0 if memory is None else memory.temp_size_in_bytes,
    )


def _settings(ablation: PretrainedAblation, source: Source, texts: dict[str, np.ndarray]) -> str:
    """One line that differs when the numbers could: rows, weights, texts, and where it runs."""
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(source.variables):
        weights.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    settings = {
        "rows": {name: to_dict(pattern) for name, pattern in ablation.rows.items()},
        "contexts": ablation.contexts,
        "model": to_dict(source.config),
        "weights": weights.hexdigest(),
        "texts": {name: hashlib.sha256(rows.tobytes()).hexdigest() for name, rows in texts.items()},
        "device": jax.devices()[0].device_kind,
    }
    return json.dumps(settings, sort_keys=True) + "\n"


def _open_journal(path: pathlib.Path, settings: str) -> list[Cell]:
    """The cells that a table has finished; a last line that was cut short does not count, and is taken out.

    Raises:
      ConfigError: they are of another table.
    """
    text = path.read_text() if path.is_file() else ""
    first, *lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")] or [settings]
    if first != settings:
        raise ConfigError(f"{path}: holds cells of another table, model, text or hardware; use another workdir")
    temporary = path.with_suffix(".part")
    temporary.write_text("".join([first, *lines]))
    os.replace(temporary, path)
    return [Cell(**json.loads(line)) for line in lines]


def run_pretrained(ablation: PretrainedAblation, workdir: str | pathlib.Path) -> list[Cell]:
    """Measures every row at every context length; skips what `workdir` has finished.

    Raises:
      ConfigError: the model, the text, or the folder cannot be used. KeyboardInterrupt: the same command goes on.
    """
    workdir = pathlib.Path(workdir)
    source = open_published(ablation.model)
    longest = max(ablation.contexts)
    if source.max_length is not None and longest > source.max_length:
        raise ConfigError(
            f"config.contexts={ablation.contexts}: {ablation.model} was made for {source.max_length} tokens at most"
        )
    texts = held_out_texts(ablation, source.tokenizer)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "cells.jsonl"
    cells = _open_journal(path, _settings(ablation, source, texts))
    done = {(cell.row, cell.context) for cell in cells}
    variables = jax.device_put(source.variables)
    todo = [(name, context) for name in ablation.rows for context in ablation.contexts if (name, context) not in done]
    begin = time.perf_counter()
    for index, (name, context) in enumerate(todo):
        cell = _measure(source, variables, name, ablation.rows[name], context, texts)
        cells.append(cell)
        with path.open("a") as file:
            file.write(json.dumps(vars(cell)) + "\n")
        left = (time.perf_counter() - begin) / (index + 1) * (len(todo) - index - 1)
        perplexity = math.exp(np.mean([value for values in cell.nats.values() for value in values]))
        print(
            f"{index + 1}/{len(todo)}  {name}, context {context}: perplexity {perplexity:.2f}, "
            f"{int(left // 60)}:{int(left % 60):02d} left",
            flush=True,
        )
    return cells
