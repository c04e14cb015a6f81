"""Compiles expert_mix and value_bag for an H200 without a GPU; prints a roofline of their kernels.

python scripts/compile_h200.py              every program
python scripts/compile_h200.py xla bf16     the programs whose names contain all of these words

The table has, for each kernel, its registers, its shared memory, how many of its blocks share a multiprocessor, the
bytes that it asks of memory (``peer_jax.ops.mosaic_gpu.copies``, with uniformly drawn indices), and the time that these
bytes take at the bandwidth of an H100 and an H200. Rows that come from the L2 cache can be faster. The floor is that of
the pass (``peer_jax.ops.floor``), in token and in expert order.

The exit status is 0 if all programs keep the limits, 1 if one breaks a limit, and 2 if something to compile with is
missing. The script shows that the kernels compile for sm_90a at full size, but not that they run, nor how fast.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_jax.planning import gpus
from peer_jax.planning.capacity import DEVICES

MAX_REGISTERS = 128  # per thread: these sizes take 48 to 126; above 255, ptxas spills
MAX_SHARED = 227 * 2**10  # bytes per block, on sm_90
MAX_TEMPORARY = 0.10  # as a fraction of inputs and outputs


@dataclasses.dataclass(frozen=True)
class Program:
    """The forward pass of an op, or both passes. ``rows`` is the type of the tables, ``dtype`` the type of all else."""

    op: str
    implementation: str
    direction: str
    dtype: str
    rows: str
    t: int
    d: int
    N: int
    r: int

    @property
    def name(self) -> str:
        types = self.dtype if self.dtype == self.rows else f"{self.dtype}, rows {self.rows}"
        sizes = f"T={self.t} d={self.d} N={self.N} hk={self.r}"
        return f"{self.op} {self.implementation} {self.direction} {types} {sizes}".replace("float", "fp").replace(
            "bfp", "bf"
        )


SIZES = {
    "expert_mix": [(32768, 768, 1024**2, 128), *((4096, 1024, N, 32) for N in (1024, 16384, 65536))],
    "value_bag": [(32768, 768, 1024**2, 256), (4096, 1024, 1024, 32)],
}
TYPES = [("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "float32")]  # the last is mixed precision
PROGRAMS = [
    Program(op, implementation, direction, *types, *sizes)
    for op, implementation in itertools.product(SIZES, ("mosaic_gpu", "xla"))
    for sizes, types, direction in itertools.product(SIZES[op], TYPES, ("forward", "forward+backward"))
]


def missing() -> str | None:
    """One sentence that says what to install, or None if nothing is missing."""
    version = importlib.metadata.version("jax")
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found != version:
            has = f"version {found} of it is installed" if found else "it is not installed"
            return f"Compiling for CUDA needs {package}, but {has}: pip install {package}=={version}"
    if gpus.ptxas_folder() is None:
        return "Compiling for CUDA needs ptxas: install the CUDA 13 toolkit, or pip install nvidia-cuda-nvcc"
    return None


def compile_here(program: Program) -> dict:
    """Compiles the program in this process and returns its bytes. The compiler prints facts about kernels."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from peer_jax.ops import expert_mix, mosaic_gpu, value_bag
    from peer_jax.sharding import compiled_for

    def bag(values, gates, indices):
        if program.implementation == "mosaic_gpu":
            return mosaic_gpu.value_bag(values, indices, gates)
        indices, gates = (a.reshape(program.t, -1, 16) for a in (indices, gates))
        return value_bag(values, indices, gates, implementation=program.implementation)

    def mix(x, down, up, gates, indices):
        if program.implementation == "mosaic_gpu":
            return mosaic_gpu.expert_mix(x, down, up, indices, gates, jax.nn.gelu)
        indices, gates = (a.reshape(program.t, -1, 16) for a in (indices, gates))
        return expert_mix(x, down, up, indices, gates, jax.nn.gelu, implementation=program.implementation)

    def both(*arguments):
        *primals, indices, dy = arguments
        y, pullback = jax.vjp(lambda *primals: op(*primals, indices), *primals)
        return y, pullback(dy)

    x = jax.ShapeDtypeStruct((program.t, program.d), program.dtype)
    table = jax.ShapeDtypeStruct((program.N, program.d), program.rows)
    gates = jax.ShapeDtypeStruct((program.t, program.r), program.dtype)
    indices = jax.ShapeDtypeStruct(gates.shape, jnp.int32)
    topology = topologies.get_topology_desc(platform="cuda", target_config=gpus.target("h200"), topology="1x1x1")
    sharding = SingleDeviceSharding(topology.devices[0])
    op, tables = (mix, (x, table, table)) if program.op == "expert_mix" else (bag, (table,))
    function, arguments = (op, ()) if program.direction == "forward" else (both, (x,))
    jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
    with compiled_for(topology.devices[0]):
        compiled = jitted.lower(*tables, gates, indices, *arguments).compile()
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }
    passes = rooflines(program) if program.implementation == "mosaic_gpu" else []
    return {"memory": sizes, "passes": passes if program.direction != "forward" else passes[:1]}


def rooflines(program: Program) -> list[dict]:
    """For the forward and the backward pass: the kernels in the order of the program, with the bytes that they ask of
    memory, and the floor's bytes."""
    import jax.numpy as jnp
    import numpy as np

    from peer_jax.ops import floor
    from peer_jax.ops.mosaic_gpu import copies

    t, d, N, r = program.t, program.d, program.N, program.r
    item, row = (jnp.dtype(name).itemsize for name in (program.dtype, program.rows))
    indices = jnp.asarray(np.random.default_rng(0).integers(0, N, (t, r), np.int32))
    if program.op == "expert_mix":
        names = "mix_tokens_s_y", "mix_tokens_s_y"
        forward = backward = copies.mix_tokens(t, r, d, read=row, write=row, x=item, y=item)
        sums = copies.sum_pairs(indices, N, d, [item, item], [row, row])
        least = floor.expert_mix, floor.expert_mix_backward
    else:
        names = "mix_tokens_y", "mix_tokens_s"
        forward = copies.mix_tokens(t, r, d, write=row, y=item)
        backward = copies.mix_tokens(t, r, d, read=row, x=item)
        sums = copies.sum_pairs(indices, N, d, [item], [row])
        least = floor.value_bag, floor.value_bag_backward
    return [
        {
            "asked": {kernel: sum(moved) for kernel, moved in asked.items()},
            "floor": [of(t, r, d, N, order, size=item, row_size=row).bytes for order in floor.ORDERS],
        }
        for asked, of in zip([{names[0]: forward}, {names[1]: backward, **sums}], least, strict=True)
    ]


def blocks_per_multiprocessor(registers: int, shared: int) -> int:
    """How many blocks of 128 threads run at once on sm_90, where registers are allotted in units of 256 per warp."""
    of_warp = -(-registers * 32 // 256) * 256
    return min(2048 // 128, 2**16 // (4 * of_warp), 228 * 2**10 // (shared + 2**10))


def kernels(log: str, names: list[str]) -> list[dict]:
    """What ptxas and Pallas print about each Pallas kernel: registers, spilled bytes, bytes of shared memory.

    Pallas prints in the order of the program, in which the kernels' ``names`` are; ptxas in any order, but kernels of
    the same name depend on one another. If the kernels are not those of ``names``, the list is empty.
    """
    told = []
    for section in log.split("Compiling entry function ")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", section)
        registers = re.search(r"Used (\d+) registers", section)
        if spills and registers:
            name = section.split("'")[1].removesuffix("_mosaic_gpu_kernel")
            spilled = {"spill stores": int(spills[1]), "spill loads": int(spills[2])}
            told.append({"kernel": name, "registers": int(registers[1]), **spilled})
    shared = []
    for resources in re.findall(r"Resources\(.*", log):
        barriers = re.findall(r"num_barriers=(\d+)[^()]*\): (\d+)", resources)  # 8 bytes each
        scratch = int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1])
        shared.append(scratch + 8 * sum(int(number) * int(times) for number, times in barriers))
    if sorted(names) != sorted(kernel["kernel"] for kernel in told) or len(shared) != len(names):
        return []
    found = []
    for name, size in zip(names, shared, strict=True):
        kernel = next(kernel for kernel in told if kernel["kernel"] == name)
        told.remove(kernel)
        found.append(kernel | {"shared": size})
    return found


def compile_apart(program: Program) -> dict:
    """Compiles the program in a new process, because ptxas prints nothing about a kernel that comes from a cache."""
    setting = {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_TRACEBACK_FILTERING": "off",  # so that the last line of a traceback is the error
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
        "PATH": os.pathsep.join([gpus.ptxas_folder() or "", os.environ.get("PATH", "")]),
    }
    command = [sys.executable, __file__, "--one", json.dumps(dataclasses.asdict(program))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | setting, timeout=600)
    except subprocess.TimeoutExpired:
        return {"program": program.name, "kernels": [], "faults": ["not compiled within 600 s"]}
    if done.returncode:
        return {
            "program": program.name,
            "kernels": [],
            "faults": [(done.stderr.strip() or "failed").splitlines()[-1][:200]],
        }
    found = json.loads(done.stdout.splitlines()[-1])
    names = [name for each in found["passes"] for name in each["asked"]]
    result = {"program": program.name, **found, "kernels": kernels(done.stdout + done.stderr, names)}
    if program.implementation == "mosaic_gpu" and not result["kernels"]:
        return result | {"faults": [f"ptxas and Pallas did not tell of {names}"]}
    return result | {"faults": faults(result, program.implementation == "mosaic_gpu")}


def faults(result: dict, bounded: bool) -> list[str]:
    """The limits that are broken; temporary memory is limited in ``bounded`` programs only."""
    found = []
    for kernel in result["kernels"]:
        if kernel["registers"] > MAX_REGISTERS:
            found.append(f"more than {MAX_REGISTERS} registers")
        if kernel["spill stores"] or kernel["spill loads"]:
            found.append("registers are spilled")
        if kernel["shared"] > MAX_SHARED:
            found.append(f"more than {MAX_SHARED // 2**10} KiB of shared memory")
    memory = result["memory"]
    if bounded and memory["temporary"] > MAX_TEMPORARY * (memory["arguments"] + memory["outputs"]):
        found.append(f"temporary memory above {MAX_TEMPORARY:.0%} of inputs and outputs")
    return found


HEADER = (
    *("program", "kernel", "registers", "shared KiB", "blocks per SM", "GB asked", "ms H100", "ms H200"),
    *("floor ms H100: token, expert order", "floor ms H200", "temporary MiB", "limits"),
)


def table_rows(result: dict) -> list[tuple[str, ...]]:
    """One row per kernel; the first one has the program's memory and verdict, and the first of a pass its floor."""
    verdict = "; ".join(dict.fromkeys(result["faults"])) or "kept"
    if not result["kernels"]:
        cells = ("XLA's own", *[""] * 8, temporary(result["memory"])) if "memory" in result else [""] * 10
        return [(result["program"], *cells, verdict)]
    asked = [
        (moved, [] if place else each["floor"])
        for each in result["passes"]
        for place, moved in enumerate(each["asked"].values())
    ]
    rows = []
    for kernel, (moved, least) in zip(result["kernels"], asked, strict=True):
        first = not rows
        rows.append(
            (
                result["program"] if first else "",
                kernel["kernel"],
                str(kernel["registers"]),
                f"{kernel['shared'] / 2**10:.0f}",
                str(blocks_per_multiprocessor(kernel["registers"], kernel["shared"])),
                f"{moved / 1e9:.3f}",
                *(milliseconds([moved], kind) for kind in ("h100", "h200")),
                *(milliseconds(least, kind) for kind in ("h100", "h200")),
                temporary(result["memory"]) if first else "",
                verdict if first else "",
            )
        )
    return rows


def milliseconds(sizes: list[float], kind: str) -> str:
    """The time that so many bytes take at the bandwidth of the GPU."""
    return ", ".join(f"{1e3 * size / DEVICES[kind].bandwidth:.3g}" for size in sizes)


def temporary(memory: dict) -> str:
    return f"{memory['temporary'] / 2**20:.1f} ({memory['temporary'] / (memory['arguments'] + memory['outputs']):.1%})"


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        print(f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="compile the programs whose names contain all of these")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(compile_here(Program(**json.loads(arguments.one)))))
        return 0
    if (reason := missing()) is not None:
        print(reason, file=sys.stderr)
        return 2
    results = []
    for program in PROGRAMS:
        if all(word in program.name for word in arguments.words):
            print(program.name, file=sys.stderr, flush=True)
            results.append(compile_apart(program))
    print_table([HEADER, *itertools.chain.from_iterable(map(table_rows, results))])
    print("Temporary memory is the compiler's figure; without a GPU, XLA compiles a slower sorting algorithm.")
    return int(any(result["faults"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
