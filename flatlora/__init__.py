"""Drop-in optimizers for LoRA fine-tuning that generalises."""

from .bilora import BiLoRAOptimizer, attach_auxiliary, detach_auxiliary
from .ggpo import GGPOOptimizer
from .layers import LoRALayer, lora_layers
from .perturbation import remove_perturbation
from .sharpness import NoiseRise, noise_rise, weight_noise, worst_case_rise
from .wrapper import OptimizerWrapper

__all__ = [
    "BiLoRAOptimizer",
    "GGPOOptimizer",
    "LoRALayer",
    "NoiseRise",
    "OptimizerWrapper",
    "attach_auxiliary",
    "detach_auxiliary",
    "lora_layers",
    "noise_rise",
    "remove_perturbation",
    "weight_noise",
    "worst_case_rise",
]
__version__ = "0.1.0"
