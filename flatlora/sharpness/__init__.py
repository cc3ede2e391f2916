"""Measuring how flat the minimum is that a fine-tuned model sits in, and pictures of it."""

from .hessian import TopEigenvalue, hessian_top_eigenvalue
from .landscapes import Landscape, landscape, plot_landscape
from .rise import NoiseRise, WeightNoise, noise_rise, weight_noise, worst_case_rise

__all__ = [
    "Landscape",
    "NoiseRise",
    "TopEigenvalue",
    "WeightNoise",
    "hessian_top_eigenvalue",
    "landscape",
    "noise_rise",
    "plot_landscape",
    "weight_noise",
    "worst_case_rise",
]
