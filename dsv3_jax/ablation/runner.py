"""Runs an ablation: every row with every seed and its routing on held-out text, then a timing pass that runs alone."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.analysis.routing import RoutingMeter, RoutingRecord, routed_layers
from dsv3_jax.config import Ablation, Config, ConfigError, load, to_json
from dsv3_jax.data.pipeline import Dataset, load_dataset
from dsv3_jax.ops.routing import active_experts
from dsv3_jax.planning.flops import count_parameters, training_flops
from dsv3_jax.planning.hlo import count_flops
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.loop import read_metrics, train
from dsv3_jax.training.step import Trainer, TrainState

AA_SEED_OFFSET, AA_SUFFIX = 1000, " (A/A)"  # of the second copy of the baseline


class Interrupted(RuntimeError):
    """A signal stopped the ablation; the same command goes on where it stopped."""


@dataclasses.dataclass
class Row:
    """One row of the table. Values by seed; `error` says why a failed run failed."""

    name: str
    seeds: list[int]
    bits_per_byte: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # by domain
    curves: list[list[tuple[float, float]]] = dataclasses.field(default_factory=list)  # (tokens seen, training loss)
    active_units: list[float] = dataclasses.field(default_factory=list)  # share at the end, of unit gates
    steps: list[int] = dataclasses.field(default_factory=list)  # that are logged
    bias_paths: list[list[list[float]]] = dataclasses.field(default_factory=list)  # spread of biases: [layer][line]
    routing: list[RoutingRecord] = dataclasses.field(default_factory=list)  # empty: no routed layer
    parameters: int = 0
    active_parameters: int = 0
    flops_a_token: float = 0.0
    hlo_flops_a_token: float = 0.0
    peak_bytes: int = 0
    tokens_per_second: float = 0.0
    error: str = ""

    def config_name(self) -> str:
        """The row of the ablation that this one is, or is a second copy of."""
        return self.name.removesuffix(AA_SUFFIX)

    def quality(self) -> list[float]:
        """Bits per byte averaged over domains, by seed."""
        return np.mean(list(self.bits_per_byte.values()), axis=0).tolist() if self.bits_per_byte else []


class _Shared:
    """Trainers, meters and datasets, made once for all runs that can share them."""

    def __init__(self):
        self._trainers: dict[str, Trainer] = {}
        self._meters: dict[str, RoutingMeter] = {}
        self._datasets: dict[str, Dataset] = {}

    def trainer(self, config: Config) -> Trainer:
        seedless = _seedless(config)
        key = to_json(seedless)
        if key not in self._trainers:
            self._trainers[key] = Trainer(seedless, make_mesh(config.mesh))
        return self._trainers[key]

    def meter(self, config: Config) -> RoutingMeter:
        key = to_json(_seedless(config))
        if key not in self._meters:
            self._meters[key] = RoutingMeter(config, make_mesh(config.mesh))
        return self._meters[key]

    def dataset(self, config: Config) -> Dataset:
        key = repr((config.data, config.model.vocab_size))
        if key not in self._datasets:
            self._datasets[key] = load_dataset(config.data, config.model.vocab_size)
        return self._datasets[key]


def _seedless(config: Config) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))


def run_ablation(ablation: Ablation, workdir: str | pathlib.Path) -> list[Row]:
    """Runs what is missing and returns the rows; the second is the A/A row.

    A finished run is skipped, an interrupted one resumed. A run that raises is reported in its row, and tried again
    by the next call.

    Raises:
      Interrupted: SIGTERM or Ctrl-C; the current run was saved.
    """
    workdir, shared = pathlib.Path(workdir), _Shared()
    rows = []
    for name, config in ablation.rows.items():
        rows.append(_train_row(Row(name, list(ablation.seeds)), config, ablation.routing, workdir, shared))
        if name == ablation.baseline:
            again = Row(name + AA_SUFFIX, [seed + AA_SEED_OFFSET for seed in ablation.seeds])
            rows.append(_train_row(again, config, ablation.routing, workdir, shared))
    _time_rows(rows, ablation, shared)
    return rows


@contextlib.contextmanager
def _reported(row: Row, at: str) -> Iterator[None]:
    """Puts what goes wrong into the row: whatever it is, the other rows go on and the table says so."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        row.error = f"{at}: {type(error).__name__}: {error}".splitlines()[0]
        print(f"failed: {row.error}", flush=True)


def _train_row(row: Row, config: Config, routing: bool, workdir: pathlib.Path, shared: _Shared) -> Row:
    for seed in row.seeds:
        with _reported(row, f"seed {seed}"):
            folder = workdir / "runs" / re.sub(r"[^\w.+-]+", "_", row.name) / f"seed{seed}"
            print(f"--- {row.name}, seed {seed}: {folder}", flush=True)
            seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            state = _finish_run(seeded, folder, shared)
            _read_run(row, folder)
            if routing and routed_layers(config.model):
                row.routing.append(_routing(seeded, folder, state, shared))
        if row.error:
            return row
    with _reported(row, "costs"):
        _static_costs(row, config, shared.trainer(config))
    return row


def _finish_run(config: Config, folder: pathlib.Path, shared: _Shared) -> TrainState:
    """The last state of the run in a folder, which is started or goes on where it is not finished."""
    config.validate()
    if not (config.train.eval_every and config.train.log_every):
        raise ConfigError("config.train.eval_every=0: an ablation needs the held-out loss at the end")
    _check_budget(config, folder)
    result = train(config, folder, trainer=shared.trainer(config), dataset=shared.dataset(config))
    if not result.finished:
        raise Interrupted(f"stopped in {folder}; the same command goes on there")
    return result.state


def _check_budget(config: Config, folder: pathlib.Path) -> None:
    """Raises `ConfigError` if the folder's run had another length or evaluation: a table must not mix them."""
    if not (folder / "config.json").is_file():
        return
    stored = load(str(folder / "config.json"))
    for name in ("num_steps", "eval_rows", "eval_every"):
        theirs, ours = getattr(stored.train, name), getattr(config.train, name)
        if theirs != ours:
            raise ConfigError(f"{folder}: its run has config.train.{name}={theirs}, now {ours}; use another workdir")


def _routing(config: Config, folder: pathlib.Path, state: TrainState, shared: _Shared) -> RoutingRecord:
    """`routing.json` of a finished run, which is made if it is not there."""
    path = folder / "routing.json"
    if not path.is_file():
        record = shared.meter(config).measure(state.variables(), shared.dataset(config), config.train.eval_rows)
        temporary = path.with_suffix(".part")
        temporary.write_text(record.to_json())
        os.replace(temporary, path)
    return RoutingRecord.from_json(path.read_text())


def _read_run(row: Row, folder: pathlib.Path) -> None:
    lines = read_metrics(folder)
    row.curves.append([(line["tokens_seen"], line["loss/lm"]) for line in lines])
    for key, value in lines[-1].items():
        if key.startswith("held_out/") and key.endswith("/bits_per_byte"):
            row.bits_per_byte.setdefault(key.split("/")[1], []).append(value)
    if "activation/active_share" in lines[-1]:
        row.active_units.append(float(np.mean([line["activation/active_share"] for line in lines[-10:]])))
    names = [name for name in lines[-1] if name.startswith("router/bias_std/")]
    names.sort(key=lambda name: (name.split("/")[2], int(name.split("/")[3])))  # by group, and by layer as a number
    row.steps = [line["step"] for line in lines]
    row.bias_paths.append([[line[name] for line in lines] for name in names])


def _static_costs(row: Row, config: Config, trainer: Trainer) -> None:
    row.parameters, row.active_parameters = count_parameters(config.model)
    row.flops_a_token = training_flops(config.model, config.data.sequence_length)
    tokens = config.train.batch_size * config.data.sequence_length
    row.hlo_flops_a_token = count_flops(trainer.compiled.as_text() or "").flops / tokens
    memory = trainer.compiled.memory_analysis()
    if memory is not None:
        live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        row.peak_bytes = memory.temp_size_in_bytes + live


@dataclasses.dataclass
class _Timed:
    """A row's step on real batches. rates: tokens per second of each step; the first warms up."""

    trainer: Trainer
    state: TrainState
    batches: Iterator[Any]
    rates: list[float] = dataclasses.field(default_factory=list)

    def step(self) -> None:
        batch = next(self.batches)
        start = time.perf_counter()
        self.state, metrics = self.trainer.step(self.state, batch)
        jax.block_until_ready(metrics)
        self.rates.append(int((batch["segment_ids"] > 0).sum()) / (time.perf_counter() - start))


def _all_active(state: TrainState) -> TrainState:
    """With every expert in use, as at the end of a run whose experts come later."""
    biases = jax.tree.map(lambda x: jnp.where(active_experts(x), x, 0), state.selection_bias)
    return dataclasses.replace(state, selection_bias=biases)


def _time_rows(rows: list[Row], ablation: Ablation, shared: _Shared) -> None:
    """Tokens per second of each row's step on real batches, rows in alternation, nothing else running."""
    print("--- timing", flush=True)
    running: dict[str, _Timed] = {}
    for row in rows:
        if not row.error:
            with _reported(row, "timing"):
                config = ablation.rows[row.config_name()]
                trainer = shared.trainer(config)
                batches = shared.dataset(config).iterator(config.train.batch_size)
                running[row.name] = _Timed(trainer, _all_active(trainer.init(0)), batches)
    for _ in range(ablation.timing_steps + 1):
        for row in rows:
            if row.name in running and not row.error:
                with _reported(row, "timing"):
                    running[row.name].step()
            if row.error:
                running.pop(row.name, None)  # its memory may be what the others lack
    for row in rows:
        if row.name in running and not row.error:
            row.tokens_per_second = float(np.median(running[row.name].rates[1:]))


def write_rows(rows: list[Row], path: pathlib.Path) -> None:
    """`rows.jsonl`: one object a row, without curves and routing (each run's folder has them)."""
    lines = []
    for row in rows:
        record = {k: v for k, v in vars(row).items() if k not in ("curves", "steps", "bias_paths", "routing")}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
