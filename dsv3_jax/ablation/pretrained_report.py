"""The table of a pretrained ablation: Markdown, CSV and a plot."""

import csv
import math
import pathlib
from typing import NamedTuple

import numpy as np

from dsv3_jax.ablation.pretrained import Cell
from dsv3_jax.ablation.report import environment_line
from dsv3_jax.config import PretrainedAblation


class Kept(NamedTuple):
    """perplexity, and the baseline's over it (1: all is kept); margin: two standard errors of that share."""

    perplexity: float
    share: float
    margin: float


def kept(cell: Cell, baseline: Cell, domain: str) -> Kept:
    """Of one domain. The error is that of the mean difference between the two on the same contexts, paired."""
    ours, theirs = np.asarray(cell.nats[domain]), np.asarray(baseline.nats[domain])
    difference = theirs - ours  # nats
    share = math.exp(difference.mean())
    return Kept(math.exp(ours.mean()), share, 2 * share * difference.std(ddof=1) / math.sqrt(len(difference)))


def markdown(ablation: PretrainedAblation, cells: list[Cell], command: str) -> str:
    """A table a context length, longest first, with what is needed to read it."""
    by_place = {(cell.row, cell.context): cell for cell in cells}
    domains = list(cells[0].nats)
    lines = [f"# {ablation.title}", ""]
    for context in sorted(ablation.contexts, reverse=True):
        baseline = by_place[ablation.baseline, context]
        columns = ["row", *(f"{d}: {what}" for d in domains for what in ("perplexity", "kept"))]
        columns += ["MFLOP/token", "cache MiB", "temporary MiB (XLA)"]
        lines += [f"## Context {context}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for name in ablation.rows:
            cell, entries = by_place[name, context], [name]
            for domain in domains:
                value = kept(cell, baseline, domain)
                margin = f" ± {value.margin:.1%}" if cell is not baseline else ""
                entries += [f"{value.perplexity:.2f}", f"{value.share:.1%}{margin}"]
            entries += [
                f"{cell.flops_a_token / 1e6:.0f}",
                f"{cell.cache_bytes / 2**20:.2f}",
                f"{cell.temporary_bytes / 2**20:.0f}",
            ]
            lines.append("| " + " | ".join(entries) + " |")
        lines.append("")
    repeat = [by_place[ablation.repeat, context] for context in ablation.contexts]
    gaps = [
        abs(kept(cell, by_place[ablation.baseline, cell.context], domain).share - 1)
        for cell in repeat
        for domain in domains
    ]
    lines += [
        f"- Model: {ablation.model}, as published; its attention is replaced row by row, nothing is trained. It may "
        "have seen these texts in its own training; rows are compared with each other.",
        f"- {ablation.tokens:,} tokens of held-out documents a domain and cell, the same text in every cell; "
        "perplexity of the second half of each context; positions begin anew with each context.",
        "- Kept: the baseline's perplexity over the row's, ± two standard errors of the paired difference over "
        "contexts (above 100 %: better than the baseline).",
        f"- The baseline by another program ({ablation.repeat}): what is kept differs by at most {max(gaps):.2%}.",
        "- MFLOP/token: forward, analytic, visible keys only. Cache: keys and values that decoding keeps at this "
        "length, in the compute dtype. Temporary: of the compiled forward pass of one context.",
        f"- {environment_line()}",
        f"- Again: `{command}`",
        "",
    ]
    return "\n".join(lines)


def write_csv(cells: list[Cell], path: pathlib.Path) -> None:
    """One line a row, context and domain."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        costs = ["flops_a_token", "cache_bytes", "temporary_bytes"]
        writer.writerow(["row", "context", "domain", "nats", "perplexity", "contexts", *costs])
        for cell in cells:
            for domain, values in cell.nats.items():
                mean = float(np.mean(values))
                numbers = [f"{mean:.6f}", f"{math.exp(mean):.4f}", len(values)]
                writer.writerow([cell.row, cell.context, domain, *numbers, *(getattr(cell, cost) for cost in costs)])


def plot(ablation: PretrainedAblation, cells: list[Cell], path: pathlib.Path) -> None:
    """What is kept against context length, one panel a domain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_place = {(cell.row, cell.context): cell for cell in cells}
    domains, contexts = list(cells[0].nats), sorted(ablation.contexts)
    figure, panels = plt.subplots(1, len(domains), figsize=(6 * len(domains), 4.6), layout="constrained", sharey=True)
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for panel, domain in zip(np.atleast_1d(panels), domains, strict=True):
        for index, name in enumerate(ablation.rows):
            values = [kept(by_place[name, n], by_place[ablation.baseline, n], domain) for n in contexts]
            panel.errorbar(
                contexts,
                [100 * value.share for value in values],
                [100 * value.margin for value in values],
                color=colours[index % len(colours)],
                marker="o",
                markersize=3,
                label=name,
            )
        panel.set(xlabel="context length", title=domain, xscale="log", xticks=contexts, xticklabels=contexts)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    np.atleast_1d(panels)[0].set_ylabel("perplexity kept (%)")
    figure.legend(*np.atleast_1d(panels)[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(
    ablation: PretrainedAblation, cells: list[Cell], workdir: pathlib.Path, name: str, command: str
) -> str:
    """Writes `NAME.md`, `NAME.csv` and `NAME.png`, and `rows.jsonl`; returns the Markdown."""
    text = markdown(ablation, cells, command)
    (workdir / f"{name}.md").write_text(text)
    write_csv(cells, workdir / f"{name}.csv")
    plot(ablation, cells, workdir / f"{name}.png")
    # One object a cell, as the folder's journal has them after its first line.
    lines = (workdir / "cells.jsonl").read_text().splitlines(keepends=True)
    (workdir / "rows.jsonl").write_text("".join(lines[1:]))
    return text
