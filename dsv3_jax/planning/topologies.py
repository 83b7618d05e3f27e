"""Compilers for machines that are not here: programs are compiled for a TPU or GPU by its own compiler, on any CPU."""

import importlib.util
import os
import pathlib
import sys

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


# XLA's description of the GPUs that programs can be compiled for (its `GpuTargetConfigProto`, in text).
GPUS = {
    "h100": """
        gpu_device_info {
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
          shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
          registers_per_block_limit: 65536
        }
        platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 patch: 0 }
        device_description_str: "NVIDIA H100 80GB HBM3"
    """
}
CUDA_FOLDER = pathlib.Path(sys.prefix) / "cuda"  # where `make peers` puts the compiler, out of the way of jax


def has_gpu_compiler() -> bool:
    """Whether the compiler for GPUs is installed, beside jax or in CUDA_FOLDER."""
    return (CUDA_FOLDER / "jax_cuda13_plugin").exists() or importlib.util.find_spec("jax_cuda13_plugin") is not None


def prepare_gpu_compiler(name: str, dump_ptx: bool = False) -> None:
    """Sets what the compiler reads from the environment. Before jax is imported, once a process.

    Args:
      name: as `gpu_topology` takes it.
      dump_ptx: Pallas prints each kernel's PTX, beside what the assembler says of its registers.

    Raises:
      ConfigError: the compiler is not installed, or the GPU is not known.
    """
    kind = name.split(":")[0]
    if kind not in GPUS:
        raise ConfigError(f"topology {name!r}: known GPUs are {', '.join(GPUS)}")
    if not has_gpu_compiler():
        raise ConfigError("compiling for a GPU needs jax's CUDA plug-in and ptxas: make peers")
    if CUDA_FOLDER.exists():
        sys.path.insert(0, str(CUDA_FOLDER))
    tools = [pathlib.Path(path) / "nvidia" / "cu13" for path in sys.path]
    tool_flags = [f"--xla_gpu_cuda_data_dir={path}" for path in tools if path.exists()][:1]
    flags = " ".join([os.environ.get("XLA_FLAGS", ""), *tool_flags, "--xla_gpu_autotune_level=0"])
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "MOSAIC_GPU_DUMP_PTXAS": "1"}
    if dump_ptx:
        os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"


def gpu_topology(name: str):
    """The devices of "h100:1x2x8" (slices × hosts × GPUs of a host), or of "h100", one: programs can be compiled for a
    mesh of them.

    `prepare_gpu_compiler` comes first.
    """
    from jax.experimental import topologies

    kind, _, shape = name.partition(":")
    return topologies.get_topology_desc(platform="cuda", target_config=GPUS[kind], topology=shape or "1x1x1")


def on_one_device(topology):
    """The sharding of arrays of a program for the first device of a topology alone."""
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
