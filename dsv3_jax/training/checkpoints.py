"""Checkpoints of state and data position, behind one thin adapter to Orbax (whose v1 API may still move)."""

import pathlib
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dsv3_jax.config import Config, ConfigError, MeshConfig, ModelConfig, load
from dsv3_jax.interop.huggingface import flat, nested
from dsv3_jax.interop.weight_folder import has_weights, open_weights
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.step import Trainer, TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run: `variables` (params and selection bias), `optimizer`, and the data iterator."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        self._folder = (workdir / FOLDER).resolve()
        self._inner = ocp.training.Checkpointer(
            str(self._folder),
            preservation_policy=cast(Any, ocp.training.preservation_policies.LatestN(keep)),
            cleanup_tmp_directories=True,
        )
        self._pending: Any = None

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        latest = self._inner.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, iterator: Any) -> None:
        """Writes a checkpoint of `state.step`, in the background where the device has its own memory."""
        self.wait()
        step = int(state.step)
        if self.latest_step() == step:
            return
        optimizer = {"step": state.step, "opt_state": state.opt_state}
        parts = {"variables": state.variables(), "optimizer": optimizer, "data": iterator}
        self._pending = self._inner.save_checkpointables_async(step, parts, force=True)
        if jax.default_backend() == "cpu":
            self.wait()  # the host copy may be the very buffer that the next step is given to reuse

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises what went wrong with it (a full disk shows up only here)."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, trainer: Trainer, iterator: Any, seed: int) -> TrainState:
        """The newest state of the run of that seed, on the trainer's mesh; moves `iterator` to where it was."""
        abstract = trainer.abstract_state()
        optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
        parts = {"variables": abstract.variables(), "optimizer": optimizer, "data": iterator}
        loaded = self._inner.load_checkpointables(self.latest_step(), parts)
        return TrainState(
            step=loaded["optimizer"]["step"],
            seed=jax.device_put(np.uint32(seed), abstract.seed.sharding),
            params=loaded["variables"]["params"],
            selection_bias=loaded["variables"]["selection_bias"],
            opt_state=loaded["optimizer"]["opt_state"],
        )

    def restore_variables(self, abstract: Any) -> Any:
        """The newest params and selection bias, without optimizer state."""
        return self._inner.load_checkpointables(self.latest_step(), {"variables": abstract})["variables"]

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and dtype of the newest params and selection bias, read from its metadata."""
        metadata = ocp.metadata(str(self._folder / str(self.latest_step())), "variables").metadata
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat(metadata).items()}

    def restore_part(self, abstract: Any) -> Any:
        """Some of the newest params and selection bias: those that are in `abstract`."""
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return self._inner.load_checkpointables(self.latest_step(), {"variables": abstract})["variables"]

    def read_leaf(self, path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """One of `leaves`, on the host."""
        return flat(self.restore_part(nested({path: np.empty(leaf.shape, leaf.dtype)})))[path]

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()
        self._inner.close()


def run_config(workdir: str | pathlib.Path) -> Config:
    """The resolved config of a run. Raises `ConfigError` if there is no run."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"--workdir={workdir}: holds no run (no config.json); train one with experiments/train.py")
    return load(str(path))


def has_checkpoint(workdir: str | pathlib.Path) -> bool:
    """Whether a run has saved any."""
    folder = pathlib.Path(workdir) / FOLDER
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def open_checkpoints(workdir: str | pathlib.Path) -> Checkpoints:
    """The checkpoints of a run, at least one. Raises `ConfigError` if there is none."""
    if (pathlib.Path(workdir) / FOLDER).is_dir():
        checkpoints = Checkpoints(pathlib.Path(workdir), 1)
        if checkpoints.latest_step() is not None:
            return checkpoints
        checkpoints.close()
    raise ConfigError(f"--workdir={workdir}: holds no checkpoint yet; train further with experiments/train.py")


def restore_run(workdir: str | pathlib.Path, trainer: Trainer) -> tuple[Any, int]:
    """Variables of a run's newest checkpoint on the trainer's mesh, and their step; or of converted weights, step 0.

    Raises:
      ConfigError: there is neither, or a conversion has not been finished.
    """
    abstract = trainer.abstract_state().variables()
    if has_weights(workdir):
        return place(open_weights(workdir).open("r"), abstract), 0
    checkpoints = open_checkpoints(workdir)
    variables, step = checkpoints.restore_variables(abstract), checkpoints.latest_step()
    checkpoints.close()
    assert step is not None
    return variables, step


def place(leaves: Mapping[str, np.ndarray], abstract: Any) -> Any:
    """Arrays of the shapes, dtypes and shardings of `abstract`; each device reads its part of each leaf only."""

    def leaf(path: str, x: jax.ShapeDtypeStruct) -> jax.Array:
        def part(index):
            return np.asarray(leaves[path][index], x.dtype)

        return jax.make_array_from_callback(x.shape, x.sharding, part)

    return nested({path: leaf(path, x) for path, x in flat(abstract).items()}) | {
        name: {} for name, tree in abstract.items() if not tree
    }


def restore(workdir: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Model config and variables of a trained run, on one device: `Transformer(config).apply(variables, tokens)`.

    Converted weights are mapped from their files, in their own dtypes, and read when they are used.
    """
    config = run_config(workdir)
    if has_weights(workdir):
        return config.model, nested(open_weights(workdir).open("r"))
    config.mesh = MeshConfig()
    variables, _ = restore_run(workdir, Trainer(config, make_mesh(config.mesh)))
    return config.model, jax.tree.map(np.asarray, variables)
