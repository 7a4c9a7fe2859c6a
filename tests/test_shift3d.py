"""Shift3D against a plain loop, its statistics, its gradients, and its fast paths."""

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covidmtl_core import shift3d as s3d
from covidmtl_core.benchmarks.plain_shift3d import loop, released_outcome
from covidmtl_core.shift3d import Shift3D, Shifts, draw_shifts, relu_shift_max_pool, shift3d

SHAPES = [(3, 5, 7, 6, 9), (2, 3, 1, 8, 5), (1, 2, 4, 1, 1), (1, 1, 1, 1, 1), (0, 2, 3, 3, 3)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["fast", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With numba, if it is here, and with PyTorch alone."""
    if request.param == "plain":
        monkeypatch.setattr(s3d, "_fast_path", lambda device: None)
    elif s3d._fast_path("cpu") is None:
        pytest.skip("numba is not installed")
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [None, 0.0, 2.0])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_equals_the_plain_loop(
    path: str,
    shape: tuple[int, ...],
    padding: float | None,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    x = (torch.randn(shape, generator=generator()) * 3).to(dtype).contiguous(memory_format=layout)
    before = x.clone()
    shifts = draw_shifts(shape, max_shift=0.9, p=0.7, generator=generator(1))
    shifted = shift3d(x, shifts, padding)
    assert torch.equal(shifted, loop(x, *shifts, padding).to(dtype))
    assert torch.equal(x, before) and shifted.dtype == dtype
    assert shifted.is_contiguous(memory_format=layout)


def test_equals_the_plain_loop_when_threads_share_the_work(path: str) -> None:
    x = torch.randn(2, 16, 20, 30, 40, generator=generator())
    shifts = draw_shifts(x.shape, p=1.0, generator=generator(2))
    assert torch.equal(shift3d(x, shifts), loop(x, *shifts))
    assert torch.equal(shift3d(x, shifts, -1.0), loop(x, *shifts, -1.0))


def test_distances_beyond_the_axis_wrap_or_fill(path: str) -> None:
    x = torch.arange(5.0).view(1, 1, 5, 1, 1)
    axis = torch.zeros(1, 1, dtype=torch.int64)
    far = Shifts(axis, torch.tensor([[-7]]))
    assert shift3d(x, far).flatten().tolist() == [2, 3, 4, 0, 1]
    assert shift3d(x, far, 9.0).flatten().tolist() == [9] * 5


def test_views_and_transposed_inputs(path: str) -> None:
    x = torch.randn(2, 3, 4, 5, 6, generator=generator()).transpose(2, 4)
    shifts = draw_shifts(x.shape, p=1.0, max_shift=0.9, generator=generator(3))
    assert torch.equal(shift3d(x, shifts), loop(x, *shifts))


def test_nothing_to_do_returns_the_input_itself() -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    layer = Shift3D(p=1.0)
    assert layer.eval()(x) is x
    assert Shift3D(p=0.0)(x) is x
    assert Shift3D(p=1.0, max_shift=0.0)(x) is x
    still = Shifts(*torch.zeros(2, 2, 3, dtype=torch.int64))
    assert shift3d(x, still) is x and shift3d(x, still, 5.0) is x


def test_a_distance_of_zero_with_padding_changes_nothing(path: str) -> None:
    x = torch.randn(1, 2, 4, 4, 4)
    shifts = Shifts(torch.tensor([[0, 1]]), torch.tensor([[0, 2]]))
    assert torch.equal(shift3d(x, shifts, 7.0)[0, 0], x[0, 0])


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_probability_is_the_share_of_samples_shifted(p: float) -> None:
    distance = draw_shifts((4000, 64, 20, 20, 20), p=p, generator=generator()).distance
    share = float(distance.any(dim=1).double().mean())
    assert share == p if p in (0.0, 1.0) else abs(share - p) < 4 * (p * (1 - p) / 4000) ** 0.5


def test_outcomes_are_distributed_as_in_the_released_layer() -> None:
    size, draws, rng = (10, 15, 21), 40_000, random.Random(0)
    wanted = torch.tensor([released_outcome(size, rng) for _ in range(draws)])
    shifts = draw_shifts((1, draws, *size), p=1.0, generator=generator())
    found = torch.stack([shifts.axis[0], shifts.distance[0]], 1)
    outcomes = torch.unique(torch.cat([wanted, found]), dim=0)
    counts = torch.stack(
        [(outcomes[:, None] == rows).all(-1).sum(1) for rows in (wanted, found)]
    ).double()
    statistic = float(((counts[0] - counts[1]) ** 2 / counts.sum(0)).sum())
    free = len(outcomes) - 1
    assert free == 5 + 7 + 9 - 1
    assert statistic < free + 4 * (2 * free) ** 0.5


@pytest.mark.parametrize(("p", "rate"), [(0.25, 0.25), (0.4, 0.5), (0.6, 0.0), (1.0, 0.0), (0, 0)])
def test_the_released_rate_is_one_in_a_whole_number(p: float, rate: float) -> None:
    shape = (4000, 64, 20, 20, 20)
    distance = draw_shifts(shape, p=p, as_released=True, generator=generator()).distance
    assert abs(float(distance.any(dim=1).double().mean()) - rate) < 0.04


def test_the_released_padding_wipes_maps() -> None:
    shape = (1, 20_000, 20, 20, 20)
    layer = {"p": 0.5, "as_released": True, "generator": generator(4)}
    while not (shifts := draw_shifts(shape, padded=True, **layer)).distance.any():  # type: ignore[arg-type]
        pass
    wiped = float((shifts.distance == -20).double().mean())
    assert abs(wiped - 0.1) < 0.01  # a distance of 0 (1 in 5) towards the start (1 in 2)
    assert not draw_shifts(shape, p=1.0, generator=generator()).distance.eq(-20).any()


def test_normal_distances_are_cut_off_at_the_longest() -> None:
    shifts = draw_shifts((1, 50_000, 100, 100, 100), distribution="normal", p=1.0)
    distance = shifts.distance.double()
    assert distance.abs().max() == 20
    assert abs(float(distance.mean())) < 0.2
    assert abs(float(distance.std()) - 8.80) < 0.15  # 0.880 of 10, the normal cut at two deviations


def test_channels_share_a_shift_where_asked() -> None:
    shifts = draw_shifts((50, 8, 20, 20, 20), p=1.0, per_channel=False, generator=generator())
    for part in shifts:
        assert (part == part[:, :1]).all()
    assert len(shifts.distance[:, 0].unique()) > 3


def test_a_seed_fixes_the_draw_and_a_draw_can_be_replayed() -> None:
    x = torch.randn(4, 6, 10, 10, 10)
    first, second = (draw_shifts(x.shape, p=1.0, generator=generator(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    layer = Shift3D(p=1.0, generator=generator(5))
    assert torch.equal(layer(x), shift3d(x, first))
    torch.manual_seed(6)
    unseeded = Shift3D(p=1.0)(x)
    torch.manual_seed(6)
    assert torch.equal(Shift3D(p=1.0)(x), unseeded)


@pytest.mark.parametrize("padding", [None, 1.5])
def test_gradients(path: str, padding: float | None) -> None:
    shape = (2, 2, 3, 4, 3)
    x = torch.randn(shape, dtype=torch.float64, generator=generator(), requires_grad=True)
    shifts = draw_shifts(shape, max_shift=0.9, p=1.0, generator=generator(7))
    assert torch.autograd.gradcheck(lambda t: shift3d(t, shifts, padding), x)
    assert torch.autograd.gradgradcheck(lambda t: shift3d(t, shifts, padding), x)


def test_gradient_is_that_of_the_plain_loop(path: str) -> None:
    x = torch.randn(3, 4, 5, 6, 7, generator=generator(), requires_grad=True)
    shifts = draw_shifts(x.shape, max_shift=0.9, p=0.6, generator=generator(8))
    weights = torch.randn(x.shape, generator=generator(9))
    for padding in (None, 1.5):
        grads = [
            torch.autograd.grad((call(x) * weights).sum(), x)[0]
            for call in (
                lambda t, padding=padding: shift3d(t, shifts, padding),
                lambda t, padding=padding: loop(t, *shifts, padding),
            )
        ]
        assert torch.equal(*grads)


def test_shifts_changed_before_the_backward_pass_are_noticed() -> None:
    x = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    shifts = Shifts(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    shifted = shift3d(x, shifts)
    shifts.distance.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        shifted.sum().backward()


def test_tensors_without_elements(path: str) -> None:
    for shape in ((2, 3, 4, 4, 0), (2, 3, 0, 4, 4)):
        x = torch.randn(shape)
        ones = torch.ones(2, 3, dtype=torch.int64)
        assert shift3d(x, Shifts(ones, ones)) is x


def test_under_autocast_and_behind_a_half_precision_convolution() -> None:
    network = nn.Sequential(nn.Conv3d(1, 4, 3), Shift3D(p=1.0), nn.ReLU(), nn.Conv3d(4, 2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(2, 1, 9, 9, 9))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert network[0].weight.grad.isfinite().all()


def test_default_device_does_not_matter(path: str) -> None:
    x = torch.randn(2, 3, 6, 7, 8, requires_grad=True)
    shifts = draw_shifts(x.shape, p=1.0)
    wanted = shift3d(x, shifts, 1.0), relu_shift_max_pool(x, shifts)
    with torch.device("meta"):
        found = shift3d(x, shifts, 1.0), relu_shift_max_pool(x, shifts)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_views_that_only_promise_to_negate(path: str) -> None:
    negated = torch.randn(2, 3, 4, 5, 6, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    shifts = draw_shifts(negated.shape, p=1.0)
    clean = negated.resolve_neg()
    assert torch.equal(shift3d(negated, shifts), shift3d(clean, shifts))
    assert torch.equal(relu_shift_max_pool(negated, shifts), relu_shift_max_pool(clean, shifts))


def test_forked_child_of_a_process_that_used_threads() -> None:
    code = """
import multiprocessing, numpy, torch
from covidmtl_core.shift3d import draw_shifts, relu_shift_max_pool
torch.set_num_threads(2)
x = torch.randn(2, 8, 32, 64, 64)
shifts = draw_shifts(x.shape, p=1.0)
wanted = relu_shift_max_pool(x, shifts)
def child(queue):
    queue.put(numpy.array_equal(relu_shift_max_pool(x, shifts).numpy(), wanted.numpy()))
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
assert queue.get(timeout=60)
process.join()
assert process.exitcode == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_eval_mode_can_be_traced() -> None:
    x = torch.randn(1, 2, 6, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(lambda x: relu_shift_max_pool(x), x)
    assert torch.equal(traced(x + 1), relu_shift_max_pool(x + 1))


def test_compiled_training_equals_eager_training() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv3d(1, 4, 3), Shift3D(p=0.5, generator=generator(1)), nn.Conv3d(4, 2, 3)
        )

    x = torch.randn(4, 1, 8, 8, 8)
    eager, compiled = network(), torch.compile(network(), backend="aot_eager")
    for _ in range(3):
        a, b = eager(x), compiled(x)
        a.sum().backward()
        b.sum().backward()
        assert torch.equal(a, b)
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_probability_decays_along_a_cosine_and_is_saved() -> None:
    layer = Shift3D(p=0.8, decay_steps=4)
    seen = [layer.next_probability() for _ in range(6)]
    assert seen == pytest.approx([0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5), 0, 0])
    again = Shift3D(p=0.8, decay_steps=4)
    again.load_state_dict(layer.state_dict())
    assert int(again.step) == 6
    assert Shift3D().state_dict() == {}
    fresh = Shift3D(decay_steps=4)
    fresh.eval()(torch.zeros(1, 1, 2, 2, 2))
    assert int(fresh.step) == 0


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"p": 1.5}, "p is 1.5"),
        ({"max_shift": -0.1}, "max_shift is -0.1"),
        ({"distribution": "gauss"}, "distribution is 'gauss'"),
        ({"decay_steps": 0}, "decay_steps is 0"),
        ({"p": float("nan")}, "p is nan"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Shift3D(**parameters)


def test_wrong_inputs_are_named() -> None:
    x = torch.zeros(2, 3, 4, 4, 4)
    shifts = draw_shifts(x.shape)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\)"):
        Shift3D(p=1.0)(x[..., 0])
    with pytest.raises(ValueError, match="axis is torch"):
        shift3d(x[:1], shifts)
    with pytest.raises(ValueError, match="distance is torch"):
        shift3d(x, Shifts(shifts.axis, shifts.distance.float()))
    with pytest.raises(ValueError, match="0, 1 or 2"):
        shift3d(x, Shifts(shifts.axis + 3, shifts.distance))


def separately(x: Tensor, shifts: Shifts | None, padding: float | None) -> Tensor:
    x = F.relu(x)
    x = x if shifts is None else loop(x, *shifts, padding)
    return F.max_pool3d(x, 3, 2, 1)


@pytest.mark.parametrize(
    "shape", [*SHAPES[:-1], (2, 3, 2, 5, 64), (2, 4, 8, 8, 8), (1, 2, 3, 1, 7)]
)
@pytest.mark.parametrize("padding", [None, 0.0, 1.5, -2.0])
@pytest.mark.parametrize("p", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_stem_equals_its_parts(
    path: str, shape: tuple[int, ...], padding: float | None, p: float, dtype: torch.dtype
) -> None:
    # Rounded, so that windows hold equal maxima: the gradient must go to the first of them.
    x = (torch.randn(shape, generator=generator()) * 2).round().to(dtype).requires_grad_()
    shifts = draw_shifts(shape, max_shift=1.0, p=p, generator=generator(1))
    ours, theirs = relu_shift_max_pool(x, shifts, padding), separately(x, shifts, padding)
    assert torch.equal(ours, theirs)
    weights = torch.randn(ours.shape, dtype=dtype, generator=generator(2))
    grads = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs)]
    assert torch.equal(*grads)
    with torch.no_grad():
        assert torch.equal(relu_shift_max_pool(x, shifts, padding), theirs)


def test_fused_stem_with_threads_and_with_numbers_that_are_none(path: str) -> None:
    x = torch.randn(1, 16, 20, 40, 60, generator=generator())
    x[0, 3, 5:9, 10, 20:30] = float("nan")
    x[0, 4, 5, 5, 5] = -float("nan")
    x[0, 5, 1, 1, 1], x[0, 5, 9, 9, 9] = float("inf"), -float("inf")
    shifts = draw_shifts(x.shape, p=1.0, generator=generator(3))
    ours, theirs = relu_shift_max_pool(x, shifts), separately(x, shifts, None)
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any()
    assert torch.equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0))


def test_fused_stem_in_other_types_and_layouts() -> None:
    x = torch.randn(2, 4, 6, 6, 6, generator=generator())
    shifts = draw_shifts(x.shape, p=1.0, generator=generator(1))
    wanted = separately(x, shifts, None)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(relu_shift_max_pool(last, shifts), wanted)
    low = x.bfloat16()
    assert torch.equal(relu_shift_max_pool(low, shifts), separately(low, shifts, None))


ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "triton", "scipy", "pandas", "SimpleITK", "sklearn",
                                  "skimage", "joblib", "yaml", "pooch", "IPython", "matplotlib"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from covidmtl_core import losses, models, shift3d
x = torch.randn(2, 1, 16, 16, 16)
network = models.CovidMTL(shift=shift3d.Shift3D(p=1.0))
outputs = network(x, torch.randn(2, 375))
labels = {task: torch.tensor([0, 1]) for task in outputs}
losses.RandomWeightedLoss()(losses.task_losses(outputs, labels)).backward()
assert shift3d._fast_path("cpu") is None
"""


def test_works_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-W", "error", "-c", ALONE]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)})


INTERPRETED = """
import torch
from covidmtl_core import _shift3d_triton as t, shift3d as s
for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
    for shape in ((2, 3, 4, 6, 5), (1, 5, 7, 3, 9), (2, 1, 1, 1, 4)):
        for padding in (None, 1, 2):
            for layout in (torch.contiguous_format, torch.channels_last_3d):
                x = (torch.randn(shape) * 3).to(dtype).contiguous(memory_format=layout)
                shifts = s.draw_shifts(shape, max_shift=1.0, p=0.7)
                distance = s._within(x.shape, *shifts, padding is not None)
                bits = s._BITS[x.element_size()]
                fill = None
                if padding is not None:
                    fill = int(torch.tensor([padding], dtype=dtype).view(bits))
                shifted = t.shift_on_cuda(x.view(bits), shifts.axis, distance, fill).view(dtype)
                assert torch.equal(shifted, s.shift3d(x, shifts, padding))
                assert shifted.stride() == x.stride()
"""


def test_triton_kernel_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-c", INTERPRETED]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [None, 2.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_cuda_gives_the_bits_of_the_cpu(
    dtype: torch.dtype, padding: float | None, layout: torch.memory_format
) -> None:
    assert s3d._fast_path("cuda") is not None
    x = torch.randn(2, 8, 20, 33, 47).to(dtype).contiguous(memory_format=layout)
    shifts = draw_shifts(x.shape, p=1.0, generator=generator(1))
    on_card = x.cuda().requires_grad_()
    shifted = shift3d(on_card, shifts, padding)
    assert torch.equal(shifted.cpu(), shift3d(x, shifts, padding))
    (gradient,) = torch.autograd.grad((shifted * on_card.detach()).sum(), on_card)
    opposite = Shifts(shifts.axis, -shifts.distance)
    wanted = shift3d(x, opposite, None if padding is None else 0.0)
    assert torch.equal(gradient.cpu(), wanted)
