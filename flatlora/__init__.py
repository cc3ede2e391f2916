"""Drop-in optimizers for LoRA fine-tuning that generalises."""

from .bilora import BiLoRAOptimizer, attach_auxiliary, detach_auxiliary
from .ggpo import GGPOOptimizer
from .gralora import GraLoRALinear, apply_gralora, merge_gralora, unload_gralora
from .gralora_io import load_gralora, save_gralora
from .layers import LoRALayer, lora_layers
from .perturbation import remove_perturbation
from .sharpness import NoiseRise, noise_rise, weight_noise
from .wrapper import OptimizerWrapper

__all__ = [
    "BiLoRAOptimizer",
    "GGPOOptimizer",
    "GraLoRALinear",
    "LoRALayer",
    "NoiseRise",
    "OptimizerWrapper",
    "apply_gralora",
    "attach_auxiliary",
    "detach_auxiliary",
    "load_gralora",
    "lora_layers",
    "merge_gralora",
    "noise_rise",
    "remove_perturbation",
    "save_gralora",
    "unload_gralora",
    "weight_noise",
]
__version__ = "0.1.0"
