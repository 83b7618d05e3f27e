"""Times our code side by side with its peers: in one run, in alternation, as a ratio.

Example:
  .venv/bin/python experiments/benchmark.py --suite=train_step --output=/tmp/train_step.json
"""

import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import statistics
import sys
import time
from types import ModuleType

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from dsv3_jax.command_line import run
from experiments.suites import Case

SUITES = ("attention", "train_step", "decode", "dispatch", "draft", "grouped_matmul", "tpu_static", "long_context")
SUITE = flags.DEFINE_enum("suite", None, SUITES, "What to time.", required=True)
CONFIG = flags.DEFINE_string("config", None, "A config file instead of the suite's own.")
ROUNDS = flags.DEFINE_integer("rounds", 12, "Timed rounds; each contender runs once a round.", lower_bound=3)
SECONDS = flags.DEFINE_integer("seconds", 400, "No case is begun after so many.", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup", 3, "Rounds before that.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "A JSON file for the result.")


def alternate(contenders: dict, warmup: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender's calls, one of each a round, so that drift of the machine meets all alike."""
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmup + rounds):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
            if jax.default_backend() == "cpu":
                time.sleep(0.1)  # idle threads of one library spin for a while: not on the other's time
    return seconds


def time_case(case: Case, unit: str) -> list[dict]:
    """One row a contender."""
    seconds = alternate(case.contenders, WARMUP.value, ROUNDS.value)
    seconds = {name: [time / case.calls for time in times] for name, times in seconds.items()}
    ours, rows = next(iter(case.contenders)), []
    for name, times in seconds.items():
        median, spread = statistics.median(times), statistics.quantiles(times, n=4)
        ratio = statistics.median(theirs / mine for theirs, mine in zip(times, seconds[ours], strict=True))
        rows.append(
            {
                "case": case.name,
                "name": name,
                unit: case.work / median,
                "seconds": median,
                "quartiles": [spread[0], spread[2]],
                "ours_over_this": ratio,
            }
            | ({"shares": {name: least / median for name, least in case.limits.items()}} if case.limits else {})
        )
    return rows


def environment() -> dict[str, str]:
    """Date, hardware and versions."""
    import jax

    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    for name in ("torch", "transformers", "tokamax", "libtpu"):
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    hardware = f"{device.platform} {device.device_kind}" if device.platform != "cpu" else f"CPU {platform.machine()}"
    return {"date": str(datetime.date.today()), "hardware": hardware, "python": platform.python_version()} | versions


def timed_table(suite: ModuleType) -> tuple[list[dict], list[str], list[str]]:
    """Rows, notes, and the lines of the table."""
    start, rows = time.monotonic(), []
    cases, notes = suite.cases(CONFIG.value)
    for case in cases:
        rows += time_case(case, suite.UNIT)
        print(f"{case.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if time.monotonic() - start > SECONDS.value:
            notes.append(f"no case was begun after {SECONDS.value} s (--seconds); the last is {case.name!r}")
            break
    shares = list(rows[0].get("shares", ())) if rows else []
    columns = ["case", "contender", suite.UNIT, "median s", "quartiles s", "ours is … times as fast", *shares]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(
            f"| {row['case']} | {row['name']} | {row[suite.UNIT]:,.0f} | {row['seconds']:.4g} | {low:.4g} – {high:.4g} "
            f"| {row['ours_over_this']:.2f} |" + "".join(f" {row['shares'][name]:.1%} |" for name in shares)
        )
    return rows, notes, lines


def static_table(suite: ModuleType) -> tuple[list[dict], list[str], list[str]]:
    """The same of a suite that times nothing."""
    rows, notes = suite.table(CONFIG.value)
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in columns) + " |" for row in rows]
    return rows, notes, lines


def main() -> None:
    """Flags -> suite -> table."""
    suite = importlib.import_module(f"experiments.suites.{SUITE.value}")
    rows, notes, lines = (timed_table if hasattr(suite, "cases") else static_table)(suite)
    print("\n".join([*(f"{k}: {v}" for k, v in environment().items()), *notes, "", *lines]))
    if OUTPUT.value:
        result = {"suite": SUITE.value, "environment": environment(), "notes": notes, "rows": rows}
        pathlib.Path(OUTPUT.value).write_text(json.dumps(result, indent=1) + "\n")
        if hasattr(suite, "plot"):
            suite.plot(rows, pathlib.Path(OUTPUT.value).with_suffix(".png"))


if __name__ == "__main__":
    run(main)
