"""A synthetic thorax of known truth: anatomy, COVID-19 lesions, scanner; written as a DICOM series.

The anatomy is a set of implicit surfaces in standard millimetres (u to the patient's left, v to the
back, w to the head), stretched and turned for each patient, plus trees of capsules for vessels,
airways and ribs. Nothing here is patient data; it exists so that each step of the pipeline can be
measured against a truth that nobody had to draw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from covidmtl_core.errors import ParameterError
from covidmtl_core.segmentation import LEFT, RIGHT

SIZE = (340, 390, 390)
"""Voxels (z, y, x) of the released volumes, at 1 mm."""

_SLAB = 20

_REACH_MM = 300.0


@dataclass(frozen=True)
class Patient:
    """One patient's body, disease and scanner. `draw_patient` makes plausible ones.

    Attributes:
        seed: Fixes everything that is random.
        stretch: Size against the standard body, for (w, v, u).
        shift: Position of the body's centre in mm, (z, y, x).
        turn: Rotation about the long axis in degrees.
        fat: Thickness of subcutaneous fat in mm.
        parenchyma: Density of healthy lung in HU, at mid-height of the lying patient.
        noise: Standard deviation of the noise in HU.
        burden: Share of the lungs' volume that is infected, 0 to 0.8.
        consolidation: Share of the infected volume that is consolidated, 0 to 1.
        paving: Density in HU that crazy paving adds to ground glass; 0 for none.
        bands: Number of fibrous bands.
        white: Share of one lung, from below, that is consolidated throughout.
        blocked: Is the left main bronchus blocked? Then no airway joins the lungs.
        padding: Value outside the scanner's round field of view in HU; None for no padding.
        field_of_view: Diameter of the round field of view in mm.
        repeat: Number of the scan; the same patient scanned again has other noise.
    """

    seed: int
    stretch: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn: float = 0.0
    fat: float = 15.0
    parenchyma: float = -865.0
    noise: float = 35.0
    burden: float = 0.0
    consolidation: float = 0.2
    paving: float = 0.0
    bands: int = 0
    white: float = 0.0
    blocked: bool = False
    padding: int | None = None
    field_of_view: float = 390.0
    repeat: int = 0


@dataclass(frozen=True)
class Phantom:
    """A synthetic scan and its truth, all in one grid.

    Attributes:
        image: int16, HU.
        lungs: uint8; 1 right lung, 2 left lung; vessels and lesions included, trachea and main
            bronchi not.
        lesions: uint8; 1 ground glass, 2 consolidation, 3 fibrous band.
    """

    image: sitk.Image
    lungs: sitk.Image
    lesions: sitk.Image


def draw_patient(seed: int, burden: float = 0.0, **changes: Any) -> Patient:
    """A patient of random size, pose, density and scanner.

    Args:
        seed: Fixes the patient; two seeds give two patients.
        burden: Share of the lungs' volume that is infected, 0 to 0.8.
        **changes: Attributes of `Patient` to set instead of drawing them.

    Raises:
        ParameterError: `burden` is out of range.
    """
    if not 0 <= burden <= 0.8:
        raise ParameterError(f"burden is {burden}; it is a share of the lungs, from 0 to 0.8.")
    rng = np.random.default_rng([seed, 1])
    patient = Patient(
        seed=seed,
        stretch=tuple(rng.normal([0.94, 0.95, 0.95], [0.09, 0.05, 0.05])),
        shift=tuple(rng.normal(0, [8.0, 8.0, 6.0])),
        turn=rng.normal(0, 3),
        fat=float(np.exp(rng.normal(np.log(13), 0.4))),
        parenchyma=rng.normal(-880, 28),
        noise=float(np.exp(rng.normal(np.log(50), 0.4))),
        burden=burden,
        consolidation=float(np.clip(rng.normal(0.15 + 0.5 * burden, 0.08), 0, 0.6)),
        paving=float(rng.choice([0, 150]) if burden > 0.03 else 0),
        bands=int(rng.integers(0, 6)) if burden > 0.01 else 0,
    )
    return replace(patient, **changes)


def make_phantom(
    patient: Patient,
    size: Sequence[int] = SIZE,
    spacing_mm: float | Sequence[float] = 1.0,
    device: str | torch.device = "cpu",
) -> Phantom:
    """Scan a patient.

    The same patient has the same body and lesions on any grid; noise is drawn for each grid and
    device.

    Args:
        patient: From `draw_patient`.
        size: Voxels (z, y, x).
        spacing_mm: Voxel spacing, one number or (z, y, x).
        device: Where to compute.

    Raises:
        ParameterError: Size or spacing cannot be used.
    """
    spacing = np.broadcast_to(np.asarray(spacing_mm, float), 3)
    if len(size) != 3 or min(size) < 8 or spacing.min() <= 0:
        raise ParameterError(
            f"size {tuple(size)} and spacing {spacing_mm}: three sizes of at least 8 voxels and "
            "spacings above 0 mm are needed."
        )
    body = _Body(patient, tuple(size), spacing, torch.device(device))
    hu, lungs, lesions = body.scan()
    origin = (body.axes[2][0].item(), body.axes[1][0].item(), body.axes[0][0].item())

    def image(voxels: Tensor) -> sitk.Image:
        made = sitk.GetImageFromArray(voxels.cpu().numpy())
        made.SetSpacing(tuple(map(float, spacing[::-1])))
        made.SetOrigin(origin)
        return made

    return Phantom(image(hu), image(lungs), image(lesions))


# --- the body --------------------------------------------------------------------------------


class _Body:
    """The implicit surfaces of one patient on one grid. Standard mm are those after `pose`."""

    def __init__(
        self, patient: Patient, size: tuple[int, ...], spacing: NDArray[Any], device: torch.device
    ):
        self.patient, self.size, self.spacing, self.device = patient, size, spacing, device
        self.rng = np.random.default_rng([patient.seed, 2])
        self.generator = torch.Generator(device).manual_seed(
            patient.seed + 1_000_003 * patient.repeat
        )
        self.axes = [
            (torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2) * float(s)
            for n, s in zip(size, spacing, strict=True)
        ]
        self.shape_noise = _Field(self, knots_mm=38, sd=2.5)
        self.lesion_noise = _Field(self, knots_mm=15, sd=1.0)
        self.density_noise = _Field(self, knots_mm=25, sd=12.0)
        self.fine_noise = _Field(self, knots_mm=5, sd=1.0)
        self.lean = float(self.rng.normal(0, 0.35))
        self.white_side = LEFT if self.rng.random() < 0.5 else RIGHT
        self.gas = self._draw_gas()

    def pose(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Standard coordinates (w, v, u) of the planes z: (k, 1, 1), (1, y, x), (1, y, x)."""
        p = self.patient
        angle = math.radians(p.turn)
        y = self.axes[1][None, :, None] - p.shift[1]
        x = self.axes[2][None, None, :] - p.shift[2]
        u = (x * math.cos(angle) + y * math.sin(angle)) / p.stretch[2]
        v = (y * math.cos(angle) - x * math.sin(angle)) / p.stretch[1]
        w = (z[:, None, None] - p.shift[0]) / p.stretch[0] + 60.0
        return w, v, u

    def place(self, points: NDArray[Any]) -> NDArray[Any]:
        """Grid position in mm, (z, y, x), of standard points (w, v, u)."""
        p = self.patient
        angle = math.radians(p.turn)
        v, u = points[:, 1] * p.stretch[1], points[:, 2] * p.stretch[2]
        return np.stack(
            [
                (points[:, 0] - 60.0) * p.stretch[0] + p.shift[0],
                v * math.cos(angle) + u * math.sin(angle) + p.shift[1],
                u * math.cos(angle) - v * math.sin(angle) + p.shift[2],
            ],
            axis=1,
        )

    # Each surface is a depth in mm, positive inside.

    @staticmethod
    def cavity(w: Tensor, v: Tensor, u: Tensor) -> Tensor:
        """Depth in the rib cage, which closes towards the apex at w = 190."""
        t = ((w + 70) / 260).clamp(0, 1)
        taper = (1 - ((t - 0.3).clamp(min=0) / 0.7) ** 2.6).clamp(min=1e-3).sqrt()
        half_width, half_depth = 128 * taper, 92 * taper**0.8
        reach = _power(u / half_width, v / half_depth, 2.6)
        return (1 - reach) * torch.minimum(half_width, half_depth)

    def mediastinum(self, w: Tensor, v: Tensor, u: Tensor) -> Tensor:
        """Depth in what lies between the lungs: junction, great vessels, heart, spine, hila."""
        junction = 4.5 + 0.1 * (v + 60).clamp(min=0) - (u - 2).abs()
        core = _ellipse(u, v + 8, 33, 52) + 0 * w
        core = torch.where(w > 40, core, core - (40 - w) * 0.5)
        heart = _ellipsoid(u - 24, v + 34, w - 5, 66, 54, 62)
        spine = _ellipse(u, v - 72, 27, 30) + 0 * w
        aorta = _ellipse(u - 27, v - 40, 14, 14) + 0 * w
        hilum = _ellipsoid(u.abs() - 30, v - 4, w - 52, 22, 18, 27)
        depth = junction + 0 * w
        for part in (core, heart, spine, aorta, hilum):
            depth = torch.maximum(depth, part)
        return depth

    @staticmethod
    def above_diaphragm(w: Tensor, v: Tensor, u: Tensor) -> Tensor:
        """Height over the two domes."""
        top = torch.where(u < 0, 8.0, -8.0)
        dome = top - 62 * _power((u.abs() - 62) / 78, (v + 22) / 92, 2.0) ** 2
        return (w - dome) * 0.8

    def lung(self, w: Tensor, v: Tensor, u: Tensor, roughness: Tensor) -> tuple[Tensor, Tensor]:
        """Depth in the lungs, and depth below the outer surface only (wall and diaphragm)."""
        outer = torch.minimum(self.cavity(w, v, u), self.above_diaphragm(w, v, u)) + roughness
        return torch.minimum(outer, roughness * 0.5 - self.mediastinum(w, v, u)), outer

    # --- the scan ---

    def scan(self) -> tuple[Tensor, Tensor, Tensor]:
        """HU (int16), lungs and lesions (uint8), each of `size`."""
        inside = self._inside_points()
        vessels = self._rasterise(self._vessels(inside))
        hard = self._rasterise(self._ribs())
        walls, lumens = self._airways(inside)
        wall, lumen = self._rasterise(walls), self._rasterise(lumens)
        bands = self._rasterise(self._bands(inside))
        thresholds = self._lesion_thresholds(inside)
        hu = torch.empty(self.size, dtype=torch.float32, device=self.device)
        lungs = torch.zeros(self.size, dtype=torch.uint8, device=self.device)
        lesions = torch.zeros_like(lungs)
        for start in range(0, self.size[0], _SLAB):
            rows = slice(start, min(start + _SLAB, self.size[0]))
            w, v, u = self.pose(self.axes[0][rows])
            tissue = self._soft_tissue(w, v, u, rows)
            depth, outer = self.lung(w, v, u, self.shape_noise(rows))
            lung = depth > 0
            side = torch.where(u < 2, RIGHT, LEFT).to(torch.uint8)
            lungs[rows] = lung * side
            air, lesion = self._parenchyma(w, v, u, outer, rows, thresholds)
            lesions[rows] = torch.where((bands[rows] > 0.4), 3, lesion) * lung
            air = _mix(_mix(air, -40.0, bands[rows]), 45.0, vessels[rows])
            tissue = _mix(torch.where(lung, air, tissue), 420.0, hard[rows] * ~lung)
            hu[rows] = _mix(_mix(tissue, 20.0, wall[rows]), -1000.0, lumen[rows])
        return self._acquire(hu), lungs, lesions

    def _inside_points(self) -> NDArray[Any]:
        """Random points in the lungs, standard mm (w, v, u), with their depth below the pleura."""
        n = 60_000
        points = self.rng.uniform([-85, -95, -130], [192, 95, 130], (n, 3))
        w, v, u = torch.tensor(points.T, dtype=torch.float32)
        depth, outer = self.lung(w, v, u, torch.zeros(()))
        keep = (depth > 1.5).numpy()
        return np.column_stack([points, outer.numpy()])[keep]

    def _soft_tissue(self, w: Tensor, v: Tensor, u: Tensor, rows: slice) -> Tensor:
        """Everything but lungs, bones and airways: body wall, mediastinum, abdomen, gas, table."""
        p = self.patient
        wall = 20.0
        t = ((w - 90) / 120).clamp(0, 1)
        half_width = 128 + wall + p.fat + 22 * t
        half_depth = 92 + wall + 0.8 * p.fat - 18 * t
        reach = _power(u / half_width, v / half_depth, 2.8)
        skin = (1 - reach) * half_depth
        cavity = self.cavity(w, v, u)
        marbling = self.lesion_noise(rows)
        hu = torch.full_like(skin, -1000.0)
        hu[skin > 0] = 35.0
        hu[skin > 2] = -100.0
        muscle = (cavity > -wall + 5 * marbling) & (skin > 3)
        hu = torch.where(muscle, torch.where(marbling > 1.6, -70.0, 50.0), hu)
        abdomen = (cavity > 0) & (self.above_diaphragm(w, v, u) < -3)
        liver = (u < 25) & (marbling < 2.2)
        hu = torch.where(abdomen, torch.where(liver, 60.0, 30.0 - 110.0 * (marbling > 0.6)), hu)
        mediastinal_fat = (cavity > 6) & ~abdomen & (marbling > 0.9)
        heart = _ellipsoid(u - 24, v + 34, w - 5, 62, 50, 58) > 0
        hu = torch.where(mediastinal_fat & ~heart, -85.0, hu)
        vertebra = (_ellipse(u, v - 74, 19, 16) + 0 * w > 0) & (torch.remainder(w, 27) > 5)
        hu = torch.where(vertebra & (skin > 5), 210.0 + 40 * marbling, hu)
        for centre, radii in self.gas:
            inside = _ellipsoid(
                u - centre[2], v - centre[1], w - centre[0], radii[2], radii[1], radii[0]
            )
            hu = torch.where((inside > 0) & (skin > 8), -1000.0, hu)
        back = half_depth.max() + 4 - 0.0006 * u**2
        table = (v - back).abs()
        hu = torch.where((v - back > -3) & (v - back < 25) & (u.abs() < 190), -930.0, hu)
        return torch.where((table < 1.5) & (u.abs() < 190), 60.0, hu)

    def _draw_gas(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Centres and radii (w, v, u) of gas: the stomach's bubble, colon, oesophagus."""
        rng = self.rng
        gas = [(np.array([-38, -38, 62.0]), rng.uniform([9, 12, 14], [16, 22, 26]))]
        for _ in range(rng.integers(0, 4)):
            centre = rng.uniform([-95, -70, -95], [-62, -40, 95])
            gas.append((centre, rng.uniform([10, 10, 14], [16, 18, 30])))
        gas.append((np.array([rng.uniform(60, 130), 27, 3.0]), np.array([14, 2.5, 3.5])))
        return gas

    def _lesion_potential(
        self, w: Tensor, v: Tensor, u: Tensor, outer: Tensor, noise: Tensor
    ) -> Tensor:
        """What makes a place likely to be infected: near the pleura, low, at the back."""
        side = torch.where(u < 2, -self.lean, self.lean)
        low = ((60 - w) / 130).clamp(-1, 1)
        return noise + 1.3 * torch.exp(-outer / 16) + 0.9 * low + 0.006 * v + side

    def _lesion_thresholds(self, inside: NDArray[Any]) -> tuple[float, float, float]:
        """Potential above which tissue is infected and consolidated; w below which it is white."""
        p = self.patient
        w, v, u, outer = torch.tensor(inside.T, dtype=torch.float32, device=self.device)
        noise = self.lesion_noise.at(self.place(inside[:, :3]))
        potential = self._lesion_potential(w, v, u, outer, noise)
        solid = p.burden * p.consolidation
        levels = [
            torch.quantile(potential, 1 - share).item() if share > 0 else math.inf
            for share in (p.burden, solid)
        ]
        own = w[(u < 2) == (self.white_side == RIGHT)]
        level = torch.quantile(own, p.white).item() if p.white > 0 else -math.inf
        return levels[0], levels[1], level

    def _parenchyma(
        self,
        w: Tensor,
        v: Tensor,
        u: Tensor,
        outer: Tensor,
        rows: slice,
        thresholds: tuple[float, float, float],
    ) -> tuple[Tensor, Tensor]:
        """HU of lung tissue and what is wrong with it (0 nothing, 1 ground glass, 2 solid)."""
        p = self.patient
        noise, fine = self.lesion_noise(rows), self.fine_noise(rows)
        hu = p.parenchyma + 0.8 * v + self.density_noise(rows) + 32 * fine
        oblique = w - 20 - 0.75 * v
        fissure = oblique.abs() < 1
        fissure |= ((w - 32 - 0.1 * u).abs() < 0.8) & (oblique > 0) & (u < 2)
        hu += 230 * fissure
        sick, solid, white = thresholds
        potential = self._lesion_potential(w, v, u, outer, noise) + 0.08 * fine
        glass = ((potential - sick) / 0.3 + 0.25).clamp(0, 1)
        paving = p.paving * (fine.abs() < 0.22)
        hu = hu + glass * (-480 + 110 * noise.clamp(-1.5, 1.5) + paving - hu)
        own = (u < 2) == (self.white_side == RIGHT)
        dense = ((potential - solid) / 0.25 + 0.5).clamp(0, 1)
        dense = torch.maximum(dense, ((white - w) / 3 + 0.5).clamp(0, 1) * own)
        hu = hu + dense * (15 - hu)
        lesion = (potential > sick).to(torch.uint8)
        return hu, torch.where(dense > 0.5, 2, lesion)

    def _vessels(self, inside: NDArray[Any]) -> NDArray[Any]:
        """Two trees for each lung, as capsules."""
        trees = []
        for side, hilum in ((-1, [52, 2, -38]), (1, [50, 4, 42])):
            own = inside[np.sign(inside[:, 2] - 2) == side, :3]
            for offset in (0, 12):
                root = np.array(hilum, float) - [offset, offset, 0]
                targets = own[self.rng.choice(len(own), min(600, len(own)), replace=False)]
                trees.append(_tree(root, targets, self.rng, step=8.0, terminal=1.1))
        return np.concatenate(trees)

    def _airways(self, inside: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Trachea, main bronchi and a few generations inside the lungs: walls and lumens."""
        carina = np.array([72.0, 8, 0])
        hila = {-1: np.array([50.0, 6, -36]), 1: np.array([46.0, 8, 42])}
        width = self.rng.normal(8.6, 0.9)
        tubes = [_tube(carina + np.array([[150, -8, 0], [60, -3, 0], [0, 0, 0]]), width)]
        for side, hilum in hila.items():
            if not (self.patient.blocked and side > 0):
                way = [carina, (carina + hilum) / 2 + [-2, 0, 0], hilum]
                tubes.append(_tube(way, 0.7 * width))
            own = inside[np.sign(inside[:, 2] - 2) == side, :3]
            targets = own[self.rng.choice(len(own), 14, replace=False)]
            tubes.append(_tree(hilum, targets, self.rng, step=9.0, terminal=1.1))
        lumens = np.concatenate(tubes)
        walls = lumens.copy()
        walls[:, 6] += 0.6 + 0.12 * lumens[:, 6]
        return walls, lumens

    def _ribs(self) -> NDArray[Any]:
        """Twelve pairs of ribs that slope down towards the front, and the sternum."""
        capsules = [_tube([[150, -97, 2], [60, -101, 2], [0, -103, 2]], 7.0)]
        angles = np.linspace(0.12, 0.86, 22) * math.pi
        for level in np.linspace(-60, 182, 12):
            height = level - 55 * (1 - np.cos(angles)) / 2
            t = np.clip((height + 70) / 260, 0, 1)
            taper = np.sqrt(np.clip(1 - (np.clip(t - 0.3, 0, None) / 0.7) ** 2.6, 0.05, None))
            bend = np.abs(np.sin(angles)) ** (2 / 2.6), np.cos(angles)
            u = (128 * taper + 7) * bend[0]
            v = (92 * taper**0.8 + 7) * np.sign(bend[1]) * np.abs(bend[1]) ** (2 / 2.6)
            for side in (-1, 1):
                capsules.append(_tube(np.stack([height, v, side * u], 1), 4.2))
        return np.concatenate(capsules)

    def _bands(self, inside: NDArray[Any]) -> NDArray[Any]:
        """Fibrous bands: short thick lines below the pleura of the lower lobes."""
        near = inside[(inside[:, 3] < 12) & (inside[:, 0] < 40)]
        bands = [np.empty((0, 7))]
        for start in near[self.rng.choice(len(near), self.patient.bands)]:
            direction = self.rng.normal(size=3) * [0.4, 1, 1]
            end = start[:3] + direction / np.linalg.norm(direction) * self.rng.uniform(20, 45)
            bands.append(_tube([start[:3], end], self.rng.uniform(1.2, 2.2)))
        return np.concatenate(bands)

    def _rasterise(self, capsules: NDArray[Any]) -> Tensor:
        """How much of each voxel the capsules (from w v u, to w v u, radius) fill, 0 to 1."""
        filled = np.zeros(self.size, np.float32)
        voxel = float(self.spacing.mean())
        first = np.array([axis[0].item() for axis in self.axes])
        start, end = self.place(capsules[:, :3]), self.place(capsules[:, 3:6])
        radius = capsules[:, 6] * float(np.mean(self.patient.stretch))
        margin = (radius + voxel)[:, None]
        low = np.ceil((np.minimum(start, end) - margin - first) / self.spacing).astype(int)
        high = np.floor((np.maximum(start, end) + margin - first) / self.spacing).astype(int) + 1
        low, high = np.clip(low, 0, self.size), np.clip(high, 0, self.size)
        z, y, x = (axis.cpu().numpy() for axis in self.axes)
        _fill(filled, z, y, x, start, end, radius, low, high, voxel)
        return torch.from_numpy(filled).half().to(self.device)

    def _acquire(self, hu: Tensor) -> Tensor:
        """Blur of the scanner, correlated noise, padding outside the round field of view."""
        p = self.patient
        hu = _blur(hu, [0.55 / float(s) for s in self.spacing])
        noise = torch.randn(self.size, generator=self.generator, device=self.device)
        kernel = [0.6, 0.6, 0.6]
        noise = _blur(noise, kernel)
        hu += noise.mul_(p.noise / float(noise[:: max(1, self.size[0] // 16)].std()))
        hu.round_().clamp_(-1024, 3071)
        if p.padding is not None:
            y, x = self.axes[1][:, None], self.axes[2][None, :]
            hu[:, (y**2 + x**2).sqrt() > p.field_of_view / 2] = float(p.padding)
        return hu.to(torch.int16)


@njit(nogil=True, cache=True, error_model="numpy")
def _fill(
    filled: NDArray[np.float32],
    z: NDArray[np.float32],
    y: NDArray[np.float32],
    x: NDArray[np.float32],
    starts: NDArray[np.float64],
    ends: NDArray[np.float64],
    radii: NDArray[np.float64],
    lows: NDArray[np.int64],
    highs: NDArray[np.int64],
    voxel: float,
) -> None:
    """Raise voxels between `lows` and `highs` to what each capsule fills of them."""
    one, half, zero = np.float32(1), np.float32(0.5), np.float32(0)
    size = np.float32(voxel)
    for c in range(len(starts)):
        a, d = starts[c], ends[c] - starts[c]
        length2 = np.float32(max(d[0] * d[0] + d[1] * d[1] + d[2] * d[2], 1e-6))
        a0, a1, a2 = np.float32(a[0]), np.float32(a[1]), np.float32(a[2])
        d0, d1, d2 = np.float32(d[0]), np.float32(d[1]), np.float32(d[2])
        radius = np.float32(radii[c])
        thin = np.float32(min(1.0, (2 * radii[c] / voxel) ** 2))
        for i in range(lows[c, 0], highs[c, 0]):
            for j in range(lows[c, 1], highs[c, 1]):
                for k in range(lows[c, 2], highs[c, 2]):
                    z0, y0, x0 = z[i] - a0, y[j] - a1, x[k] - a2
                    along = (z0 * d0 + y0 * d1 + x0 * d2) / length2
                    along = min(max(along, zero), one)
                    z1, y1, x1 = z0 - along * d0, y0 - along * d1, x0 - along * d2
                    distance = np.sqrt(z1 * z1 + y1 * y1 + x1 * x1)
                    share = min(max((radius - distance) / size + half, zero), one) * thin
                    filled[i, j, k] = max(filled[i, j, k], share)


class _Field:
    """Smooth random numbers of a given correlation length, cheap to evaluate on planes of a grid.

    Knots of a uniform cubic B-spline, interpolated axis by axis with matrix products. They lie
    around the centre of the scan, so that every grid sees the same numbers; beyond `_REACH_MM`
    from it there are none.
    """

    def __init__(self, body: _Body, knots_mm: float, sd: float):
        self.step, self.device = knots_mm, body.device
        count = 2 * int(_REACH_MM / knots_mm) + 1
        host = torch.Generator().manual_seed(body.patient.seed * 31 + int(knots_mm))
        knots = torch.randn((count,) * 3, generator=host).to(body.device)
        # Mean square of the spline weights at a random place, per axis: 151/315.
        self.knots = knots * (sd / (151 / 315) ** 1.5)
        self.weights = [self._weights(axis) for axis in body.axes]

    def _weights(self, places: Tensor) -> Tensor:
        """(places, knots) values of the cubic B-splines."""
        half = len(self.knots) // 2
        centres = torch.arange(-half, half + 1, device=self.device)
        t = (places[:, None] / self.step - centres).abs()
        return torch.where(t < 1, 2 / 3 - t**2 + t**3 / 2, (2 - t).clamp(min=0) ** 3 / 6)

    def __call__(self, rows: slice) -> Tensor:
        """The field on planes of the grid, (k, y, x)."""
        plane = torch.einsum("zk,kyx->zyx", self.weights[0][rows], self.knots)
        plane = torch.einsum("yj,zjx->zyx", self.weights[1], plane)
        return plane @ self.weights[2].T

    def at(self, points: NDArray[Any]) -> Tensor:
        """The field at points in mm, (n, 3)."""
        w = [
            self._weights(torch.tensor(points[:, k], dtype=torch.float32, device=self.device))
            for k in range(3)
        ]
        out = []
        for part in range(0, len(points), 2000):
            a, b, c = (m[part : part + 2000] for m in w)
            out.append(torch.einsum("nk,kyx,ny,nx->n", a, self.knots, b, c))
        return torch.cat(out)


def _mix(hu: Tensor, other: float, share: Tensor) -> Tensor:
    return hu + share * (other - hu)


def _power(a: Tensor, b: Tensor, p: float) -> Tensor:
    """Superelliptic norm of two coordinates."""
    if p == 2:
        return (a * a + b * b).sqrt()
    return (a.abs() ** p + b.abs() ** p + 1e-9) ** (1 / p)


def _ellipse(a: Tensor, b: Tensor, ra: float, rb: float) -> Tensor:
    return (1 - ((a / ra) ** 2 + (b / rb) ** 2).sqrt()) * min(ra, rb)


def _ellipsoid(a: Tensor, b: Tensor, c: Tensor, ra: float, rb: float, rc: float) -> Tensor:
    return (1 - ((a / ra) ** 2 + (b / rb) ** 2 + (c / rc) ** 2).sqrt()) * min(ra, rb, rc)


def _tube(points: Any, radius: float) -> NDArray[Any]:
    """Capsules along a line of points."""
    points = np.asarray(points, float)
    return np.column_stack([points[:-1], points[1:], np.full(len(points) - 1, radius)])


def _tree(
    root: NDArray[Any],
    targets: NDArray[Any],
    rng: np.random.Generator,
    step: float,
    terminal: float,
) -> NDArray[Any]:
    """Capsules of a tree from the root to all targets; radii follow Murray's law.

    Each target, nearest to the root first, grows a crooked branch from the closest node so far.
    Lengths in mm: `step` between nodes, `terminal` the radius of the last branches.
    """
    most = len(targets) * (int(400 / step) + 2)
    nodes, parents, flow = np.empty((most, 3)), np.full(most, -1), np.zeros(most)
    nodes[0], count = root, 1
    for target in targets[np.argsort(((targets - root) ** 2).sum(1))]:
        here = int(((nodes[:count] - target) ** 2).sum(1).argmin())
        steps = max(1, round(float(np.linalg.norm(target - nodes[here])) / step))
        way = nodes[here] + np.linspace(0, 1, steps + 1)[1:, None] * (target - nodes[here])
        way[:-1] += rng.normal(scale=0.18 * step, size=(steps - 1, 3))
        nodes[count : count + steps] = way
        parents[count : count + steps] = [here, *range(count, count + steps - 1)]
        count += steps
        flow[count - 1] = terminal**3
    for child in range(count - 1, 0, -1):
        flow[parents[child]] += flow[child]
    above = parents[1:count]
    return np.column_stack([nodes[above], nodes[1:count], np.cbrt(flow[1:count])])


def _blur(volume: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Separable blur of three taps (up to about 0.8 voxels), borders replicated; in voxels."""
    for axis, sigma in enumerate(sigmas):
        if sigma < 0.2:
            continue
        outer = math.exp(-0.5 / sigma**2)
        centre, side = 1 / (1 + 2 * outer), outer / (1 + 2 * outer)
        n = volume.shape[axis]
        blurred = volume * centre
        blurred.narrow(axis, 1, n - 1).add_(volume.narrow(axis, 0, n - 1), alpha=side)
        blurred.narrow(axis, 0, n - 1).add_(volume.narrow(axis, 1, n - 1), alpha=side)
        blurred.narrow(axis, 0, 1).add_(volume.narrow(axis, 0, 1), alpha=side)
        blurred.narrow(axis, n - 1, 1).add_(volume.narrow(axis, n - 1, 1), alpha=side)
        volume = blurred
    return volume
