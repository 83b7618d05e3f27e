"""Runs an ablation table: configs/ablations/NAME.py, every row with every seed, then the report.

Example:
  .venv/bin/python experiments/ablate.py --table=attention --workdir=/tmp/attention

Finished runs are skipped, an interrupted one is resumed: the same command goes on. --config.PATH=VALUE sets a field of
every row (or, in a table that trains nothing, of the table). Writes WORKDIR/NAME.md, NAME.csv, NAME.png and rows.jsonl,
and NAME_routing.png where a table measures routing (each run's folder then has routing.json).
"""

import pathlib
import shlex
import sys

from absl import flags

from dsv3_jax.command_line import config_overrides, run
from dsv3_jax.config import ConfigError, PretrainedAblation, load_ablation

TABLES = pathlib.Path(__file__).resolve().parent.parent / "configs" / "ablations"
TABLE = flags.DEFINE_string("table", None, "A file of configs/ablations, without .py.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the table's runs and report.", required=True)


def main() -> None:
    """Flags -> ablation -> one call."""
    path = TABLES / f"{TABLE.value}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TABLES.glob("*.py")))
        raise ConfigError(f"--table={TABLE.value}: no such table; there are: {known}")
    overrides = config_overrides()
    ablation = load_ablation(str(path), overrides)
    from dsv3_jax.ablation import pretrained, pretrained_report, report, runner

    settings = "".join(f" --config.{name}={shlex.quote(value)}" for name, value in overrides)
    command = f".venv/bin/python experiments/ablate.py --table={TABLE.value} --workdir=W{settings}"
    workdir = pathlib.Path(WORKDIR.value)
    if isinstance(ablation, PretrainedAblation):
        try:
            cells = pretrained.run_pretrained(ablation, workdir)
        except KeyboardInterrupt:
            print("stopped; the same command goes on after the last finished cell")
            return
        print(pretrained_report.write_report(ablation, cells, workdir, TABLE.value, command))
        return
    try:
        rows = runner.run_ablation(ablation, workdir)
    except runner.Interrupted as stop:
        print(stop)
        return
    except KeyboardInterrupt:  # between two runs
        print("stopped; the same command goes on after the last finished run")
        return
    print(report.write_report(ablation, rows, workdir, TABLE.value, command))
    if any(row.error for row in rows):
        sys.exit("error: some runs failed; the table says which. The same command tries them again.")


if __name__ == "__main__":
    run(main)
