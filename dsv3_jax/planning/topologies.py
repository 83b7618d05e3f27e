"""Compilers for machines that are not here: programs are compiled for a TPU by its own compiler, on any CPU."""

import importlib.util
import os

from dsv3_jax.config import ConfigError

# Chips of each type in the topology that is asked for where only the type is named.
DEFAULT_SHAPES = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}


def prepare_tpu_compiler(name: str) -> None:
    """Sets what the compiler reads from the environment. Before jax is imported, once a process.

    Args:
      name: as `tpu_topology` takes it.

    Raises:
      ConfigError: libtpu is not installed, or the type is not known.
    """
    kind = name.split(":")[0]
    if kind not in DEFAULT_SHAPES:
        raise ConfigError(f"topology {name!r}: known types are {', '.join(DEFAULT_SHAPES)}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
    accelerator = {"tpu7x": "tpu7x-8"}.get(kind, f"{kind}-8")
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is touched: several processes may compile
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_PLATFORMS": "cpu",
    }


def tpu_topology(name: str):
    """The devices of "v5p:4x4x4", or of "v5p", a few chips of the type: programs can be compiled for a mesh of them.

    `prepare_tpu_compiler` comes first.
    """
    from jax.experimental import topologies

    kind, _, shape = name.partition(":")
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape or DEFAULT_SHAPES[kind]}")
