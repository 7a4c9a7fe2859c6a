"""Shift3D and the fused stem against copying the tensor and against plain PyTorch.

Run: python tests/benchmarks/bench_shift3d.py [rounds]. One process, rounds interleaved, medians,
freed memory kept. On a machine with CUDA the paper's sizes are timed there too, in bfloat16.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from covidmtl_core import shift3d as s3d
from covidmtl_core.benchmarks.plain_shift3d import loop
from covidmtl_core.benchmarks.recording import interleaved, record, with_warm_allocator
from covidmtl_core.shift3d import Shifts

SHAPE = (4, 64, 50, 62, 62)
GPU_SHAPE = (10, 64, 100, 125, 125)


def plans(shape: tuple[int, ...]) -> dict[str, Shifts]:
    """Shifts of every sample, and of the third alone."""
    generator = torch.Generator().manual_seed(1)
    every = s3d.draw_shifts(shape, p=1.0, generator=generator)
    distance = torch.zeros_like(every.distance)
    distance[2] = every.distance[2]
    return {"every sample": every, "1 sample": Shifts(every.axis, distance)}


def step(x: Tensor, call: Callable[[Tensor], Tensor], gradient: Tensor) -> Callable[[], None]:
    """Forward and backward of a call."""

    def run() -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(call(leaf), leaf, gradient)

    return run


def without_fast_path(call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        kept, s3d._fast_path = s3d._fast_path, lambda device: None  # type: ignore[assignment]
        call()
        s3d._fast_path = kept

    return run


def cpu_cases(shape: tuple[int, ...] = SHAPE) -> dict[str, Callable[[], Any]]:
    """Copying the tensor and its gradient, Shift3D, and the stem, each forward and backward."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn_like(x)
    pooled = torch.randn_like(F.max_pool3d(x, 3, 2, 1))
    cases: dict[str, Callable[[], Any]] = {"two clones": lambda: (x.clone(), gradient.clone())}
    for name, plan in plans(shape).items():
        run = step(x, lambda t, plan=plan: s3d.shift3d(t, plan), gradient)  # type: ignore[misc]
        cases |= {f"fast, {name}": run, f"plain, {name}": without_fast_path(run)}
    every = plans(shape)["every sample"]
    cases["ReLU, max-pool"] = step(x, lambda t: F.max_pool3d(F.relu(t), 3, 2, 1), pooled)
    cases["ReLU, shift, max-pool"] = step(x, lambda t: s3d.relu_shift_max_pool(t, every), pooled)
    cases["loop"] = step(x, lambda t: loop(t, *every), gradient)
    return cases


def on_cpu(rounds: int) -> dict[str, Any]:
    cases = cpu_cases()
    slow = {"loop": cases.pop("loop")}
    seconds = interleaved(cases, rounds) | interleaved(slow, 1)
    clones, pool = seconds["two clones"], seconds["ReLU, max-pool"]
    return {
        "shape": SHAPE,
        "milliseconds": {n: round(1000 * s, 1) for n, s in seconds.items()},
        **{
            f"{name}, against two clones": round(seconds[name] / clones, 2)
            for name in cases
            if name.endswith("sample")
        },
        "loop against fast": round(seconds["loop"] / seconds["fast, every sample"]),
        "fused stem against ReLU and max-pool": round(seconds["ReLU, shift, max-pool"] / pool, 3),
        "rounds": rounds,
    }


def on_cuda(rounds: int) -> dict[str, Any]:
    x = torch.randn(GPU_SHAPE, device="cuda", dtype=torch.bfloat16)
    gradient = torch.randn_like(x)
    cases: dict[str, Callable[[], Any]] = {"two clones": lambda: (x.clone(), gradient.clone())}
    for name, plan in plans(GPU_SHAPE).items():
        cases[name] = step(x, lambda t, plan=plan: s3d.shift3d(t, plan), gradient)  # type: ignore[misc]

    def synchronised(call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (call(), torch.cuda.synchronize())

    seconds = interleaved({name: synchronised(call) for name, call in cases.items()}, rounds)
    return {
        "shape": GPU_SHAPE,
        "milliseconds": {n: round(1000 * s, 2) for n, s in seconds.items()},
        **{
            f"{name}, against two clones": round(seconds[name] / seconds["two clones"], 2)
            for name in plans(GPU_SHAPE)
        },
        "rounds": rounds,
    }


if __name__ == "__main__":
    with_warm_allocator()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 21
    record("shift3d_speed", on_cpu(rounds), ("torch", "numba"))
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        record("shift3d_speed_gpu", on_cuda(rounds), ("torch", "triton"), device)
