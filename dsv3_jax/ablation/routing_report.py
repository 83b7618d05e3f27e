"""The routing of an ablation's runs: a table and its plots."""

import pathlib
from collections.abc import Callable

import numpy as np

from dsv3_jax.ablation.runner import Row
from dsv3_jax.analysis.routing import RoutingRecord, entropy_share, max_over_mean, specialisation


def _cells(row: Row) -> dict[str, str]:
    """By column; means over layers and seeds."""

    def mean(measure: Callable[[RoutingRecord], np.ndarray | float]) -> float:
        return float(np.mean([np.mean(measure(record)) for record in row.routing]))

    cells = {"row": row.name}
    if row.routing:
        cells["entropy"] = f"{mean(lambda r: entropy_share(r.load_CLE.sum(axis=0), r.active_LE)):.3f}"
        for index, domain in enumerate(row.routing[0].domains):
            cells[f"entropy, {domain}"] = f"{mean(lambda r, i=index: entropy_share(r.load_CLE[i], r.active_LE)):.3f}"
        by_seed = [float(np.mean(specialisation(record.load_CLE))) for record in row.routing]
        spread = f" ± {np.std(by_seed, ddof=1):.3f}" if len(by_seed) > 1 else ""
        cells |= {
            "max/mean": f"{mean(lambda r: max_over_mean(r.load_CLE.sum(axis=0), r.active_LE)):.2f}",
            "specialisation": f"{np.mean(by_seed):.3f}{spread}",
            "mean k": f"{mean(RoutingRecord.mean_k):.2f}",
            "dropped": f"{mean(RoutingRecord.dropped):.2%}",
        }
        for index in range(len(row.routing[0].agreement_k)):
            cells[f"draft {index + 1}"] = f"{mean(lambda r, i=index: float(r.agreement_k[i])):.1%}"
    if row.active_units:
        cells["active units"] = f"{np.mean(row.active_units):.1%}"
    return cells


def markdown(rows: list[Row], picture: str) -> str:
    """The second table of a report, of rows that have a router or a unit gate."""
    table = [cells for row in rows if len(cells := _cells(row)) > 1]
    columns = list(dict.fromkeys(name for cells in table for name in cells))
    lines = ["## Routing", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cells.get(column, "") for column in columns) + " |" for cells in table]
    lines += [
        "",
        "- Of the trained models on held-out rows of each domain, means over layers and seeds; without noise or "
        "dropout.",
        "- Entropy: of the load over experts, over log E (1: balance). Max/mean: the largest load over the mean load. "
        "Both of the loads summed over domains, before any drop; E and the mean are those of active experts.",
        "- Specialisation: Jensen-Shannon divergence of the domains' loads over the log of their number (0: domains use"
        " experts alike; 1: no expert in common), ± standard deviation over seeds.",
        "- Mean k: experts a token uses. Dropped: of all assignments.",
    ]
    if any(name.startswith("draft") for name in columns):
        lines.append(
            "- Draft k: how often the best guess of multi-token prediction's module k is the main model's own, both "
            "given the text so far."
        )
    if "active units" in columns:
        lines.append("- Active units: share of the gated units that are on, in the last training steps.")
    return "\n".join([*lines, f"- Plots: `{picture}`, by layer and domain.", ""])


def plot(rows: list[Row], path: pathlib.Path) -> None:
    """Entropy and max/mean of each layer's load by domain; and how far the selection biases of each layer spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    routed = [row for row in rows if row.routing]
    size = (15, max(4.2, 0.32 * len(routed) + 1))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=size, layout="constrained")
    markers = "os^Dv<>P"
    for panel, measure, title in (
        (left, entropy_share, "entropy of load / log E"),
        (middle, max_over_mean, "max / mean load"),
    ):
        for index, row in enumerate(routed):
            record = row.routing[0]
            values_CL = np.mean([measure(r.load_CLE, r.active_LE) for r in row.routing], axis=0)
            for c, domain in enumerate(record.domains):
                for i, layer in enumerate(record.layers):
                    label = f"{domain}, {layer}"
                    known = label in panel.get_legend_handles_labels()[1]
                    style = {"color": f"C{c}", "marker": markers[i % len(markers)], "linestyle": "", "alpha": 0.8}
                    panel.plot(values_CL[c, i], index, label=None if known else label, **style)
        panel.set_yticks(range(len(routed)), [row.name for row in routed], fontsize=8)
        panel.invert_yaxis()
        panel.set(title=f"{title}, by domain and layer")
        panel.legend(fontsize=7)
    styles = ("-", "--", ":", "-.")
    moved = [row for row in routed if row.bias_paths and np.any(np.asarray(row.bias_paths))]
    colours = plt.get_cmap("tab10" if len(moved) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    for index, row in enumerate(moved):
        paths_LN = np.mean(row.bias_paths, axis=0)
        for i, path_N in enumerate(paths_LN):
            style = styles[i % len(styles)]
            label = row.name if i == 0 else None
            right.plot(row.steps, path_N, style, color=colours[index % len(colours)], label=label, linewidth=1)
    right.set(title="selection biases (dashed: later layers)", xlabel="step", ylabel="standard deviation")
    if moved:
        right.set_yscale("log")
        right.legend(fontsize=7)
    for panel in (left, middle, right):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
