"""Tiny models with adapters, and dense float64 references written from the method's equations."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from models import VOCAB, llama, quantise
from models import quantised as quantised
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from flatlora.kernels.draw import draw_gaussian, draw_low_rank
from flatlora.reference import ggpo_std as expected_std  # noqa: F401
from flatlora.reference import projected as projected

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")


# --- models -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One layer, `fc`."""

    def __init__(self, fc):
        super().__init__()
        self.fc = fc

    def forward(self, x):
        return self.fc(x)


class MLP(nn.Module):
    """Two layers, `up` and `down`."""

    def __init__(self, n=16, hidden=24, m=12, bias=False):
        super().__init__()
        self.up = nn.Linear(n, hidden, bias=bias)
        self.down = nn.Linear(hidden, m, bias=bias)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class IntLinear(nn.Linear):
    """A base that can only be applied: integer codes, one scale, and a forward of its own."""

    def __init__(self, m, n, bias=True):
        super().__init__(n, m, bias=bias)
        self.weight = nn.Parameter(torch.randint(-20, 21, (m, n), dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.03))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class ParameterLoRA(nn.Module):
    """A hand-made LoRA layer with 2-D parameters (r, n) and (m, r), or both stored the other way around."""

    def __init__(self, m, n, r=3, transposed=False, scaling=1.5):
        super().__init__()
        self.linear = nn.Linear(n, m).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(n, r) if transposed else torch.randn(r, n))
        self.lora_B = nn.Parameter(torch.randn(r, m) if transposed else torch.randn(m, r))
        self.scaling, self.stored_transposed = scaling, transposed

    def forward(self, x):
        a, b = (self.lora_A, self.lora_B) if self.stored_transposed else (self.lora_A.t(), self.lora_B.t())
        return self.linear(x) + self.scaling * (x @ a @ b)

    def dense(self):
        b_a = (self.lora_A @ self.lora_B).t() if self.stored_transposed else self.lora_B @ self.lora_A
        return self.linear.weight + self.scaling * b_a, self.linear.bias


class ModuleLoRA(nn.Linear):
    """A hand-made LoRA layer that is its own base and whose factors are `nn.Linear` modules, with alpha / r scaling."""

    def __init__(self, m, n, r=3, alpha=6):
        super().__init__(n, m)
        self.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(n, r, bias=False), nn.Linear(r, m, bias=False)
        self.lora_alpha, self.r = alpha, r

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(x)) * (self.lora_alpha / self.r)

    def dense(self):
        return self.weight + self.lora_alpha / self.r * self.lora_B.weight @ self.lora_A.weight, self.bias


def peft(model, targets, dtype=torch.float64, adapters=None, **config):
    """`model` in `dtype` with random adapters; `adapters` maps names to what differs from `config`, all of them active.

    With ``dtype=None`` base and adapters keep the types that PEFT gives them.
    """
    if dtype is not None:
        model = model.to(dtype)
    adapters = adapters or {"default": {}}
    config = {"r": 4, "lora_alpha": 6, "target_modules": targets, **config}
    names = list(adapters)
    for name in names:
        one = LoraConfig(**{**config, **adapters[name]})
        if name == names[0]:
            model = get_peft_model(model, one, adapter_name=name, autocast_adapter_dtype=dtype is None)
        else:
            model.add_adapter(name, one, autocast_adapter_dtype=dtype is None)
    if len(names) > 1:
        model.base_model.set_adapter(names)
    randomise(model)
    return model.train()


def randomise(model, size=0.3):
    """Random B, magnitudes and adapter biases, so that no term of a formula vanishes."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, size)
            elif "lora_A" in name:
                p.normal_(0, p.shape[-1] ** -0.5)
            elif "lora_magnitude" in name:
                p.mul_(torch.rand_like(p) + 0.5)


def one_layer(m=10, n=7, bias=True, conv1d=False, **config):
    """A PEFT model with one adapted layer `fc`, (m, n), in float64 unless told otherwise."""
    if conv1d:
        fc = Conv1D(m, n)
        nn.init.normal_(fc.weight, 0, 0.3)
        nn.init.normal_(fc.bias)
        config["fan_in_fan_out"] = True
    else:
        fc = nn.Linear(n, m, bias=bias)
    return peft(Net(fc), ["fc"], **config)


def tiny_llama(dtype=torch.float32, layers=1, **config):
    sizes = {"intermediate_size": 48, "num_hidden_layers": layers, "max_position_embeddings": 32, "pad_token_id": 0}
    base = llama(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return peft(base, ["q_proj", "v_proj", "gate_proj", "down_proj"], dtype, **config)


def tiny_gpt2(dtype=torch.float32, **config):
    base = GPT2LMHeadModel(
        GPT2Config(
            n_layer=1, n_embd=32, n_head=4, vocab_size=VOCAB, n_positions=32, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    return peft(base, ["c_attn", "c_fc"], dtype, fan_in_fan_out=True, **config)


def tokens(batch=2, length=12, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def lm_loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def quantised_mlp(kind, n=64, hidden=96, m=64, **config):
    model = quantise(MLP(n, hidden, m), kind)
    if kind == "int8":
        model.is_loaded_in_8bit = True
    else:
        model.is_loaded_in_4bit = True
    return peft(model, ["up", "down"], None, **config)


def lora_modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


# --- dense references ---------------------------------------------------------------------------------------------


def base_weight(base):
    """W0 (m, n) in float64, from the stored bits of any base used here."""
    weight = base.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).double()
    if type(weight).__name__ == "Int8Params":
        scale = base.state.SCB if base.state.SCB is not None else weight.SCB
        return weight.data.double() * scale.double()[:, None] / 127
    if isinstance(base, IntLinear):
        return weight.double() * base.scale.double()
    return (weight.t() if isinstance(base, Conv1D) else weight).double()


def dense(module):
    """(W', bias) of a PEFT layer in float64 as a differentiable function of its parameters: W0 + Σ s·B·A, or DoRA's
    μ·(W0 + s·B·A)/‖W0 + s·B·A‖ with the norm held constant, for a single adapter with a magnitude."""
    if not isinstance(module, LoraLayer):
        return module.dense()
    base = module.get_base_layer()
    weight, bias = base_weight(base), getattr(base, "bias", None)
    bias = 0 if bias is None else bias.double()
    for name in module.active_adapters:
        if module.merged or name not in module.lora_A:
            continue
        lora_a, lora_b, s = module.lora_A[name], module.lora_B[name], module.scaling[name]
        weight = weight + s * (lora_b.weight.double() @ lora_a.weight.double())
        if name in module.lora_magnitude_vector:
            assert len(module.active_adapters) == 1
            norm = weight.detach().norm(dim=1)
            weight = (module.lora_magnitude_vector[name].weight.double() / norm)[:, None] * weight
        if lora_b.bias is not None:
            bias = bias + s * lora_b.bias.double()
    return weight, bias


def applied_weight(module, n):
    """The matrix that a layer really applies: its answers to the unit vectors less its answer to zero."""
    with torch.no_grad():
        like = next(p for p in module.parameters() if p.is_floating_point())
        return (module(torch.eye(n).to(like)) - module(torch.zeros(1, n).to(like))).t()


def noise_of(optimizer, name=None, dtype=torch.float64):
    """This step's dense ε (m, n) of a layer, from its seed; by default of the only layer."""
    name = name or next(iter(gradient_rows(optimizer)))
    draw, n = optimizer.current_perturbation()[name], optimizer.method_state()["layers"][name]["shape"][1]
    if draw.kind == "gaussian":
        return draw_gaussian(draw, n, None, dtype)
    b, a = draw_low_rank(draw, n, dtype)
    return b @ a


def gradient_rows(optimizer):
    """What a GGPOOptimizer remembers of each layer's last gradient: its squared row norms (m,), or None."""
    return {name: layer["grad_sq"] for name, layer in optimizer.method_state()["layers"].items()}


def at_step(optimizer, step):
    """Has a GGPOOptimizer draw the noise of another step."""
    optimizer.load_method_state({**optimizer.method_state(), "step": step})


def rank_correlation(x, y):
    """Spearman's: the correlation of the ranks."""
    ranks = torch.stack([x, y]).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])
