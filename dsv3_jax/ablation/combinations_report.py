"""Runs the cells of a cover, one after another and resumable, and writes the grid."""

import dataclasses
import itertools
import json
import pathlib
import sys
import time

import jax

from dsv3_jax.ablation.cell_checks import TOLERANCE, check_cell
from dsv3_jax.ablation.combinations import AXES, Cell, Option, cover, default_cell, make_config, options, refused_pairs
from dsv3_jax.ablation.report import environment_line

COVERS = {"once": 1, "pairwise": 2}
JOURNAL = "cells.jsonl"


@dataclasses.dataclass
class Outcome:
    """One cell that ran. error: what it failed with, "" if it passed; no_cache: why it cannot decode; the rest as
    `cell_checks.Checked`."""

    cell: Cell
    seconds: float
    error: str = ""
    losses: list[float] = dataclasses.field(default_factory=list)
    changed: float | None = None
    decoded: float | None = None
    no_cache: str | None = None


def run_cell(cell: Cell) -> Outcome:
    """Checks one cell; whatever goes wrong is its error."""
    start = time.perf_counter()
    try:
        checked = check_cell(make_config(cell))
    except Exception as error:  # whatever it is, the other cells go on and the table says so
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome(cell, time.perf_counter() - start, text)
    return Outcome(cell, time.perf_counter() - start, "", *checked)


def run_cells(cells: list[Cell], workdir: pathlib.Path) -> list[Outcome]:
    """Outcomes of all cells, in order. Those that passed before, by the journal in `workdir`, are not run again."""
    workdir.mkdir(parents=True, exist_ok=True)
    path, known = workdir / JOURNAL, {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        outcome = Outcome(**json.loads(line))
        known[json.dumps(outcome.cell)] = outcome
    before = {key: outcome for key, outcome in known.items() if not outcome.error}
    missing = [cell for cell in cells if json.dumps(cell) not in before]
    start = time.perf_counter()
    with path.open("a") as journal:
        for done, cell in enumerate(missing, 1):
            outcome = run_cell(cell)
            jax.clear_caches()  # no other cell has its programs
            before[json.dumps(cell)] = outcome
            journal.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            journal.flush()
            left = (time.perf_counter() - start) / done * (len(missing) - done)
            print(
                f"{done} of {len(missing)}, {left / 60:.0f} min left: {describe(cell)}: {verdict(outcome)}", flush=True
            )
    return [before[json.dumps(cell)] for cell in cells]


def describe(cell: Cell) -> str:
    """A cell by what is not at its first value."""
    default = default_cell()
    return "; ".join(f"{axis} {name}" for axis, name in cell.items() if default[axis] != name) or "all first values"


def verdict(outcome: Outcome) -> str:
    """What became of a cell, in a few words."""
    if outcome.error:
        return f"FAILED: {outcome.error}"
    decoding = "no cache" if outcome.decoded is None else f"decoding {outcome.decoded:.0e}"
    return f"loss {outcome.losses[0]:.3f} → {outcome.losses[-1]:.3f}, {decoding}, {outcome.seconds:.0f} s"


def _pairs(outcomes: list[Outcome], passed: bool) -> set[frozenset[Option]]:
    """Pairs of values that cells hold, and the values themselves."""
    held = set()
    for outcome in outcomes:
        if bool(outcome.error) != passed:
            held |= {frozenset(pair) for pair in itertools.combinations_with_replacement(outcome.cell.items(), 2)}
    return held


def grid(outcomes: list[Outcome], refused: dict[frozenset[Option], str]) -> tuple[list[str], list[str]]:
    """Lines of the table, values × values below the diagonal, and the reasons that its numbers stand for."""
    passed, failed = _pairs(outcomes, True), _pairs(outcomes, False)
    reasons, everything = list(dict.fromkeys(refused.values())), options()

    def mark(row: Option, column: Option) -> str:
        pair = frozenset((row, column))
        if pair in refused:
            return str(reasons.index(refused[pair]) + 1)
        if row[0] == column[0] and row != column:
            return ""
        return "✗" if pair in failed else "✓" if pair in passed else "·"

    lines = [
        "| axis | value | | " + " | ".join(str(i + 1) for i in range(len(everything))) + " |",
        "|---" * (len(everything) + 3) + "|",
    ]
    for number, row in enumerate(everything):
        axis = row[0] if row[1] == next(iter(AXES[row[0]])) else ""
        marks = [mark(row, column) for column in everything[: number + 1]]
        marks += [""] * (len(everything) - len(marks))
        lines.append(f"| {axis} | {row[1]} | {number + 1} | " + " | ".join(marks) + " |")
    return lines, reasons


def markdown(outcomes: list[Outcome], kind: str, command: str) -> str:
    """The whole page."""
    refused = refused_pairs()
    lines, reasons = grid(outcomes, refused)
    failures = [outcome for outcome in outcomes if outcome.error]
    no_cache = list(dict.fromkeys(outcome.no_cache for outcome in outcomes if outcome.no_cache))
    decoded = sum(outcome.decoded is not None for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    held = "every value at least once"
    if COVERS[kind] == 2:
        held = "every accepted pair of values, and every pair of values that have a cache in a cell that decodes"
    page = [
        "# Combinations",
        "",
        f"{len(outcomes)} cells, each one value of all {len(AXES)} axes, hold {held}. A cell is a tiny"
        " model that is trained for two updates on a repeated batch and then looked at; it passes if",
        "",
        "- every loss term is finite, none that is on is zero, and the loss falls (warming up: the indexer's);",
        "- other tokens from the middle on change no logits before them, nor what a multi-token-prediction module gives"
        " before it sees them;",
        "- prompts of two lengths by one call, then token by token with a cache, give the logits of the whole text at"
        " once.",
        "",
        f"Tolerances are relative to the largest logit: float32 {TOLERANCE['float32']:.0e}, for sums in another order;"
        f" bfloat16 {TOLERANCE['bfloat16']:.0e} for three tokens of four, as a choice of experts, keys or units between"
        " two that are equal to rounding may fall otherwise.",
        "",
        f"**{len(outcomes) - len(failures)} of {len(outcomes)} passed**, {decoded} of them decoded with a cache;"
        f" {len(refused)} pairs are refused. {seconds:.0f} s in all.",
        "",
        "✓ in a cell that passed; ✗ in a cell that failed; a number: refused, with that error; · in no cell.",
        "",
        *lines,
        "",
        "Refused when the config is built:",
        "",
        *(f"{number}. `{reason}`" for number, reason in enumerate(reasons, 1)),
        "",
        "Trained, and refused by `make_cache`:",
        "",
        *(f"- `{reason}`" for reason in no_cache),
        "",
        *(["Failed:", ""] if failures else []),
        *(f"- {describe(outcome.cell)}: `{outcome.error}`" for outcome in failures),
        *([""] if failures else []),
        f"{environment_line()}",
        "",
        f"Again: `{command}`",
        "",
        "## Cells",
        "",
        "What is not named is at the first value of its axis.",
        "",
        *(f"{number}. {describe(outcome.cell)}: {verdict(outcome)}" for number, outcome in enumerate(outcomes, 1)),
        "",
    ]
    return "\n".join(page)


def run_combinations(kind: str, workdir: pathlib.Path, command: str) -> list[Outcome]:
    """Runs a cover, writes `workdir/combinations.md`, and returns what became of each cell."""
    cells = cover(COVERS[kind])
    print(f"{len(cells)} cells, journal in {workdir / JOURNAL}", file=sys.stderr, flush=True)
    outcomes = run_cells(cells, workdir)
    (workdir / "combinations.md").write_text(markdown(outcomes, kind, command))
    return outcomes
