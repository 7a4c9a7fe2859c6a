"""The networks: exact sizes, equality with plain PyTorch, checkpointing, inference, transfer."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from covidmtl_core import shift3d as s3d
from covidmtl_core.benchmarks.plain_shift3d import plain_squeezenet3d
from covidmtl_core.models import (
    CovidMTL,
    decovnet,
    for_inference,
    layers,
    resnet3d34,
    shiftnet3d,
    squeezenet3d,
    transfer_severity,
)
from covidmtl_core.shift3d import Shift3D


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def always(seed: int = 1) -> Shift3D:
    return Shift3D(p=1.0, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (squeezenet3d, 3_660_034),
        (shiftnet3d, 3_660_034),
        (lambda: squeezenet3d(3), 3_660_547),
        (lambda: squeezenet3d().trunk, 3_659_008),
        (resnet3d34, 63_460_930),
        (decovnet, 343_058),
        (CovidMTL, 3_848_199),
        (lambda: CovidMTL(use_features=False), 3_708_487),
        (lambda: CovidMTL(use_volume=False), 139_719),
    ],
)
def test_parameters_are_those_released(make: Callable[[], nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        assert size(make()) == parameters


@pytest.mark.parametrize(
    ("make", "gflop"), [(squeezenet3d, 87.1), (resnet3d34, 104.6), (decovnet, 48.1)]
)
def test_operations_are_those_released(make: Callable[[], nn.Module], gflop: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        counter = FlopCounterMode(display=False)
        model = make().eval()
        with counter:
            model(torch.empty(1, 1, 200, 250, 250))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.06)


@pytest.mark.parametrize("make", [squeezenet3d, shiftnet3d, resnet3d34, decovnet])
@pytest.mark.parametrize("shape", [(2, 1, 20, 33, 47), (2, 1, 65, 64, 16), (1, 1, 1, 1, 1)])
def test_any_input_size(make: Callable[[int], nn.Module], shape: tuple[int, ...]) -> None:
    model = seeded(lambda: make(3)).train(shape[0] > 1)
    out = model(torch.randn(shape))
    assert out.shape == (shape[0], 3) and out.isfinite().all()


@pytest.mark.parametrize("fast", [True, False])
def test_squeezenet_equals_a_plain_one(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(s3d, "_fast_path", lambda device: None)
    plain, ours = plain_squeezenet3d(), squeezenet3d()
    pairs = zip(ours.state_dict().values(), plain.state_dict().values(), strict=True)
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    x = torch.randn(2, 1, 40, 36, 50)
    grads = []
    for model in (ours, plain):
        torch.manual_seed(1)
        model.train()(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for mine, other in zip(*grads, strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_convolutions_are_initialised_as_he_et_al() -> None:
    weight = seeded(resnet3d34).stages[3][1].first.conv.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (512 * 27)) ** 0.5, rel=0.01)
    weight = seeded(squeezenet3d).trunk.stages[3][1].expand3.conv.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (256 * 27)) ** 0.5, rel=0.01)


def test_shift_acts_in_training_only() -> None:
    x = torch.randn(2, 1, 20, 20, 20)
    without = seeded(squeezenet3d)
    with_shift = shiftnet3d(shift=always())
    with_shift.load_state_dict(without.state_dict())
    assert torch.equal(with_shift.eval()(x), without.eval()(x))
    for model in (without, with_shift):
        model.train()
        model.head[0].eval()
    assert not torch.allclose(with_shift(x), without(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda c: shiftnet3d(shift=always(), checkpointing=c),
        lambda c: resnet3d34(shift=always(), checkpointing=c),
        lambda c: decovnet(checkpointing=c),
    ],
)
def test_checkpointing_changes_nothing(make: Callable[[bool], nn.Module]) -> None:
    x = torch.randn(2, 1, 24, 24, 24)
    trained = []
    for checkpointing in (False, True):
        model = seeded(lambda c=checkpointing: make(c)).train()
        for _ in range(2):
            torch.manual_seed(2)
            model.zero_grad()
            model(x).square().sum().backward()
        trained.append(model)
    plain, saving = trained
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for (name, a), b in zip(plain.state_dict().items(), saving.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stems_batch_norm_equals_pytorchs(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 1, 21, 24, 26, dtype=dtype) * 5 + 40
    trained = []
    for ours in (True, False):
        monkeypatch.setattr(layers, "_is_plain", lambda norm, x, ours=ours: ours)
        stem = seeded(lambda: shiftnet3d(shift=always())).trunk.stem.to(dtype).train()
        nn.init.uniform_(stem.conv.norm.weight, 0.5, 2)
        given = x.clone().requires_grad_()
        stem(given).square().sum().backward()
        weights = stem.conv.conv.weight, *stem.conv.norm.parameters()
        trained.append((given.grad, *(p.grad for p in weights), *stem.buffers()))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for a, b in zip(*trained, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_checkpointing_can_be_compiled() -> None:
    x = torch.randn(2, 1, 24, 24, 24)
    eager = seeded(lambda: shiftnet3d(shift=always())).train()
    model = seeded(lambda: shiftnet3d(shift=always(), checkpointing=True)).train()
    compiled = torch.compile(model, backend="aot_eager")
    for network in (eager, compiled):
        torch.manual_seed(2)
        network(x).square().sum().backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [shiftnet3d, resnet3d34, decovnet])
def test_inference_copy_predicts_the_same(make: Callable[[], nn.Module]) -> None:
    model = seeded(make)
    x = torch.randn(2, 1, 40, 36, 50)
    with torch.no_grad():
        model.train()(x * 2 + 1)
        before = copy.deepcopy(model.state_dict())
        faster = for_inference(model)
        for given in (x, x[:1]):  # oneDNN takes single samples by another path
            assert torch.allclose(faster(given), model.eval()(given), rtol=1e-3, atol=1e-4)
        synced = for_inference(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
        assert torch.equal(synced(x), faster(x))
        assert torch.allclose(faster.double()(x.double()).float(), faster.float()(x), atol=1e-4)
    assert all(torch.equal(a, before[k]) for k, a in model.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm3d) for m in faster.modules())
    assert not any(p.requires_grad for p in faster.parameters())


@pytest.mark.parametrize("use_volume", [True, False])
@pytest.mark.parametrize("use_features", [True, False])
def test_covid_mtl_takes_what_it_is_made_for(use_volume: bool, use_features: bool) -> None:
    if not (use_volume or use_features):
        with pytest.raises(ValueError, match="volumes or features"):
            CovidMTL(use_volume=False, use_features=False)
        return
    tasks = {"ct": 2, "age group": 5}
    model = CovidMTL(tasks, n_features=7, use_volume=use_volume, use_features=use_features)
    inputs = {"volume": torch.randn(2, 1, 20, 24, 28), "features": torch.randn(2, 7)}
    given = [use_volume, use_features]
    wanted = {k: v if use else None for (k, v), use in zip(inputs.items(), given, strict=True)}
    outputs = model(**wanted)
    assert {task: out.shape for task, out in outputs.items()} == {"ct": (2, 2), "age group": (2, 5)}
    sum(out.sum() for out in outputs.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    if use_volume and use_features:
        with pytest.raises(ValueError, match="2 volumes and 1"):
            model(inputs["volume"], inputs["features"][:1])
    if use_volume != use_features:
        with pytest.raises(ValueError, match="takes no"):
            model(**inputs)
    with pytest.raises(ValueError, match="needs"):
        model()


def test_covid_mtl_names_wrong_inputs() -> None:
    model = CovidMTL()
    volume, features = torch.randn(1, 1, 16, 16, 16), torch.randn(1, 375)
    with pytest.raises(ValueError, match=r"\(1, 3\); it must be \(N, 375\)"):
        model(volume, features[:, :3])
    with pytest.raises(ValueError, match=r"\(N, 1, D, H, W\)"):
        model(volume[0], features)
    with pytest.raises(ValueError, match="at least one task"):
        CovidMTL({})


def test_covid_mtl_has_shift3d_unless_told_otherwise() -> None:
    own = always()
    assert isinstance(CovidMTL().trunk.stem.shift, Shift3D)
    assert CovidMTL(shift=False).trunk.stem.shift is None
    assert CovidMTL(shift=own).trunk.stem.shift is own


@pytest.mark.parametrize("use_features", [True, False])
def test_transfer_trains_new_heads_on_a_frozen_trunk(use_features: bool) -> None:
    torch.manual_seed(0)
    source = CovidMTL({"ct": 2, "nat": 2}, shift=always(), use_features=use_features)
    before = copy.deepcopy(source.state_dict())
    model = transfer_severity(source).train()
    assert set(model.tasks) == {"severity"}
    inputs = [torch.randn(4, 1, 24, 24, 24)]
    inputs += [torch.randn(4, 375)] if use_features else []
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trunk = copy.deepcopy(model.trunk.state_dict())
    head = copy.deepcopy(model.heads["severity"].state_dict())
    seen = model.trunk(inputs[0])
    assert not torch.equal(seen, model.trunk(inputs[0])), "Shift3D stays on"
    for _ in range(2):
        optimiser.zero_grad()
        model(*inputs)["severity"].square().sum().backward()
        optimiser.step()
    assert all(torch.equal(a, trunk[k]) for k, a in model.trunk.state_dict().items())
    assert any(not torch.equal(a, head[k]) for k, a in model.heads["severity"].state_dict().items())
    assert all(torch.equal(a, before[k]) for k, a in source.state_dict().items())
    assert model.eval()(*inputs)["severity"].shape == (4, 3)
    model.trunk.stem.shift = None
    assert torch.equal(model.train().trunk(inputs[0]), model.trunk(inputs[0]))


def test_a_frozen_trunk_stays_frozen_with_synchronised_norms() -> None:
    model = transfer_severity(CovidMTL({"ct": 2}, use_features=False))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    norms = [m for m in model.trunk.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms and not any(norm.training for norm in norms)


def test_the_layer_alone_can_be_switched_off() -> None:
    x = torch.randn(2, 1, 16, 16, 16)
    model = shiftnet3d(shift=always()).train()
    model.trunk.stem.shift.eval()
    assert torch.equal(model.trunk(x), model.trunk(x))


def test_transfer_needs_a_trunk() -> None:
    with pytest.raises(ValueError, match="no trunk"):
        transfer_severity(CovidMTL(use_volume=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_training_step_on_cuda_in_bfloat16() -> None:
    model = CovidMTL(checkpointing=True).cuda().to(memory_format=torch.channels_last_3d)
    with torch.autocast("cuda", torch.bfloat16):
        volume = torch.randn(2, 1, 48, 48, 48, device="cuda")
        outputs = model(volume, torch.randn(2, 375, device="cuda"))
    sum(out.float().sum() for out in outputs.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
