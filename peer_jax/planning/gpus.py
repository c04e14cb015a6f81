"""What XLA's compiler must know about GPUs that this machine lacks."""

import importlib.util
import os
import shutil

from peer_jax.planning.capacity import DEVICES

KINDS = tuple(kind for kind in DEVICES if not kind.startswith("tpu-"))


def target(kind: str) -> str:
    """The fields of XLA's GpuTargetConfigProto that the compiler reads, for one of ``KINDS``."""
    device = DEVICES[kind]
    name = f"NVIDIA {kind.upper()}"
    return f"""
gpu_device_info {{
  name: "{name}"  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  threads_per_warp: 32
  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  l2_cache_size: 52428800  memory_bandwidth: {device.bandwidth:.0f}  device_memory_size: {device.memory:.0f}
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def ptxas_folder() -> str | None:
    """The folder of the assembler ``ptxas``, on the path or in pip's wheel nvidia-cuda-nvcc; None if there is none."""
    if (found := shutil.which("ptxas")) is not None:
        return os.path.dirname(found)
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        return None
    folders = [os.path.join(folder, "bin") for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((folder for folder in folders if os.path.exists(os.path.join(folder, "ptxas"))), None)
