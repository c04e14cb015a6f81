"""Times of PyTorch's gather and einsum, eager and compiled, for comparison; they have no target.

python -m gpu_check.pytorch [--smoke]    prints rows as lines of JSON
"""

import json
import statistics
import sys
import time
import types
from collections.abc import Callable

SMOKE = "--smoke" in sys.argv
SIZES = [(6, 64, 25, 4)] if SMOKE else [(4096, 1024, 16384, 32), (4096, 1024, 65536, 32), (32768, 768, 1024**2, 128)]


def emit(case: str, implementation: str, what: str, result: str, *, part: str = "speed", **more) -> None:
    row = {"part": part, "case": case, "implementation": implementation, "what": what, "result": result}
    print(json.dumps(row | {"target": "", "verdict": ""} | more), flush=True)


def main() -> None:
    try:
        import torch
    except ImportError:
        emit("any", "pytorch", "time", "PyTorch is not installed")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def mix(x, down, up, gates, indices):
        s = torch.einsum("td,trd->tr", x, down[indices])
        return torch.einsum("tr,trd->td", gates * torch.nn.functional.gelu(s, approximate="tanh"), up[indices])

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def seconds(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        taken = []
        for _ in range(5):
            wait()
            start = time.perf_counter()
            call()
            wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    for name, function in (("pytorch eager", mix), ("pytorch compiled", torch.compile(mix))):
        for t, d, N, r in SIZES:
            case = f"T={t} d={d} N={N} hk={r}, bfloat16"
            try:
                torch.manual_seed(0)
                kind = {"device": device, "dtype": torch.bfloat16}
                x, dy = torch.randn(t, d, **kind), torch.randn(t, d, **kind)
                down, up = (torch.randn(N, d, **kind) * d**-0.5 for _ in range(2))
                gates = torch.softmax(torch.randn(t, r, **kind), -1)
                indices = torch.randint(0, N, (t, r), device=device)
                with torch.no_grad():
                    taken = seconds(lambda: function(x, down, up, gates, indices))  # noqa: B023
                emit(case, name, "forward", f"{taken * 1e3:.3f} ms", seconds=taken)
                if t > 4096:  # the gradient would hold several arrays [t, r, d]
                    continue
                primals = [a.requires_grad_() for a in (x, down, up, gates)]
                y = function(*primals, indices)
                taken = seconds(lambda: torch.autograd.grad(y, primals, dy, retain_graph=True))  # noqa: B023
                emit(case, name, "backward", f"{taken * 1e3:.3f} ms", seconds=taken)
            except Exception as error:  # out of memory, or no compiler
                emit(case, name, "time", f"{type(error).__name__}: {error}".splitlines()[0][:160])
    time_layer(torch, seconds, device)


def time_layer(torch: types.ModuleType, seconds: Callable[..., float], device: str) -> None:
    """PEER of PEER-pytorch as it comes, in bfloat16; the sizes are those of ``gpu_check.model``."""
    t, d, N = (64, 64, 8**2) if SMOKE else (8192, 1024, 1024**2)
    case = f"PEER T={t} d={d} N={N} h=8 k=16, bfloat16"
    try:
        from PEER_pytorch import PEER
    except ImportError:
        emit(case, "PEER-pytorch", "time", "PEER-pytorch is not installed", part="layer")
        return
    try:
        layer = PEER(d, heads=8, num_experts=N, num_experts_per_head=16, dim_key=64).to(device, torch.bfloat16)
        x, dy = (torch.randn(1, t, d, device=device, dtype=torch.bfloat16) for _ in range(2))
        with torch.no_grad():
            taken = seconds(lambda: layer(x))
        emit(case, "PEER-pytorch", "forward", f"{taken * 1e3:.3f} ms", part="layer", seconds=taken)
        x.requires_grad_()
        taken = seconds(lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], dy))
        emit(case, "PEER-pytorch", "forward + backward", f"{taken * 1e3:.3f} ms", part="layer", seconds=taken)
    except Exception as error:  # out of memory
        emit(case, "PEER-pytorch", "time", f"{type(error).__name__}: {error}".splitlines()[0][:160], part="layer")


if __name__ == "__main__":
    main()
