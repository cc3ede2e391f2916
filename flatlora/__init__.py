"""Drop-in optimizers for LoRA fine-tuning that generalises."""

from .batches import split_dataset
from .bilevel import BilevelOptimizer, BilevelStep
from .bilora import BiLoRAOptimizer, attach_auxiliary, detach_auxiliary
from .dora import direction_parameters, magnitude_parameters
from .ggpo import GGPOOptimizer
from .gralora import GraLoRALinear, apply_gralora, merge_gralora, unload_gralora
from .gralora_io import load_gralora, save_gralora
from .layers import LoRALayer, lora_layers
from .perturbation import remove_perturbation
from .sharpness import NoiseRise, noise_rise, weight_noise, worst_case_rise
from .wrapper import OptimizerWrapper

__all__ = [
    "BiLoRAOptimizer",
    "BilevelOptimizer",
    "BilevelStep",
    "GGPOOptimizer",
    "GraLoRALinear",
    "LoRALayer",
    "NoiseRise",
    "OptimizerWrapper",
    "apply_gralora",
    "attach_auxiliary",
    "detach_auxiliary",
    "direction_parameters",
    "load_gralora",
    "lora_layers",
    "magnitude_parameters",
    "merge_gralora",
    "noise_rise",
    "remove_perturbation",
    "save_gralora",
    "split_dataset",
    "unload_gralora",
    "weight_noise",
    "worst_case_rise",
]
__version__ = "0.1.0"
