"""Methods without a network: filtered back-projection, conjugate gradients, SIRT, total variation.

Each with a few values of its parameter; which of them is used is chosen on training slices.
"""

from __future__ import annotations

from torch import Tensor

from LCTfoundLib.physics.hounsfield import hu_of
from LCTfoundLib.physics.noise import statistical_weights
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import (
    RampFilter,
    conjugate_gradient,
    filtered_back_projection,
    sirt,
    total_variation_reconstruction,
)
from training.evaluate.reconstruction_methods import Context, Reconstructed, Reconstructor, Setting, register

__all__ = ["BASELINES"]

BASELINES = ("fbp", "fbp_ram_lak", "cg", "sirt", "tv")

#: Of total variation; at a strength of .006, 100 and 200 differ by .4 HU of 69 (one slice, 16 views).
_TV_ITERATIONS = 300


def _weights(sinogram: Tensor, setting: Setting) -> Tensor | None:
    """Of the rays by their noise, 1 on average so that strengths compare; none where there is no noise."""
    if setting.dose is None:
        return None
    weights = statistical_weights(sinogram, setting.dose)
    return weights / weights.mean(dim=(-2, -1), keepdim=True)


@register("fbp", "FBP", ramp=tuple(str(ramp) for ramp in RampFilter), cutoff=(0.25, 0.35, 0.5, 0.75, 1.0))
def _fbp(setting: Setting) -> Reconstructor:
    def reconstruct(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        ramp, cutoff = RampFilter(context.parameters["ramp"]), context.parameters["cutoff"]
        return Reconstructed(hu_of(filtered_back_projection(projector, sinogram, ramp, cutoff)))

    return reconstruct


@register("fbp_ram_lak", "FBP, bare ramp")
def _fbp_ram_lak(setting: Setting) -> Reconstructor:
    """Without a window, as most papers show it: sharper, with more streaks."""

    def reconstruct(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        return Reconstructed(hu_of(filtered_back_projection(projector, sinogram)))

    return reconstruct


@register("cg", "CG, stopped early", iterations=(3, 5, 8, 12, 20, 30, 50))
def _cg(setting: Setting) -> Reconstructor:
    def reconstruct(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        iterations, weights = context.parameters["iterations"], _weights(sinogram, setting)
        return Reconstructed(hu_of(conjugate_gradient(projector, sinogram, iterations=iterations, weights=weights)))

    return reconstruct


@register("sirt", "SIRT", iterations=(50, 100, 200, 400))
def _sirt(setting: Setting) -> Reconstructor:
    def reconstruct(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        return Reconstructed(hu_of(sirt(projector, sinogram, iterations=context.parameters["iterations"])))

    return reconstruct


@register("tv", "TV", strength=(0.001, 0.003, 0.006, 0.01, 0.03, 0.1))
def _tv(setting: Setting) -> Reconstructor:
    def reconstruct(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        # In pixels, so that one value serves every field of view. Images are attenuation per mm here: the .3 of the
        # engine, whose images are 1 in water, is .006.
        strength, weights = context.parameters["strength"] * projector.grid.pixel_mm, _weights(sinogram, setting)
        image = total_variation_reconstruction(
            projector, sinogram, strength, iterations=_TV_ITERATIONS, weights=weights
        )
        return Reconstructed(hu_of(image))

    return reconstruct
