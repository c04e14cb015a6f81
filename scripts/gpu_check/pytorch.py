"""Times of PyTorch's gather and einsum, eager and compiled, for comparison; they have no target.

python -m gpu_check.pytorch [--smoke]    prints rows as lines of JSON
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

SMOKE = "--smoke" in sys.argv
SIZES = [(6, 64, 25, 4)] if SMOKE else [(4096, 1024, 16384, 32), (4096, 1024, 65536, 32), (32768, 768, 1024**2, 128)]


def emit(case: str, implementation: str, what: str, result: str, **more) -> None:
    row = {"part": "speed", "case": case, "implementation": implementation, "what": what, "result": result}
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


if __name__ == "__main__":
    main()
