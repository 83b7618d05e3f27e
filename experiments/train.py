"""Trains a model, or resumes the run that is in --workdir.

Example:
  .venv/bin/python experiments/train.py --config=configs/tiny.py --workdir=/tmp/tiny
  .venv/bin/python experiments/train.py --config=configs/tiny.py --workdir=/tmp/windowed \\
      --config.model.attention.pattern=windowed --config.model.attention.pattern.window=128

Any field of the config can be set with --config.PATH=VALUE. Ctrl-C and SIGTERM save and exit; the same command resumes.
"""

import sys

from absl import flags

from dsv3_jax.command_line import load_config, run

CONFIG = flags.DEFINE_string("config", None, "A file with get_config(), or a run's config.json.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: new, or one to resume.", required=True)
INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "What a new run takes its weights from: another run's workdir, a Hugging Face folder, a .gguf file, or smollm2.",
)


def main() -> None:
    """Flags -> config -> one call."""
    config = load_config(CONFIG.value)
    from dsv3_jax.training.loop import TrainingError, train

    try:
        result = train(config, WORKDIR.value, init_from=INIT_FROM.value)
    except TrainingError as error:
        sys.exit(f"error: {error}")
    print(f"{'finished' if result.finished else 'stopped'} at step {result.step}; run in {WORKDIR.value}")


if __name__ == "__main__":
    run(main)
