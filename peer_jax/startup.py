"""What a process does before it imports JAX: quiet libraries, compiled programs kept on disk, and, on CPU, malloc.

Commands and the worker processes of a sweep call ``prepare``; a library never changes its process like this.
"""

import contextlib
import ctypes
import glob
import importlib.metadata
import importlib.util
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from peer_jax import versions
from peer_jax.errors import InputError, TryAgain

if TYPE_CHECKING:
    from etils import epath

PROGRAMS_BYTES = 4 * 2**30  # of compiled programs; the oldest go first
PROGRAMS = ".programs"  # in the directory of a run or a sweep
CACHE = "~/.cache/peer_jax"
LOCK_SECONDS = 10  # how long JAX itself waits for the lock of their folder


def prepare(*, keep_programs: bool = True, workdir: str | None = None) -> None:
    """Prepares this process.

    Args:
        keep_programs: have JAX keep compiled programs on disk, so that a run of the same shapes, or one that goes on,
            starts in a second.
        workdir: what the command works in. If it is in a bucket, a process with an accelerator keeps its programs
            there, where the other machines find them.

    Raises:
        InputError: if the environment has a setting that JAX or XLA can't start with; or if the programs are to be kept
            in a bucket that can't be used.
    """
    from peer_jax.storage import is_in_bucket, place  # imported here, so that `--help` doesn't wait for it

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    _silence_threads()
    if not accelerators():
        keep_freed_memory()
    if keep_programs and workdir is not None and is_in_bucket(workdir) and accelerators():
        # Programs for a CPU are for one of its kind, so they stay on their machine. JAX can't limit a bucket's size.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{workdir.rstrip('/')}/{PROGRAMS}")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    elif keep_programs:
        programs = str(cache_folder() / "programs")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(PROGRAMS_BYTES))
        if os.environ["JAX_COMPILATION_CACHE_DIR"] == programs:
            _remove_half_programs(Path(programs))
    if keep_programs and is_in_bucket(programs := os.environ.get("JAX_COMPILATION_CACHE_DIR", "")):
        place(programs)  # prepares the libraries for buckets before JAX's first compilation, which uses them
    if "jax" not in sys.modules:
        _check_xla_flags()
        try:
            import jax  # noqa: F401, it reads the environment
        except ValueError as error:
            raise _refused_environment(error) from error
        leave_out_libtpu()


def leave_out_libtpu() -> None:
    """Keeps JAX on the CPU where libtpu is installed, to compile for TPUs, and there is nothing that JAX could start.

    JAX would load libtpu, which prints that it has found no TPU, or fails because another process has loaded it. Where
    JAX is told its platforms, or finds TPUs at its import, it has set them. Plugins other than that of CUDA may be for
    devices that ``accelerators`` does not know.
    """
    import jax

    if importlib.util.find_spec("libtpu") is None or jax.config.jax_platforms or accelerators():
        return
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if all(plugin.name.startswith("xla_cuda") for plugin in plugins):
        jax.config.update("jax_platforms", "cpu")


def refusal_of_a_bucket(error: Exception) -> InputError | None:
    """The error to show for what a library for buckets has raised; None for other exceptions."""
    from peer_jax import storage  # imported here, so that `--help` doesn't wait for it

    if (reason := storage.fault(error)) is None:
        return None
    sentence = f"a bucket can't be used any more ({reason}): check the connection and your rights"
    return storage.refusal(error, sentence)


def check_devices() -> None:
    """Starts JAX's devices, once the processes of a run have joined; the first one warns of a faulty jaxlib.

    Raises:
        InputError: if the environment asks for devices that aren't there, or if another process has the host's TPU.
    """
    import jax
    from jax._src import xla_bridge

    try:
        jax.numpy.zeros(())
    except Exception as error:  # of whatever kind: a plugin's own start may fail in any way
        raise _tpu_in_use(str(error)) or _refused_environment(error) from error
    # Without JAX_PLATFORMS, JAX then goes on with the CPU, and says nothing.
    refused = _tpu_in_use(xla_bridge._backend_errors.get("tpu", ""))
    if refused and jax.default_backend() == "cpu":
        raise refused
    if jax.process_index() == 0:
        _warn_of_jaxlib(jax.default_backend())


def _warn_of_jaxlib(platform: str) -> None:
    for sentence in versions.warnings(importlib.metadata.version("jaxlib"), platform):
        logging.getLogger(__name__).warning(sentence)


def _tpu_in_use(reason: str) -> InputError | None:
    """The error for what libtpu says if another process has the TPU; None if it says something else."""
    if not re.search(r"TPU is already in use|libtpu\S* (is )?already in use|libtpu multi-process lockfile", reason):
        return None
    process = re.search(r"process with pid (\d+)", reason)
    return TryAgain(
        f"the TPU of this host is in use by another {process[0] if process else 'process'}: wait for it, or end it; if "
        "there is none, remove /tmp/libtpu_lockfile"
    )


def check_devices_of_workers() -> None:
    """``check_devices`` in another process, since this one leaves the devices to its workers, which do not warn."""
    if accelerators() not in ([], ["tpu"]):
        _warn_of_jaxlib("gpu")
    if os.environ.get("JAX_PLATFORMS", "") in ("", "cpu"):
        return
    program = (
        "from peer_jax import errors, startup\ntry: startup.check_devices()\nexcept errors.InputError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if reason := done.stdout.strip():
        raise InputError(reason)


def _check_xla_flags() -> None:
    """An InputError if XLA can't read its flags: it would end this process, so a copy of it tries them."""
    if not os.environ.get("XLA_FLAGS") or not hasattr(os, "fork"):
        return
    from jaxlib import xla_client

    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        xla_client.CompileOptions()  # reads the flags
        os._exit(0)
    os.close(write)
    with os.fdopen(read, errors="replace") as output:
        said = output.read()
    if os.waitpid(child, 0)[1]:
        raise _refused_environment((said.split("] ", 1)[-1].splitlines() or ["XLA ended"])[0])


def _has_address(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except socket.gaierror:
        return False


def _refused_environment(reason: object) -> InputError:
    """Why JAX can't start, with the variables that may be the cause."""
    if "gloo/transport" in str(reason) and not _has_address(socket.gethostname()):
        name = f"this machine's name {socket.gethostname()!r} has no address, which several processes on CPUs need"
        return InputError(f"JAX can't start: {name}: add it to /etc/hosts")
    own = ("JAX_COMPILATION_CACHE_DIR", f"JAX_COMPILATION_CACHE_MAX_SIZE={PROGRAMS_BYTES}")  # set by ``prepare``
    given = (f"{name}={value}" for name, value in sorted(os.environ.items()) if value)
    read = ("JAX_", "XLA_FLAGS=", "CUDA_VISIBLE_DEVICES=")
    named = [setting[:80] for setting in given if setting.startswith(read) and not setting.startswith(own)]
    first = (str(reason).strip() or "there are no such devices").splitlines()[0].rstrip(".")
    return InputError(f"JAX can't start ({first[:200]}): mend or unset {', '.join(named) or 'JAX_PLATFORMS'}")


def cache_folder(given: str | os.PathLike | None = None) -> Path:
    """The folder of prepared text and compiled programs: ``given``, ``PEER_JAX_CACHE`` or else ``~/.cache/peer_jax``.

    The last one is also that of the copies of prepared text of which ``shared_cache`` has the originals.

    Raises:
        InputError: if it is an address of no bucket, or in the home directory of nobody.
    """
    from peer_jax.storage import is_in_bucket, local  # imported here, so that `--help` doesn't wait for it

    folder = given or os.environ.get("PEER_JAX_CACHE") or CACHE
    if is_in_bucket(folder):
        folder = CACHE
    try:
        return Path(local(folder)).expanduser()
    except (InputError, RuntimeError) as error:
        raise InputError(
            f"the cache folder {folder} can't be used ({error}): set cache_dir or PEER_JAX_CACHE to a local folder or "
            "to an address like gs://bucket/folder",
            argument="cache_dir" if given else None,
        ) from error


def shared_cache(given: str | os.PathLike | None = None) -> "epath.Path | None":
    """The folder of prepared text in a bucket, if ``given`` or else ``PEER_JAX_CACHE`` is one.

    Raises:
        InputError: if the bucket can't be used.
    """
    from peer_jax.storage import is_in_bucket, place

    folder = given or os.environ.get("PEER_JAX_CACHE") or ""
    return place(folder, "cache_dir" if given else None) if is_in_bucket(folder) else None


def _remove_half_programs(folder: Path) -> None:
    """Removes the compiled programs that killed processes have left half written, which JAX would warn of each time.

    JAX doesn't write a program whole. But it writes the time of its last use, to a second file, right after the
    program and while it holds the folder's lock: a program without this file is not whole. JAX writes no such files
    without a limit on the folder's size.
    """
    if not folder.is_dir() or os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == "-1":
        return
    with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()


def _silence_threads() -> None:
    """Keeps Orbax and TensorStore from printing a traceback in each of their threads that fails, as on a full disk.

    They raise the same errors in the thread that waits for them, which says in one line what has happened.
    """
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def show_of_main_thread(error: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            show(error)

    sys.unraisablehook = show_of_main_thread


def accelerators() -> list[str]:
    """The accelerators that worker processes can share, found without starting JAX.

    Returns:
        Indices of GPUs; ["tpu"], for all chips of a TPU host belong to one process; or nothing.
    """
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return []
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            return [device for device in visible.split(",") if device.strip()]
        return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    if importlib.util.find_spec("libtpu"):
        return ["tpu"] if glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*") else []
    return []


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees: on CPU, fetching it anew costs up to half of a step (docs/log.md).

    There is one arena, since the arenas of XLA's threads can't hold large arrays and would map them anew each time;
    nothing is mapped by itself, and nothing is trimmed.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1), (top_pad, 2**27)):
        mallopt(parameter, value)


def return_freed_memory() -> None:
    """Gives back to the system what has been freed so far, so that it doesn't count as the process's memory."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def end_with_parent() -> None:
    """Has Linux kill this process when its parent is gone."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _glibc(name: str):
    """A function of glibc; None where the process has another C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
