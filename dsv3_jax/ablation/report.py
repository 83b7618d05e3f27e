"""The table of an ablation in Markdown and CSV, and its plots."""

import csv
import datetime
import importlib.metadata
import math
import pathlib
import platform

import jax
import numpy as np
from scipy import stats

from dsv3_jax.ablation import routing_report
from dsv3_jax.ablation.runner import Row, write_rows
from dsv3_jax.config import Ablation


def smallest_effect(rows: list[Row]) -> float:
    """The smallest difference of two rows' means that a two-sided t-test at 5 % would call one, with the pooled spread.

    t(0.975, Σ (n − 1)) · s_pooled · sqrt(2 / n); infinite with one seed a row.
    """
    samples = [row.quality() for row in rows if len(row.quality()) > 1]
    freedom = sum(len(sample) - 1 for sample in samples)
    if not freedom:
        return math.inf
    pooled = math.sqrt(sum(np.var(sample, ddof=1) * (len(sample) - 1) for sample in samples) / freedom)
    seeds = float(np.mean([len(sample) for sample in samples]))
    return float(stats.t.ppf(0.975, freedom)) * pooled * math.sqrt(2 / seeds)


def verdict(row: Row, reference: Row, effect: float) -> str:
    """What the table may say of a row beside the one it is compared with."""
    if row.error:
        return f"failed: {row.error}"
    if row is reference:
        return "baseline"
    if not reference.quality():
        return f"no {reference.name} to compare with"
    difference = float(np.mean(row.quality()) - np.mean(reference.quality()))
    if abs(difference) < effect:
        return "inconclusive at this scale"
    return "worse" if difference > 0 else "better"


def _cells(row: Row, reference: Row, named: bool, effect: float) -> dict[str, str]:
    """By column. named: the verdict says what the row is compared with."""
    quality, said = row.quality(), verdict(row, reference, effect)
    cells = {"row": row.name}
    if not quality:
        return cells | {"verdict": said}
    spread = f" ± {np.std(quality, ddof=1):.4f}" if len(quality) > 1 else ""
    cells["bits/byte"] = f"{np.mean(quality):.4f}{spread}"
    for domain, values in row.bits_per_byte.items():
        cells[f"{domain}"] = f"{np.mean(values):.4f}"
    if not row.error:
        cells |= {
            "parameters": f"{row.parameters / 1e6:.2f}M",
            "active": f"{row.active_parameters / 1e6:.2f}M",
            "MFLOP/token": f"{row.flops_a_token / 1e6:.2f}",
            "MFLOP/token (XLA)": f"{row.hlo_flops_a_token / 1e6:.2f}",
            "peak MiB (XLA)": f"{row.peak_bytes / 2**20:.0f}",
            "tokens/s": f"{row.tokens_per_second:,.0f}",
        }
    return cells | {"verdict": f"{said} (against {reference.name})" if named else said}


def environment_line() -> str:
    """Date, hardware and versions."""
    device = jax.devices()[0]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    hardware = f"{device.platform} {device.device_kind} {platform.machine()}"
    return f"{datetime.date.today()}, {hardware}, Python {platform.python_version()}, {versions}."


def markdown(ablation: Ablation, rows: list[Row], command: str) -> str:
    """The table with what is needed to read it: budget, hardware, smallest effect."""
    by_name, effect = {row.name: row for row in rows}, smallest_effect(rows)
    references = [by_name[ablation.against.get(row.name, ablation.baseline)] for row in rows]
    table = [
        _cells(row, reference, row.name in ablation.against, effect)
        for row, reference in zip(rows, references, strict=True)
    ]
    columns = [*dict.fromkeys(name for cells in table for name in cells if name != "verdict"), "verdict"]
    config = ablation.rows[ablation.baseline]
    rows_a_run = {name: row.train.num_steps * row.train.batch_size for name, row in ablation.rows.items()}
    tokens = {name: count * config.data.sequence_length for name, count in rows_a_run.items()}
    lines = [f"# {ablation.title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cells.get(column, "") for column in columns) + " |" for cells in table]
    flops = {row.name: row.flops_a_token * tokens[row.config_name()] for row in rows if row.flops_a_token}
    ledger = ", ".join(f"{name} {value / 1e12:.2f}" for name, value in flops.items())
    longer = "".join(f"; {name}: {ablation.rows[name].train.num_steps} steps" for name in ablation.own_length)
    lines += [
        "",
        f"- Quality: held-out bits per byte, mean over domains, mean ± standard deviation over {len(ablation.seeds)} "
        "seeds. Lower is better.",
        f"- Budget: {config.train.num_steps} steps of {config.train.batch_size} × {config.data.sequence_length} "
        f"positions = {tokens[ablation.baseline]:,} a run, the same tokens for every run{longer}.",
        f"- FLOP ledger (TFLOP a run, analytic, visible keys only): {ledger}.",
        f"- Smallest difference from the baseline this table could have seen (t-test, 5 %): {effect:.4f} bits/byte. "
        "The A/A row is the baseline with other seeds. Rows that do not differ are still told apart once in twenty "
        f"comparisons; here are {len(rows) - 1}.",
        "- MFLOP/token: of a training step; analytic, and counted in XLA's program with loops multiplied by their "
        "trips (it includes masked parts of blocks and recomputation). Tokens/s: median, from a pass that runs alone, "
        "rows in alternation, all experts in use.",
        f"- {environment_line()}",
        f"- Again: `{command}`",
        "",
    ]
    return "\n".join(lines)


def write_csv(ablation: Ablation, rows: list[Row], path: pathlib.Path) -> None:
    """One line a row and seed, numbers in full."""
    domains = sorted({domain for row in rows for domain in row.bits_per_byte})
    costs = ["parameters", "active_parameters", "flops_a_token", "hlo_flops_a_token", "peak_bytes", "tokens_per_second"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "bits_per_byte", *domains, *costs, "error"])
        for row in rows:
            quality = row.quality()
            for index, seed in enumerate(row.seeds):
                values = [row.bits_per_byte.get(domain, []) for domain in domains]
                known = [f"{v[index]:.6f}" if index < len(v) else "" for v in [quality, *values]]
                writer.writerow([row.name, seed, *known, *(getattr(row, cost) for cost in costs), row.error])


def plot(ablation: Ablation, rows: list[Row], path: pathlib.Path) -> None:
    """Left: training loss against tokens, mean over seeds. Right: held-out quality against FLOPs a token; by row where
    there are too many to label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows if row.curves and not row.error]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(4.2, 0.3 * len(drawn))), layout="constrained")
    colours = plt.get_cmap("tab10" if len(drawn) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    by_row = len(drawn) > 8
    for index, row in enumerate(drawn):
        cost = row.flops_a_token / 1e6
        colour = colours[index % len(colours)]
        curves = np.asarray(row.curves)  # [seeds, steps, 2]
        tokens, loss = curves[0, :, 0], _smooth(curves[:, :, 1].mean(axis=0))
        left.plot(tokens, loss, color=colour, label=row.name, linestyle="-" if index < len(colours) else "--")
        quality = row.quality()
        mean, spread = float(np.mean(quality)), float(np.std(quality, ddof=1)) if len(quality) > 1 else 0.0
        if by_row:
            right.errorbar(mean, index, xerr=spread, fmt="o", color=colour)
        else:
            right.errorbar(cost, mean, spread, fmt="o", color=colour)
            right.annotate(row.name, (cost, mean), xytext=(5, 5), textcoords="offset points", fontsize=8)
    left.set(xlabel="tokens", ylabel="training loss (nats/token)", title=ablation.title)
    if by_row:
        right.set(xlabel="held-out bits per byte", title="quality")
        right.set_yticks(range(len(drawn)), [row.name for row in drawn], fontsize=8)
        right.invert_yaxis()
    else:
        right.set(xlabel="training MFLOP per token", ylabel="held-out bits per byte", title="quality against cost")
        right.margins(x=0.25, y=0.2)
    left.legend(fontsize=8 if len(drawn) <= 10 else 6)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(values: np.ndarray, window: int = 5) -> np.ndarray:
    """Trailing mean over up to `window` steps."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    index = np.arange(1, len(values) + 1)
    start = np.maximum(index - window, 0)
    return (sums[index] - sums[start]) / (index - start)


def write_report(ablation: Ablation, rows: list[Row], workdir: pathlib.Path, name: str, command: str) -> str:
    """Writes `NAME.md`, `NAME.csv`, `NAME.png` and `rows.jsonl`, and `NAME_routing.png` if the table measures routing;
    returns the Markdown."""
    workdir.mkdir(parents=True, exist_ok=True)
    text = markdown(ablation, rows, command)
    if ablation.routing:
        text += "\n" + routing_report.markdown(rows, f"{name}_routing.png")
        routing_report.plot(rows, workdir / f"{name}_routing.png")
    (workdir / f"{name}.md").write_text(text)
    write_csv(ablation, rows, workdir / f"{name}.csv")
    plot(ablation, rows, workdir / f"{name}.png")
    write_rows(rows, workdir / "rows.jsonl")
    return text
