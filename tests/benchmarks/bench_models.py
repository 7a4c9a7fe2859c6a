"""ShiftNet3D and COVID-MTL at the paper's size against plain PyTorch and single-task networks.

Run: python tests/benchmarks/bench_models.py [rounds]. One process, rounds interleaved, medians,
with the allocator settings of bench_shift3d.py; memory in fresh processes without them.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covidmtl_core.benchmarks.plain_shift3d import plain_squeezenet3d
from covidmtl_core.benchmarks.recording import interleaved, record, with_warm_allocator
from covidmtl_core.losses import MeanLoss, task_losses
from covidmtl_core.models import CovidMTL, for_inference, shiftnet3d
from covidmtl_core.shift3d import Shift3D

SIZE = (1, 1, 200, 250, 250)
TASKS = {"ct": 2, "nat": 2, "severity": 3}


def training_step(network: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward, loss and backward of one classification."""
    network.train()

    def run() -> None:
        network.zero_grad(set_to_none=True)
        F.cross_entropy(network(x), torch.zeros(len(x), dtype=torch.int64)).backward()

    return run


def multitask_step(network: CovidMTL, x: Tensor) -> Callable[[], None]:
    network.train()
    targets = {task: torch.zeros(len(x), dtype=torch.int64) for task in TASKS}
    total = MeanLoss()

    def run() -> None:
        network.zero_grad(set_to_none=True)
        total(task_losses(network(x), targets)).backward()

    return run


def prediction(network: nn.Module, x: Tensor) -> Callable[[], None]:
    network.eval()

    def run() -> None:
        with torch.no_grad():
            network(x)

    return run


def networks() -> dict[str, nn.Module]:
    """The plain one without Shift3D, and ours with it in every sample."""
    return {"plain": plain_squeezenet3d(), "ours": shiftnet3d(shift=Shift3D(p=1.0))}


def training_cases(x: Tensor) -> dict[str, Callable[[], None]]:
    """A training step of the plain network, of ours, and of one network for all tasks."""
    cases = {name: training_step(network, x) for name, network in networks().items()}
    cases |= {task: training_step(shiftnet3d(n), x) for task, n in TASKS.items()}
    return cases | {"all": multitask_step(CovidMTL(TASKS, use_features=False), x)}


def prediction_cases(x: Tensor) -> dict[str, Callable[[], None]]:
    """A prediction by the plain network, by ours, and by ours with its norms folded."""
    both = networks()
    both |= {"folded": for_inference(both["ours"])}
    return {name: prediction(network, x) for name, network in both.items()}


def peak_gib(name: str) -> float:
    """Largest memory of a fresh process, at glibc's defaults, that trains two steps, GiB."""
    code = (
        "import resource, torch; from covidmtl_core.benchmarks import bench_models as b\n"
        f"step = b.training_step(b.networks()[{name!r}], torch.randn(b.SIZE))\n"
        "step(); step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", code]
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here, env=plain)
    return float(done.stdout)


def main(rounds: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(SIZE)
    both = networks()
    measured = [[peak_gib(name) for name in both] for _ in range(rounds)]
    peaks = dict(zip(both, map(statistics.median, zip(*measured, strict=True)), strict=True))
    training = interleaved(training_cases(x), rounds)
    compiled = {"compiled": prediction(torch.compile(for_inference(both["ours"])), x)}  # type: ignore[arg-type]
    predicting = interleaved(prediction_cases(x) | compiled, rounds)
    cost = {name: training[name] for name in (*TASKS, "all")}
    three = sum(cost[task] for task in TASKS)
    figures = {
        "volume": SIZE,
        "seconds": {
            kind: {name: round(value, 2) for name, value in found.items()}
            for kind, found in (("training", training), ("inference", predicting), ("tasks", cost))
        },
        "training step against plain": round(training["ours"] / training["plain"], 3),
        "peak memory, GiB": {name: round(value, 2) for name, value in peaks.items()},
        "peak memory against plain": round(peaks["ours"] / peaks["plain"], 3),
        "inference against plain": round(predicting["folded"] / predicting["plain"], 3),
        "compiled inference against plain": round(predicting["compiled"] / predicting["plain"], 3),
        "one multitask against three single-task": round(cost["all"] / three, 3),
        "rounds": rounds,
    }
    record("models_speed", figures, ("torch", "numba"))


if __name__ == "__main__":
    with_warm_allocator()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
