"""Methods with networks: this project's two tiers, the published recipe, and two trained baselines.

Weights come from ``Setting.weights`` or else from where the engine looks. The baselines' nets see few slices and little
time (see ``training/sparse_view_baselines.py`` and their cards): the comparison is of methods trained alike, not with
the published weights, which are not public.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from LCTfoundLib.networks.features import NoiseSchedule
from LCTfoundLib.networks.foundation import STUDENT_WEIGHT, load_foundation
from LCTfoundLib.networks.posterior import PosteriorSettings
from LCTfoundLib.networks.sampling import timesteps
from LCTfoundLib.networks.unrolled import UNROLLED_WEIGHT, UnrolledInput, load_unrolled, operator_norm
from LCTfoundLib.physics.hounsfield import WATER_PER_MM
from LCTfoundLib.physics.projection_files import Projections
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import conjugate_gradient
from LCTfoundLib.runtime.device import DeviceChoice, choose_device
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.tasks.slice_predictor import SlicePredictor
from LCTfoundLib.tasks.sparse_view import SparseViewRequest, Tier, reconstruct_sparse_view
from LCTfoundLib.weights.registry import list_weights, search_folders
from training.evaluate.reconstruction_methods import Context, Method, Reconstructed, Reconstructor, Setting, register
from training.sparse_view_baselines import (
    DUAL_DOMAIN_WEIGHT,
    POST_PROCESSING_WEIGHT,
    load_dual_domain,
    load_post_processing,
)

__all__ = ["NETWORKS", "guided_sampling", "weights_of"]

#: Methods and the weights they load.
NETWORKS: Mapping[str, tuple[str, ...]] = {
    "fast": (UNROLLED_WEIGHT,),
    "best": (UNROLLED_WEIGHT, STUDENT_WEIGHT),
    "paper": (STUDENT_WEIGHT,),
    "post_processing": (POST_PROCESSING_WEIGHT,),
    "dual_domain": (DUAL_DOMAIN_WEIGHT,),
}
#: Size of a corrector's step against its noise (Song et al., ICLR 2021).
_CORRECTOR = 0.16


def weights_of(methods: Sequence[Method], folder: Path | None) -> dict[str, str]:
    """SHA-256 of the weights that methods load, by name of the weight."""
    wanted = {name for method in methods for name in NETWORKS.get(method.name, ())}
    entries = list_weights(search_folders(folder))
    return {entry.name: entry.card.sha256 for entry in entries if entry.name in wanted and entry.card is not None}


# -- this project ----------------------------------------------------------------------------------------------------


@register("fast", "LCTfound fast")
def _fast(setting: Setting) -> Reconstructor:
    return _tier(setting, Tier.FAST)


@register("best", "LCTfound best")
def _best(setting: Setting) -> Reconstructor:
    """Mean of the engine's draws."""
    return _tier(setting, Tier.BEST)


def _tier(setting: Setting, tier: Tier) -> Reconstructor:
    """What the user gets: the engine's task, with its networks kept between slices."""
    net = load_unrolled(folder=setting.weights)
    model = load_foundation(folder=setting.weights) if tier is Tier.BEST else None

    def reconstruct(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        request = SparseViewRequest(tier, seed=context.seed, device=str(setting.device))
        scan = _scan(sinogram, projector, setting)
        found = reconstruct_sparse_view(
            scan,
            projector.grid,
            request,
            Progress(warn=lambda text: None),  # the same few lines for every slice
            load_net=lambda folder: net,
            load_backbone=lambda folder: model,
        )
        interval = None if found.interval_hu is None else torch.from_numpy(found.interval_hu)
        return Reconstructed(torch.from_numpy(found.hu), found.evaluations, interval)

    return reconstruct


def _scan(sinogram: Tensor, projector: Projector, setting: Setting) -> Projections:
    """As a scanner would hand it over."""
    sinogram, dose = sinogram.cpu(), setting.dose
    if dose is None:
        return Projections(sinogram, projector.beam)
    photons = torch.as_tensor(dose.unattenuated(sinogram[:1]))
    return Projections(sinogram, projector.beam, WATER_PER_MM, photons, electronic_noise=dose.electronic_noise)


# -- the published recipe --------------------------------------------------------------------------------------------


@register("paper", "LCTfound, published recipe")
def _paper(setting: Setting) -> Reconstructor:
    """2,000 evaluations from pure noise, with this project's small backbone: the recipe's time, not its network."""
    model, choice = load_foundation(folder=setting.weights), choose_device(str(setting.device))
    predict = SlicePredictor(model, choice)

    @torch.inference_mode()
    def reconstruct(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        asked = 0

        def counted(noisy: Tensor, timestep: int) -> Tensor:
            nonlocal asked
            asked += 1
            return predict(noisy, timestep)

        scan = _input(sinogram, projector, setting)
        water = guided_sampling(counted, scan, projector, setting.paper_steps, context.seed)
        return Reconstructed((water - 1.0) * 1000.0, asked)

    return reconstruct


def guided_sampling(
    predict: Callable[[Tensor, int], Tensor],
    scan: UnrolledInput,
    projector: Projector,
    evaluations: int = 2000,
    seed: int = 0,
) -> Tensor:
    """Slices from pure noise, with the measured views put in after every step (Song et al., ICLR 2022).

    Predictor and corrector, each asking the network once: an ancestral step of DDPM to the next timestep, then one of
    Langevin's there (Song et al., ICLR 2021). The schedule's 1,000 timesteps make the recipe's 2,000 evaluations so,
    but for the last one, behind which nothing is left to correct; fewer evaluations visit fewer timesteps. After each
    the views get what was measured, under the noise of that timestep. Song et al. put it into a sinogram that is
    inverted at once, by a few thousand views; here some steps of conjugate gradients begun at the image do, as in
    ``networks.posterior`` and with its settings.

    Args:
        predict: noise in (N, H, W) at a timestep, in the window from air to bone.
        scan: what was measured.
        projector: of the scan.
        evaluations: of the network, at most.
        seed: of all noise.

    Returns:
        In units of water, (N, H, W).
    """
    schedule, settings = NoiseSchedule(), PosteriorSettings()
    generator = torch.Generator().manual_seed(seed)
    strength = settings.trust * operator_norm(projector) ** 2 * (1.0 + scan.relative_noise)[:, None, None]
    # The network's images are 0 in water.
    measured = scan.sinograms - projector.forward(torch.ones_like(scan.start))

    def noise() -> Tensor:
        return torch.randn(scan.start.shape, generator=generator).to(scan.start)

    def consistent(state: Tensor, signal: float, share: float) -> Tensor:
        views = signal * measured + (share * projector.forward(noise()) if share else 0.0)
        return conjugate_gradient(
            projector, views, iterations=settings.consistency, prior=state, strength=strength, weights=scan.weights
        )

    times = timesteps(max(evaluations // 2, 1))
    state = noise()
    for now, following in pairwise(times):
        after, left = float(schedule.signal[following]), float(schedule.noise[following])
        state = consistent(_ancestral(schedule, state, predict(state, now), now, following, noise()), after, left)
        told, fresh = predict(state, following), noise()
        size = 2.0 * (_CORRECTOR * left * _norm(fresh) / _norm(told)) ** 2
        state = consistent(state - size / left * told + (2.0 * size).sqrt() * fresh, after, left)
    return consistent(_clean(schedule, state, predict(state, times[-1]), times[-1]), 1.0, 0.0) + 1.0


def _clean(schedule: NoiseSchedule, state: Tensor, noise: Tensor, timestep: int) -> Tensor:
    signal, share = float(schedule.signal[timestep]), float(schedule.noise[timestep])
    return ((state - share * noise) / signal).clamp(-1.0, 1.0)


def _ancestral(schedule: NoiseSchedule, state: Tensor, told: Tensor, now: int, following: int, fresh: Tensor) -> Tensor:
    """A draw of the state at a less noisy timestep (Ho et al., NeurIPS 2020, equations 6 and 7)."""
    signal, share = float(schedule.signal[now]), float(schedule.noise[now])
    after, left = float(schedule.signal[following]), float(schedule.noise[following])
    kept = signal / after
    added = 1.0 - kept**2
    mean = (after * added * _clean(schedule, state, told, now) + kept * left**2 * state) / share**2
    return mean + left / share * added**0.5 * fresh


def _norm(images: Tensor) -> Tensor:
    return images.flatten(1).norm(dim=1)[:, None, None]


# -- trained baselines -----------------------------------------------------------------------------------------------


@register("post_processing", "FBP + U-Net")
def _post_processing(setting: Setting) -> Reconstructor:
    return _trained(load_post_processing(setting.weights)[0], 1, setting)


@register("dual_domain", "dual domain")
def _dual_domain(setting: Setting) -> Reconstructor:
    return _trained(load_dual_domain(setting.weights)[0], 2, setting)


def _trained(network: nn.Module, evaluations: int, setting: Setting) -> Reconstructor:
    choice = choose_device(str(setting.device))
    network.to(choice.device)

    @torch.inference_mode()
    def reconstruct(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        with _precision(choice):
            water = network(_input(sinogram, projector, setting), projector)
        return Reconstructed((water - 1.0) * 1000.0, evaluations)

    return reconstruct


def _input(sinogram: Tensor, projector: Projector, setting: Setting) -> UnrolledInput:
    dose = setting.dose
    if dose is None:
        return UnrolledInput.of(sinogram, projector)
    return UnrolledInput.of(sinogram, projector, dose.unattenuated(sinogram), dose.electronic_noise)


def _precision(choice: DeviceChoice) -> torch.autocast:
    half = choice.dtype != torch.float32
    return torch.autocast(choice.device.type, choice.dtype if half else torch.bfloat16, enabled=half)
