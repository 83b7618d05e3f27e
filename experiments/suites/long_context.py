"""What long context costs: peak memory and FLOPs of one layer and of a 32-layer model, full attention against patterns.

Each program is the loss and the gradients of one row of tokens, compiled for TPU v5p chips that are not here: memory is
what the compiler plans, or what it names where it refuses; nothing runs, and nothing is timed. Programs that were
compiled before are read from the cache folder (`dsv3_jax.runtime.cache_folder`).
"""

import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from dsv3_jax import config as c

KIND, CHIPS = "v5p", 4  # of the model, split over heads, units and vocabulary; a layer is on one chip
LENGTHS = (8192, 20480, 32768, 40960, 131072)
SECONDS = 3600  # a process, of one pattern at every length, may take so long


class Contender(NamedTuple):
    """An attention: its pattern for a length, and its implementation."""

    pattern: Callable[[int], c.LayerPattern]
    implementation: str = "pallas_tpu"


SCORES, KERNEL = "full, all scores", "full"
A1, A3 = "A1: overlapping 512 + 3 global", "A3: run-time window 4096 + 4 global"
A4_EXACT, A4_LOCAL = "A4: segments of 1024, all keys", "A4: segments of 1024, own keys"
CONTENDERS = {
    SCORES: Contender(lambda _: c.Full(), "reference"),
    KERNEL: Contender(lambda _: c.Full()),
    A1: Contender(lambda length: c.Windowed(512, (0, length // 2, length - 1), stride=256)),
    A3: Contender(lambda _: c.RuntimeWindowed(4096, (0, 1, 2, 3), (c.TaskWindow("answers", 1024),))),
    A4_EXACT: Contender(lambda _: c.Segmented(1024, "all"), "blocked"),
    A4_LOCAL: Contender(lambda _: c.Segmented(1024, "segment")),
}


class Line(NamedTuple):
    """What one process compiles. scope: layer or model."""

    scope: str
    contender: str
    remat: str
    lengths: tuple[int, ...]


def lines() -> list[Line]:
    """Every contender at every length, a layer that keeps all it computes and a model that keeps the inputs of layers;
    and where a claim names a length, the model with the other policies."""
    found = [Line("layer", name, "none", LENGTHS) for name in CONTENDERS]
    found += [Line("model", name, "full", LENGTHS) for name in CONTENDERS]
    claimed = {A1: 20480, A4_EXACT: 8192, A4_LOCAL: 8192}
    found += [Line("model", name, "none", (length,)) for name, length in claimed.items()]
    for remat, lengths in (("none", (8192, 20480, 40960)), ("dots", (40960,))):
        found += [Line("model", name, remat, lengths) for name in (SCORES, KERNEL)]
    return found + [Line("model", A1, remat, (40960,)) for remat in ("none", "dots")]


def make_config(line: Line, length: int) -> c.Config:
    """32 dense layers of 4096, 32 heads of 128, SwiGLUs of 11008, a vocabulary of 32000: 6.7 billion parameters."""
    contender = CONTENDERS[line.contender]
    model = c.ModelConfig(
        vocab_size=32000,
        dim=4096,
        num_layers=32,
        num_dense_layers=32,
        dense_dim=11008,
        attention=c.Attention(
            c.GroupedQuery(32, 32, 128), contender.pattern(length), implementation=contender.implementation
        ),
        moe=None,
        compute_dtype="bfloat16",
        remat=line.remat,
    )
    return c.Config(
        model=model,
        data=c.DataConfig((c.Domain("answers", c.Prose()),), sequence_length=length, max_segments=1),
        train=c.TrainConfig(batch_size=1),
        mesh=c.MeshConfig(model=1 if line.scope == "layer" else CHIPS),
    ).validate()


def table(config_path: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """One row a program; notes.

    Raises:
      ConfigError: a config, which this suite has no use for, or no compiler for TPUs.
    """
    if config_path:
        raise c.ConfigError(f"--config={config_path}: --suite=long_context has sizes of its own; leave --config out")
    if importlib.util.find_spec("libtpu") is None:
        raise c.ConfigError("--suite=long_context compiles for a TPU, which needs libtpu: make peers")
    rows = [row for line in lines() for row in _rows(line)]
    for row in rows:
        for name, baseline in (("against all scores", SCORES), ("against full", KERNEL)):
            same = {key: row[key] for key in ("of", "tokens", "remat")} | {"attention": baseline}
            peaks = [other["peak GiB"] for other in rows if same.items() <= other.items()]
            if peaks and isinstance(peaks[0], float) and isinstance(row["peak GiB"], float):
                row[name] = f"{row['peak GiB'] / peaks[0] - 1:+.0%}"
    return rows, [
        f"{KIND}, compiled without one; a layer on one chip, the 32-layer model on {CHIPS}; one row of tokens",
        "peak GiB: of a chip: arguments + temporaries + outputs (float32 parameters and gradients), as the compiler "
        "plans it, no optimizer state; TFLOP: of a chip and step, analytic, visible keys only, no recomputation; "
        "TFLOP (XLA): as compiled, what is masked and recomputed included, of the layer, which has no loops",
    ]


def _rows(line: Line) -> list[dict[str, Any]]:
    from dsv3_jax.planning.flops import forward_flops

    chips, measured, rows = 1 if line.scope == "layer" else CHIPS, _compiled(line), []
    for length in line.lengths:
        found = measured[length]
        parts = forward_flops(make_config(line, length).model, length)
        if line.scope == "layer":
            parts = {name: flops / 32 for name, flops in parts.items() if name != "vocabulary head"}
        tera = 3 * length / chips / 1e12  # a backward pass costs two forward ones
        gib = {name: found[name] / 2**30 for name in ("arguments", "temporaries", "outputs") if name in found}
        row = {"of": line.scope, "attention": line.contender, "tokens": length, "remat": line.remat}
        row["peak GiB"] = sum(gib.values()) if gib else found["error"]
        row["fits"] = "" if not gib else "no" if "error" in found else "yes"
        row |= {"TFLOP": tera * sum(parts.values()), "of it attention": tera * parts["attention scores and values"]}
        row["TFLOP (XLA)"] = found["flops"] / 1e12 if line.scope == "layer" and "flops" in found else ""
        rows.append(row | {f"{name} GiB": value for name, value in gib.items()})
    return rows


def _compiled(line: Line) -> dict[int, dict[str, Any]]:
    """By length, what `long_context_programs` prints, or why it printed nothing."""
    command = [sys.executable, "-m", "experiments.suites.long_context_programs", json.dumps(line)]
    found: dict[int, dict[str, Any]] = {}
    with subprocess.Popen(
        command, cwd=pathlib.Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
        reader.start()
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        for text in process.stdout:
            result = json.loads(text)
            found[result.pop("length")] = result
            print(f"{line.scope}, {line.contender}, remat {line.remat}: {text.strip()}", file=sys.stderr, flush=True)
        timer.cancel()
        reader.join()
    said = [text.strip() for text in errors if text.strip()] or ["no message"]
    error = f"not compiled within {SECONDS} s" if process.returncode == -signal.SIGKILL else said[-1]
    return {length: {"error": error} for length in line.lengths} | found
