"""Drop-in optimizers for LoRA fine-tuning that generalises."""

from .bidora.data import split_dataset
from .bidora.optimizer import BilevelOptimizer, BilevelStep
from .bidora.parameters import direction_parameters, magnitude_parameters
from .bilora.auxiliary import attach_auxiliary, detach_auxiliary
from .bilora.optimizer import BiLoRAOptimizer
from .checkpoint import CheckpointState, MethodState
from .ggpo.optimizer import GGPOOptimizer
from .gralora.files import load_gralora, save_gralora
from .gralora.layer import GraLoRALinear
from .gralora.transform import apply_gralora, merge_gralora, unload_gralora
from .layers.view import LoRALayer, lora_layers
from .lorasam.optimizer import LoRASAMOptimizer
from .perturbation.attachment import remove_perturbation
from .sharpness.hessian import TopEigenvalue, hessian_top_eigenvalue
from .sharpness.landscapes import Landscape, landscape, plot_landscape
from .sharpness.rise import NoiseRise, WeightNoise, noise_rise, weight_noise, worst_case_rise
from .wrapper import OptimizerWrapper

__all__ = [
    "BiLoRAOptimizer",
    "BilevelOptimizer",
    "BilevelStep",
    "CheckpointState",
    "GGPOOptimizer",
    "GraLoRALinear",
    "Landscape",
    "LoRALayer",
    "LoRASAMOptimizer",
    "MethodState",
    "NoiseRise",
    "OptimizerWrapper",
    "TopEigenvalue",
    "WeightNoise",
    "apply_gralora",
    "attach_auxiliary",
    "detach_auxiliary",
    "direction_parameters",
    "hessian_top_eigenvalue",
    "landscape",
    "load_gralora",
    "lora_layers",
    "magnitude_parameters",
    "merge_gralora",
    "noise_rise",
    "plot_landscape",
    "remove_perturbation",
    "save_gralora",
    "split_dataset",
    "unload_gralora",
    "weight_noise",
    "worst_case_rise",
]
__version__ = "0.1.0"
