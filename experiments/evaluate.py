"""Measures held-out bits per byte of a run, by domain, and writes WORKDIR/eval.json.

Example:
  .venv/bin/python experiments/evaluate.py --workdir=/tmp/tiny

A run trained on a mesh is measured on another with --config.mesh.AXIS=SIZE.
"""

import json
import pathlib

from absl import flags

from dsv3_jax.command_line import load_config, run

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)
ROWS = flags.DEFINE_integer("rows", None, "Rows a domain, spread evenly. Default: all.", lower_bound=1)


def main() -> None:
    """Flags -> config -> one call."""
    from dsv3_jax.data.pipeline import load_dataset
    from dsv3_jax.evaluation.bits_per_byte import evaluate
    from dsv3_jax.sharding import make_mesh
    from dsv3_jax.training.checkpoints import restore_run, run_config
    from dsv3_jax.training.loop import check_data
    from dsv3_jax.training.step import Trainer

    run_config(WORKDIR.value)  # says so if there is no run
    config = load_config(f"{WORKDIR.value}/config.json")
    trainer = Trainer(config, make_mesh(config.mesh))
    variables, step = restore_run(WORKDIR.value, trainer)
    dataset = load_dataset(config.data, config.model.vocab_size)
    check_data(pathlib.Path(WORKDIR.value), dataset, "tokenizer", "documents")
    measured = evaluate(config, variables, dataset, trainer.mesh, ROWS.value)
    result = {"step": step, "domains": {name: value._asdict() for name, value in measured.items()}}
    path = pathlib.Path(WORKDIR.value) / "eval.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"step {step}")
    for name, value in measured.items():
        print(f"{name:12} {value.bits_per_byte:.4f} bits/byte  {value.loss:.4f} nats/token  {value.bytes:,} bytes")


if __name__ == "__main__":
    run(main)
