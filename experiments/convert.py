"""Converts a Hugging Face checkpoint into a run's folder, or a run into a Hugging Face checkpoint.

Example:
  .venv/bin/python experiments/convert.py --from_hf=/models/DeepSeek-V3 --workdir=/tmp/v3
  .venv/bin/python experiments/convert.py --workdir=/tmp/tiny --to_hf=/tmp/tiny_hf

Tensors stream one by one: memory stays below twice the largest file. An interrupted --from_hf goes on with the same
command. The folder works with evaluate.py and train.py --init_from, and with generate.py as the checkpoint itself does:
its tokenizer comes along, both ways.
"""

import sys
import time

from absl import flags

from dsv3_jax.command_line import run
from dsv3_jax.config import DTYPES, ConfigError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run; new with --from_hf.", required=True)
FROM_HF = flags.DEFINE_string("from_hf", None, "Folder with config.json and safetensors.")
TO_HF = flags.DEFINE_string("to_hf", None, "New folder for config.json and safetensors.")
DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "With --from_hf, of the weights. Default: the checkpoint's own.")
MAX_SHARD_MB = flags.DEFINE_integer("max_shard_mb", 5000, "With --to_hf, size of a file.", lower_bound=1)


class Progress:
    """One line with bytes, rate and time left; rewritten in place on a terminal, else printed every ten seconds."""

    def __init__(self):
        self._begin, self._first, self._last = 0.0, None, 0.0

    def show(self, done: int, total: int) -> None:
        """Shows how far it is."""
        now, live = time.monotonic(), sys.stdout.isatty()
        if self._first is None:
            self._begin, self._first, self._last = now, done, now
            return
        if not live and done < total and now - self._last < 10:
            return
        self._last = now
        rate = max(done - self._first, 1) / max(now - self._begin, 1e-3)
        left = int((total - done) / rate)
        line = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB  {rate / 1e6:.0f} MB/s  {left // 60}:{left % 60:02d} left"
        print(f"\r{line}\033[K" if live else line, end="" if live and done < total else "\n", flush=True)


def main() -> None:
    """Flags -> one call."""
    from dsv3_jax.training.conversion import from_hf, to_hf

    if (FROM_HF.value is None) == (TO_HF.value is None):
        raise ConfigError("give one of --from_hf=DIR and --to_hf=DIR")
    progress = Progress()
    if FROM_HF.value is not None:
        from_hf(FROM_HF.value, WORKDIR.value, DTYPE.value, progress.show)
        print(f"converted {FROM_HF.value}; run in {WORKDIR.value}")
    if TO_HF.value is not None:
        to_hf(WORKDIR.value, TO_HF.value, MAX_SHARD_MB.value * 1_000_000, progress.show)
        print(f"converted {WORKDIR.value}; checkpoint in {TO_HF.value}")


if __name__ == "__main__":
    run(main)
