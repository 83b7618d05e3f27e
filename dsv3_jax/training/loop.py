"""The training loop: starts or resumes a run in its folder, logs, evaluates, saves, stops when asked."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any, NamedTuple

import jax

from dsv3_jax.config import AddedExpert, Config, ConfigError, differences, from_json, to_json
from dsv3_jax.data.packages import is_gguf
from dsv3_jax.data.pipeline import Dataset, load_dataset
from dsv3_jax.evaluation.bits_per_byte import evaluate_rows
from dsv3_jax.interop.huggingface import flat, is_hf_directory
from dsv3_jax.interop.weight_folder import has_weights
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.checkpoints import Checkpoints, has_checkpoint
from dsv3_jax.training.conversion import gguf_file_tokenizer, published_tokenizer
from dsv3_jax.training.growth import Stage, is_done, stages
from dsv3_jax.training.sources import Source, check_fit, open_source, take
from dsv3_jax.training.step import Trainer, TrainState, active_counts
from dsv3_jax.training.terms import MAY_BE_ZERO, term_weights
from dsv3_jax.training.upcycling import fit_experts


class TrainingError(RuntimeError):
    """Training went wrong and was stopped before it could damage the run."""


class TrainResult(NamedTuple):
    """state: the last. step: of it. finished: False if a signal stopped the run before `num_steps`."""

    state: TrainState
    step: int
    finished: bool


class StopSignal:
    """While active, SIGTERM and Ctrl-C ask for a stop after the current step. A second Ctrl-C stops at once."""

    def __enter__(self) -> "StopSignal":
        self.asked, self._before = False, {}
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        print(f"\n{signal.Signals(number).name}: saving after this step", flush=True)

    def __exit__(self, *exc):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class MetricsLog:
    """`metrics.jsonl`, one JSON object a step, and the same scalars for TensorBoard.

    On opening, lines of steps after `step` (made after the checkpoint that is resumed from) are dropped.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        from tensorboardX import SummaryWriter

        path, self.tokens_seen = workdir / "metrics.jsonl", 0
        if path.exists():
            kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
            self.tokens_seen = json.loads(kept[-1])["tokens_seen"] if kept else 0
            temporary = path.with_suffix(".part")
            temporary.write_text("".join(kept))
            os.replace(temporary, path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1, write_to_disk=True)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line."""
        self._file.write(json.dumps({"step": step} | metrics) + "\n")
        self._file.flush()
        self.tokens_seen = metrics["tokens_seen"]
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both files."""
        self._file.close()
        self._board.close()


def _complete_lines(path: pathlib.Path) -> list[str]:
    """Lines that end: a killed process may leave half a line."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in _complete_lines(pathlib.Path(workdir) / "metrics.jsonl")]


def check_data(workdir: pathlib.Path, dataset: Dataset, *names: str) -> None:
    """Raises `ConfigError` if the run's tokenizer or documents are not those of `dataset`: same config, other text.

    A run that was converted names no documents, and its tokenizer only if it came with one.
    """
    path = workdir / "data.json"
    stored = json.loads(path.read_text()) if path.is_file() else dataset.fingerprints
    for name in names:
        if stored.get(name, "") is None:
            raise ConfigError(
                f"{workdir}: was converted from weights without a {name} that a run can use (data.json has {name}: "
                f"null), so no text fits it for certain; convert again, to a new folder, with the {name}.json and "
                f"{name}_config.json that were published beside the weights"
            )
        if stored.get(name, dataset.fingerprints[name]) != dataset.fingerprints[name]:
            raise ConfigError(
                f"{workdir}: was trained with another {name} (the text of config.data has changed); use the "
                "run's own text, or another workdir"
            )


def claim_workdir(config: Config, workdir: pathlib.Path, dataset: Dataset) -> None:
    """Writes `config.json`, `data.json` and `tokenizer.json` into a new folder, or checks that its run has the same
    config and text.

    Raises:
      ConfigError: the folder holds another run or other files. Nothing in it is changed then.
    """
    path = workdir / "config.json"
    if path.is_file():
        changed = differences(from_json(path.read_text()), config)
        if changed:
            name, (theirs, ours) = next(iter(changed.items()))
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ConfigError(
                f"--workdir={workdir}: holds a run with config.{name}={theirs!r}, now {ours!r}{more}; use another "
                "workdir, or the run's own config"
            )
        check_data(workdir, dataset, "tokenizer", "documents")
    elif workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(f"--workdir={workdir}: is not empty and holds no run (no config.json); use another folder")
    workdir.mkdir(parents=True, exist_ok=True)
    texts = {
        "tokenizer.json": dataset.tokenizer.to_json(),
        "data.json": json.dumps(dataset.fingerprints),
        "config.json": to_json(config),
    }
    for name, text in texts.items():
        temporary = workdir / f"{name}.part"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, workdir / name)


def check_terms(step: int, metrics: dict[str, float], weights: dict[str, float]) -> None:
    """Raises `TrainingError` for a loss that is not finite, or a term that is on and exactly zero.

    A term may be zero if it says so (`MAY_BE_ZERO`), or if `metrics` say that the batch has no token for it.
    """
    for name, value in metrics.items():
        if (name.startswith("loss") or name == "grad_norm") and not math.isfinite(value):
            raise TrainingError(
                f"step {step}: {name} is {value}; lower train.optimizer.learning_rate, or look at the data"
            )
    for name, weight in weights.items():
        empty = name in MAY_BE_ZERO or metrics.get(f"tokens/{name}") == 0
        if weight and metrics[f"loss/{name}"] == 0 and not empty:
            raise TrainingError(f"step {step}: loss/{name} is on (weight {weight}) and exactly zero: it trains nothing")


class Progress:
    """One line with step, loss, rate and time left; rewritten in place on a terminal, else printed now and then."""

    def __init__(self, total: int, every_seconds: float = 10.0):
        self._total, self._every, self._last = total, every_seconds, -math.inf
        self._live = sys.stdout.isatty()

    def show(self, step: int, loss: float, rate: float, seconds_a_step: float) -> None:
        """Shows a step."""
        now = time.monotonic()
        if not self._live and now - self._last < self._every and step != self._total:
            return
        self._last = now
        left = (self._total - step) * seconds_a_step
        line = (
            f"step {step}/{self._total}  loss {loss:.4f}  {rate:,.0f} tokens/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
        print(f"\r{line}\033[K" if self._live else line, end="" if self._live else "\n", flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self._live:
            print()


class _Clock:
    """Steps, tokens and seconds of training since the last log line, saves and evaluation excluded."""

    def __init__(self):
        self.steps, self.tokens, self._start = 0, 0, time.perf_counter()

    def count(self, tokens: int) -> None:
        """One more step."""
        self.steps += 1
        self.tokens += tokens

    def seconds(self) -> float:
        """Since the first step began."""
        return time.perf_counter() - self._start

    def leave_out(self, seconds: float) -> None:
        """Takes time spent otherwise out of the count."""
        self._start += seconds


def _held_out(trainer: Trainer, state: TrainState, dataset: Dataset, config: Config) -> dict[str, float]:
    result = {}
    rows_a_batch = config.train.batch_size // config.train.microbatches
    for name, rows in dataset.held_out.items():
        measured = evaluate_rows(
            trainer.eval_step, state.variables(), rows, dataset.tokenizer.bytes_V, rows_a_batch, config.train.eval_rows
        )
        result[f"held_out/{name}/loss"] = measured.loss
        result[f"held_out/{name}/bits_per_byte"] = measured.bits_per_byte
    return result


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _check_source(init_from: str, config: Config, trainer: Trainer, dataset: Dataset) -> Source:
    """Opens what a new run starts from. Raises `ConfigError` unless its model and its tokenizer, if known, fit."""
    wanted = flat(trainer.abstract_state().variables())
    source = fit_experts(open_source(init_from), config, trainer.expert_axes, wanted)
    source, folder = check_fit(source, config.model, wanted), pathlib.Path(init_from)
    data = folder / "data.json"
    if is_hf_directory(init_from) or is_gguf(init_from):
        published = gguf_file_tokenizer(init_from) if is_gguf(init_from) else published_tokenizer(folder, folder)
        known = published is not None
        if published is not None and published[1] != dataset.fingerprints["tokenizer"]:
            raise ConfigError(
                f"--init_from={init_from}: config.data.tokenizer is not its tokenizer; use {published[0]}"
            )
    else:
        known = data.is_file() and json.loads(data.read_text()).get("tokenizer") is not None
        if known:
            check_data(folder, dataset, "tokenizer")
    note = () if known else ("its tokenizer is not known: config.data.tokenizer must be the one it was trained with",)
    return source._replace(notes=(*source.notes, *note))


def _start(trainer: Trainer, checkpoints: Checkpoints, iterator: Any, seed: int, source: Source | None) -> TrainState:
    """The newest checkpoint, or a fresh state, with the weights of another model if asked."""
    if checkpoints.latest_step() is not None:
        return checkpoints.restore(trainer, iterator, seed)
    state = trainer.init(seed)
    if source is None:
        return state
    variables = take(source, state.variables(), trainer.abstract_state().variables())
    state = dataclasses.replace(state, params=variables["params"], selection_bias=variables["selection_bias"])
    model, growth = trainer.config.model, trainer.config.train.growth
    for group, active_L in active_counts(state.selection_bias).items():
        if growth is None and model.moe is not None and int(active_L.min()) < model.moe.num_experts:
            print(f"of {model.moe.num_experts} experts, {active_L} are active in {group}, and no others will be")
    return state


def _grow(trainer: Trainer, state: TrainState, step: int, planned: list[Stage]) -> tuple[TrainState, list[Stage]]:
    """The state with the stages that are due, and the stages that are left. A resumed run has gone through some."""
    while planned and planned[0].step <= step:
        stage, *planned = planned
        if not is_done(stage, state.selection_bias):
            state = trainer.grow(state, stage)
            growth = trainer.config.train.growth
            where = f" in mixture-of-experts layer {growth.layer}" if isinstance(growth, AddedExpert) else ""
            print(f"step {step}: {stage.experts - stage.new_E.sum()} -> {stage.experts} experts{where}", flush=True)
    return state, planned


def train(
    config: Config,
    workdir: str | pathlib.Path,
    init_from: str | None = None,
    trainer: Trainer | None = None,
    dataset: Dataset | None = None,
) -> TrainResult:
    """Trains until `config.train.num_steps`, or resumes what is in `workdir`.

    Leaves `config.json`, `metrics.jsonl`, `checkpoints/` and TensorBoard files. A resumed run continues bit for bit.

    Args:
      init_from: what a new run takes its weights from: the workdir of another run, converted weights, or a Hugging
        Face directory or a GGUF file, of the same model up to `sources.CHANGES` and `upcycling.fit_experts`.
      trainer, dataset: reused if given, to compile and load once for several runs of one config.

    Raises:
      ConfigError: before anything in `workdir` is touched. TrainingError: a loss term is not finite, or silently off.
    """
    config.validate()
    workdir = pathlib.Path(workdir)
    with StopSignal() as stop:
        trainer = trainer or Trainer(config, make_mesh(config.mesh))
        dataset = dataset or load_dataset(config.data, config.model.vocab_size)
        if has_weights(workdir):
            raise ConfigError(f"--workdir={workdir}: holds converted weights; use another folder, and --init_from this")
        if init_from is None and isinstance(config.train.growth, AddedExpert) and not has_checkpoint(workdir):
            raise ConfigError(
                "config.train.growth=added_expert: adds to a trained model; give one with an expert less as --init_from"
            )
        source = None if init_from is None else _check_source(init_from, config, trainer, dataset)
        claim_workdir(config, workdir, dataset)
        checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
        try:
            iterator = dataset.iterator(config.train.batch_size)
            state = _start(trainer, checkpoints, iterator, config.train.seed, source)
            step, last = int(state.step), config.train.num_steps
            if step >= last:
                print(f"{workdir}: already at step {step} of {last}; nothing to do (to go on, raise train.num_steps)")
                return TrainResult(state, step, True)
            if step:
                print(f"{workdir}: resuming at step {step} of {last}", flush=True)
            state, step = _run(config, trainer, dataset, state, iterator, workdir, checkpoints, stop)
            checkpoints.save(state, iterator)
        finally:
            checkpoints.close()
    return TrainResult(state, step, step >= last)


def _run(
    config: Config,
    trainer: Trainer,
    dataset: Dataset,
    state: TrainState,
    iterator: Any,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    stop: StopSignal,
) -> tuple[TrainState, int]:
    """Steps until the last one or until asked to stop; logs, evaluates and saves where it is due."""
    settings, last = config.train, config.train.num_steps
    step = int(state.step)
    log, progress = MetricsLog(workdir, step), Progress(last)
    try:
        assert trainer.compiled is not None  # compile before the clock starts
        clock, ending = _Clock(), stop.asked
        planned = stages(settings.growth, config.model.moe)
        while not ending:
            if planned and planned[0].step <= step:
                jax.block_until_ready(state.step)
                before = time.perf_counter()
                state, planned = _grow(trainer, state, step, planned)
                clock.leave_out(time.perf_counter() - before)
            batch = next(iterator)
            state, device_metrics = trainer.step(state, batch)
            step += 1
            ending = step == last or stop.asked
            clock.count(int((batch["segment_ids"] > 0).sum()))
            evaluate_now = _due(step, settings.eval_every, last)
            save_now = _due(step, settings.checkpoint_every, last)
            # A state is checked before it is saved.
            if _due(step, settings.log_every, last) or evaluate_now or save_now or ending:
                metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
                check_terms(step, metrics, term_weights(config, step - 1))
                seconds = clock.seconds()
                metrics["tokens_per_second"] = clock.tokens / seconds
                metrics["tokens_seen"] = log.tokens_seen + clock.tokens
                progress.show(step, metrics["loss"], metrics["tokens_per_second"], seconds / clock.steps)
                if evaluate_now:
                    metrics |= _held_out(trainer, state, dataset, config)
                log.write(step, metrics)
                clock = _Clock()
            if save_now:
                jax.block_until_ready(state.step)
                before = time.perf_counter()
                checkpoints.save(state, iterator)
                clock.leave_out(time.perf_counter() - before)
    finally:
        progress.close()
        log.close()
    return state, step
