"""Trains, checks and decodes a tiny model of each cell of a cover: every option with every other one.

Example:
  .venv/bin/python experiments/combinations.py --cover=pairwise --workdir=/tmp/combinations

Cells that have passed are skipped: the same command goes on. Writes WORKDIR/combinations.md, a grid with ✓ or the
reason of a refusal (docs/results/combinations.md is one), and WORKDIR/cells.jsonl. --cover=once holds every value once.
"""

import importlib.metadata
import os
import pathlib
import sys

from absl import flags

from dsv3_jax.command_line import run

# These compile a tiny model's step in a quarter of the time. XLA reads them at its first use.
FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):  # later ones do not know the flag, and stop at it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

COVER = flags.DEFINE_enum("cover", "pairwise", ["once", "pairwise"], "What the cells hold: every value, or every pair.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the journal and the table.", required=True)


def main() -> None:
    """Flags -> one call."""
    from dsv3_jax.ablation.combinations_report import run_combinations

    command = f".venv/bin/python experiments/combinations.py --cover={COVER.value} --workdir=W"
    workdir = pathlib.Path(WORKDIR.value)
    try:
        outcomes = run_combinations(COVER.value, workdir, command)
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last finished cell")
        return
    failed = [outcome for outcome in outcomes if outcome.error]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} cells passed: {workdir / 'combinations.md'}")
    if failed:
        sys.exit("error: some cells failed; the table says which. The same command tries them again.")


if __name__ == "__main__":
    run(main)
