"""Class activation maps: which parts of a volume speak for a class (section 6, Fig 7)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covidmtl_core.errors import ParameterError
from covidmtl_core.models import CovidMTL


def class_activation_map(
    model: CovidMTL,
    volume: Tensor,
    task: str,
    positive: int = 1,
    negative: int = 0,
    layer: str | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """What each place adds to one class's logit, less what it adds to another's.

    From the last convolution, as in the paper, the map is exact: its mean over all places and the
    classifier's bias (and what features add) are the logit. From an earlier layer it is finer and
    approximate: gradient times activation, summed over the maps (HiResCAM, Draelos and Carin 2020).

    Args:
        model: With a trunk; used in eval mode and left in the mode that it was in.
        volume: (N, 1, D, H, W), standardised.
        task: One of the model's.
        positive: Class that positive values speak for.
        negative: Class that negative values speak for.
        layer: None for the last convolution, else a submodule's name: `trunk.stages.1` halves the
            volume three times, `trunk.stem` twice.
        features: (N, n_features), if the model takes them.

    Returns:
        (N, d, h, w), float32, on the layer's grid.

    Raises:
        ParameterError: The model has no trunk, or no such task or layer.
    """
    if model.trunk is None or task not in model.tasks:
        raise ParameterError(f"there is no map for {task!r}: a task and a trunk are needed.")
    name = f"heads.{task}" if layer is None else layer
    try:
        part = model.get_submodule(name)
    except AttributeError:
        raise ParameterError(f"the network has no layer {name!r}.") from None
    was_training, kept = model.training, list[Tensor]()
    device = next(model.parameters()).device
    volume, features = volume.to(device), None if features is None else features.to(device)
    model.eval()
    try:
        if layer is None:
            return _of_last_convolution(model, volume, task, positive, negative).cpu()
        hook = part.register_forward_hook(lambda _, __, output: kept.append(output))
        try:
            with torch.enable_grad():
                logits = model(volume.detach().requires_grad_(), features)[task]
                wanted = (logits[:, positive] - logits[:, negative]).sum()
                (gradient,) = torch.autograd.grad(wanted, kept[0])
        finally:
            hook.remove()
        places = kept[0][0, 0].numel()
        return (gradient * kept[0]).sum(1).detach().cpu() * places
    finally:
        model.train(was_training)


@torch.no_grad()
def _of_last_convolution(
    model: CovidMTL, volume: Tensor, task: str, positive: int, negative: int
) -> Tensor:
    assert model.trunk is not None
    maps = model.trunk(volume)
    for module in model.heads[task].children():
        if isinstance(module, nn.AdaptiveAvgPool3d):
            break
        maps = module(maps)
    weight = model.get_parameter(f"classifiers.{task}.weight")
    difference = (weight[positive] - weight[negative])[: maps.shape[1]]
    return torch.einsum("nc...,c->n...", torch.relu(maps), difference)


def enlarged(found: Tensor, size: tuple[int, int, int]) -> Tensor:
    """A map (N, d, h, w) on a volume's grid (D, H, W), by linear interpolation."""
    return F.interpolate(found[:, None], size, mode="trilinear", align_corners=False)[:, 0]


def mass_inside(found: Tensor, region: Tensor, lungs: Tensor) -> tuple[float, float]:
    """How much of a map lies where it should.

    Args:
        found: (D, H, W); what is below 0 counts for nothing.
        region: (D, H, W) boolean, for instance the lesions.
        lungs: (D, H, W) boolean; nothing outside counts.

    Returns:
        The region's share of the map's mass, and of the lungs' volume. A map that knows nothing
        gives two equal numbers.

    Raises:
        ParameterError: The lungs are empty, or the map is nowhere above 0 in them.
    """
    mass = found.clamp(min=0).double() * lungs
    if not lungs.any() or not mass.sum():
        raise ParameterError("there is no lung, or the map is nowhere above 0 in it.")
    inside = region.bool() & lungs
    return float(mass[inside].sum() / mass.sum()), float(inside.sum() / lungs.sum())
