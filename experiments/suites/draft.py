"""Generation with and without a draft by multi-token prediction, of a model trained here for a few minutes.

A random model accepts no drafts, so that the suite trains its config first, on prose, once: the run stays in the
machine's folder of temporary files. Prompts are the beginnings of held-out rows.
"""

import dataclasses
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np

from dsv3_jax.config import Config, ConfigError, Cosine, DataConfig, Domain, Prose, load, to_json
from experiments.suites import Case

UNIT = "new tokens/s"
DEFAULT_CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "mtp" / "depth1.py")
PROMPT_LENGTH, NEW_TOKENS, BATCHES, TEMPERATURES = 64, 128, (1, 4), (0.0, 0.8)
TRAIN_STEPS, ROW_LENGTH, ROWS = 300, 512, 4
DOMAINS = (Domain("prose", Prose()),)


def training(config_path: str) -> Config:
    """The config's model, optimizer and tokenizer, trained shortly on prose. Raises `ConfigError` without modules."""
    config = load(config_path)
    if config.model.mtp is None:
        raise ConfigError(f"--config={config_path}: --suite=draft needs a model with config.model.mtp")
    old = config.data
    data = DataConfig(DOMAINS, old.tokenizer, min(ROW_LENGTH, old.sequence_length), old.max_segments)
    schedule = Cosine(total_steps=TRAIN_STEPS, warmup_steps=TRAIN_STEPS // 10)
    train = dataclasses.replace(
        config.train,
        num_steps=TRAIN_STEPS,
        batch_size=ROWS,
        microbatches=1,
        schedule=schedule,
        checkpoint_every=TRAIN_STEPS,
        eval_every=0,
    )
    return dataclasses.replace(config, data=data, train=train).validate()


def cases(config_path: str | None) -> tuple[list[Case], list[str]]:
    """A case for each batch size and temperature, with the draft and without; notes tell what was accepted.

    Raises:
      ConfigError: the model of the config has no multi-token-prediction modules, or cannot decode.
    """
    import jax

    from dsv3_jax.data.pipeline import load_dataset
    from dsv3_jax.inference.generation import Generator
    from dsv3_jax.inference.sampling import make_sampling
    from dsv3_jax.inference.speculative import SpeculativeGenerator
    from dsv3_jax.models.transformer import make_cache
    from dsv3_jax.training.checkpoints import restore
    from dsv3_jax.training.loop import read_metrics, train

    run = training(config_path or DEFAULT_CONFIG)
    length = PROMPT_LENGTH + NEW_TOKENS
    jax.eval_shape(lambda: make_cache(run.model, 1, length))  # a model that cannot decode is refused untrained
    key = hashlib.sha256(to_json(run).encode()).hexdigest()[:12]
    workdir = pathlib.Path(tempfile.gettempdir()) / f"dsv3_jax_draft_{key}"
    dataset = load_dataset(run.data, run.model.vocab_size)
    train(run, workdir, dataset=dataset)
    last = list(read_metrics(workdir))[-1]
    model, variables = restore(workdir)
    drafting = SpeculativeGenerator(model, variables, length)
    plain = Generator(model, drafting.variables, length)
    assert model.mtp is not None
    names = ["lm", *(f"mtp_{k + 1}" for k in range(model.mtp.depth))]
    losses = ", ".join(f"{name} {last[f'loss/{name}']:.2f}" for name in names)
    notes = [
        f"{config_path or 'configs/mtp/depth1.py'}: depth {model.mtp.depth}, trained for {TRAIN_STEPS} steps of "
        f"{ROWS} x {run.data.sequence_length} tokens ({losses} nats at the end)",
        f"prompt {PROMPT_LENGTH} held-out tokens, {NEW_TOKENS} new tokens, no stop token, prefill included, "
        f"{model.compute_dtype}, {len(os.sched_getaffinity(0))} threads",
    ]
    rows = next(iter(dataset.held_out.values()))
    found = []
    for batch in BATCHES:
        prompts = [np.asarray(rows[row]["tokens"][:PROMPT_LENGTH]) for row in range(batch)]
        for temperature in TEMPERATURES:
            options = {"max_new_tokens": NEW_TOKENS, "sampling": make_sampling(temperature), "seed": 0}
            contenders: dict[str, Callable[..., object]] = {
                "draft": lambda prompts=prompts, options=options: drafting.generate(prompts, **options),
                "no draft": lambda prompts=prompts, options=options: plain.generate(prompts, **options),
            }
            with_draft, without = (contender() for contender in contenders.values())
            name = f"batch {batch}, temperature {temperature}"
            notes.append(f"{name}: {drafting.counts}{_agreement(with_draft, without, temperature)}")
            found.append(Case(name, batch * NEW_TOKENS, contenders))
    return found, notes


def _agreement(with_draft: object, without: object, temperature: float) -> str:
    same = np.mean(np.asarray(with_draft) == np.asarray(without))
    return f"; {same:.1%} of the new tokens are the same" if temperature == 0 else ""
