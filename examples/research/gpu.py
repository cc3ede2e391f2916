"""What only a GPU can tell, in bounded time: results at real sizes, step times, peak memory, kernels, the host's waits.

    python examples/research/gpu.py --json gpu.json                  # everything, some six minutes on an H100
    python examples/research/gpu.py --seconds 120 --only right 0.5B  # some of it
    python examples/research/gpu.py --device cpu --tiny              # whether it runs, on the CPU

One large layer under each method is compared with its dense weight in float64. Then each method trains models of public
shapes with random weights, on which neither time nor memory depends, and is compared with PEFT's LoRA. The most
important parts come first, and those for which no time is left are named. The JSON file is written after every number,
so that a run that is stopped keeps what it has. The exit status is 1 if a result was wrong or something failed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import logging
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported, and peft imports it

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.optim import Optimizer  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import flatlora  # noqa: E402
from flatlora.kernels.draw import Draw, draw_gaussian, draw_low_rank, use_triton  # noqa: E402

R, ALPHA = 16, 32
MB = 2**20

# --- models ---------------------------------------------------------------------------------------------------------

# Qwen2.5's: hidden, intermediate, layers, heads, heads of keys and values, vocabulary, whether embedding = head
GEOMETRIES = {
    "tiny": (64, 96, 2, 4, 2, 256, True),
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}


@dataclass(frozen=True)
class Cell:
    """A model and a way of training it, in which methods are compared."""

    geometry: str
    tokens: int
    base: str = "bf16"  # or "nf4", computed in bf16, or "fp32"
    checkpointing: bool = False
    autocast: bool = False
    layers: int | None = None  # instead of the geometry's own
    compile: bool = False

    @property
    def name(self) -> str:
        options = [name for name in ("checkpointing", "autocast", "compile") if getattr(self, name)]
        layers = [] if self.layers is None else [f"{self.layers} layers"]
        return ", ".join([f"{self.geometry} {self.base}", f"{self.tokens} tokens", *layers, *options])


def dtype_of(base: str) -> torch.dtype:
    return torch.float32 if base == "fp32" else torch.bfloat16


def model_of(cell: Cell, device: str) -> nn.Module:
    """The frozen model with random weights."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = GEOMETRIES[cell.geometry]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=cell.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype_of(cell.base))
    try:
        with torch.device(device):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if cell.base == "nf4":
        quantise(model)
    return model.requires_grad_(False)


def quantise(model: nn.Module) -> None:
    """Puts bitsandbytes' NF4 layers in the place of all linear layers but the head."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        size, dtype = (module.in_features, module.out_features), module.weight.dtype
        new = bnb.nn.Linear4bit(*size, bias=False, quant_type="nf4", compute_dtype=dtype, device="meta")
        new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = module.bias
        model.set_submodule(name, new.to(module.weight.device))  # quantises
    model.is_loaded_in_4bit = True  # peft asks for this


def sharing(base: nn.Module) -> nn.Module:
    """A model with modules of its own over the tensors of `base`, so that methods follow each other without copies."""
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    states = [getattr(module, "quant_state", None) for module in base.modules()]
    return copy.deepcopy(base, tensors | {id(state): state for state in states if state is not None})


# --- methods --------------------------------------------------------------------------------------------------------

Base = Callable[[Any], Optimizer]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def lora(model: nn.Module, targets: Any) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets))


def gralora(model: nn.Module, targets: Any) -> nn.Module:
    return flatlora.apply_gralora(model, targets, r=R, k=4, alpha=ALPHA)


def plain(model: nn.Module, base: Base) -> Optimizer:
    return base(trained(model))


def ggpo(noise: Any) -> Callable[[nn.Module, Base], Optimizer]:
    return lambda model, base: flatlora.GGPOOptimizer(
        base(trained(model)), model, sigma=0.2, beta=1e-4, noise=noise, seed=3
    )


def lorasam(model: nn.Module, base: Base) -> Optimizer:
    return flatlora.LoRASAMOptimizer(base(trained(model)), model, rho=20.0)


def bilora(model: nn.Module, base: Base) -> Optimizer:
    return flatlora.BiLoRAOptimizer.for_model(model, base, rho=20.0, alpha=16.0)


def sam(model: nn.Module, base: Base) -> Optimizer:
    from pytorch_optimizer import SAM

    return SAM(trained(model), lambda params, **_: base(params), rho=0.05)


METHODS: dict[str, tuple[Callable[..., nn.Module], Callable[[nn.Module, Base], Optimizer]]] = {
    "PEFT LoRA": (lora, plain),
    "GGPO gaussian": (lora, ggpo("gaussian")),
    "GGPO gaussian, Triton": (lora, ggpo("gaussian")),
    "GGPO low_rank": (lora, ggpo("low_rank")),
    "Bi-LoRA": (lora, bilora),
    "LoRASAM": (lora, lorasam),
    "GraLoRA": (gralora, plain),
    "GraLoRA under GGPO": (gralora, ggpo("gaussian")),
    "two-pass SAM": (lora, sam),
}
OURS = [name for name in METHODS if name not in ("GraLoRA under GGPO", "two-pass SAM")]
CELLS: list[tuple[Cell, list[str]]] = [
    (Cell("0.5B", 512), list(METHODS)),
    (Cell("7B", 4096, "nf4", checkpointing=True), OURS),
    (Cell("7B", 4096, checkpointing=True), list(METHODS)),
    (Cell("1.5B", 2048), OURS),
    (Cell("7B", 4096, "nf4", checkpointing=True, autocast=True), OURS),
    (Cell("7B", 512, "nf4"), OURS),
    (Cell("0.5B", 8192, checkpointing=True), OURS),
    (Cell("0.5B", 512, layers=6, compile=True), ["PEFT LoRA", "GGPO gaussian", "GGPO low_rank", "LoRASAM"]),
]
TINY_CELLS = [
    (Cell("tiny", 32, "fp32"), list(METHODS)),
    (Cell("tiny", 32, "nf4", checkpointing=True, autocast=True), OURS),
]

Step = Callable[[Tensor], None]


def step_of(name: str, base: nn.Module, cell: Cell) -> Step:
    """A training step of a method over the tensors of `base`, which stay as they are."""
    adapt, build = METHODS[name]
    model = sharing(base)
    torch.manual_seed(0)
    adapted = adapt(model, "all-linear").train()
    if cell.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    optimizer = build(adapted, lambda params, **_: torch.optim.AdamW(params, lr=1e-4))
    called: Any = torch.compile(adapted) if cell.compile else adapted

    def gradients(ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=cell.autocast):
            loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    def step(ids: Tensor) -> None:
        gradients(ids)
        optimizer.step(*([lambda: gradients(ids)] if name == "two-pass SAM" else []))
        optimizer.zero_grad()

    return step


# --- a run ----------------------------------------------------------------------------------------------------------


class Run:
    """The time that is left, and what has been found.

    Attributes:
        found: what the JSON file has.
        faults: parts that failed or whose results were wrong.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.begin = args, time.monotonic()
        self.cuda = args.device == "cuda"
        self.found: dict[str, Any] = {"skipped": []}
        self.faults: list[str] = []

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.begin)

    def note(self, part: str, key: str, value: Any) -> None:
        self.found.setdefault(part, {})[key] = value
        print(f"{part}: {key}: {json.dumps(value)}  [{self.left():.0f} s left]", flush=True)
        if self.args.json is not None:
            self.args.json.write_text(json.dumps(self.found, indent=1), encoding="utf-8")

    def wants(self, part: str, needs: float) -> bool:
        if self.args.only and not any(word in part for word in self.args.only):
            return False
        if self.left() < needs and not self.args.tiny:
            self.found["skipped"].append(part)
            return False
        return True

    def methods(self, names: Iterable[str]) -> list[str]:
        """Those that run on this device: Triton's kernels need a GPU."""
        return [name for name in names if self.cuda or not name.endswith("Triton")]

    @contextmanager
    def guarded(self, part: str, key: str) -> Iterator[None]:
        """What fails within the context is noted, and the run goes on. Triton draws noise where the key names it."""
        try:
            use_triton(*(["cuda"] if key.endswith("Triton") else []))
            yield
        except Exception as error:
            traceback.print_exc()
            self.faults.append(f"{part}: {key}")
            self.note(part, key, {"failed": f"{type(error).__name__}: {error}"[:500]})
        finally:
            use_triton()
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()


def timed(work: Callable[[], Any], cuda: bool) -> tuple[float, float]:
    """Milliseconds that some work takes, between two events on the device's stream, and that it keeps the host busy."""
    if cuda:
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
    begin = time.perf_counter()
    work()
    host = 1000 * (time.perf_counter() - begin)
    if not cuda:
        return host, host
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last), host


def environment(run: Run) -> None:
    """Versions, and what the device reaches at most."""
    for package in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton"):
        try:
            run.note("environment", package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            run.note("environment", package, None)
    run.note("environment", "device", torch.cuda.get_device_name() if run.cuda else "CPU")
    run.note("environment", "CUDA", torch.version.cuda)
    n, size, device = 64 if run.args.tiny else 8192, 1 << (10 if run.args.tiny else 28), run.args.device
    a, b = torch.randn(n, n, device=device, dtype=torch.bfloat16), torch.empty(size, device=device)
    for name, work, amount in (
        ("bf16 product, TFLOP/s", lambda: a @ a, 2 * n**3 / 1e12),
        ("copy, TB/s", b.clone, 2 * b.nbytes / 1e12),
        ("float32 normals, G/s", b.normal_, size / 1e9),
    ):
        ms = statistics.median([timed(work, run.cuda)[0] for _ in range(8)][3:])
        run.note("environment", name, round(1000 * amount / ms, 3))


# --- whether it is right ----------------------------------------------------------------------------------------------

MOST = {"fp32": 1e-5, "bf16": 1e-2, "nf4": 1e-2}  # relative errors that rounding explains


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


def draws(run: Run, name: str) -> None:
    """Gaussian noise of a large layer: its moments, and that it is the same in every draw, whatever it is added to."""
    m, n = (300, 400) if run.args.tiny else (9000, 4096)  # more than are drawn at a time
    std = torch.rand(m, device=run.args.device, dtype=torch.float64) + 0.5
    draw = Draw("gaussian", std, 123456789)
    eps = draw_gaussian(draw, n, None, torch.float32)
    z = (eps / std.float().unsqueeze(1)).double()
    weight = torch.randn(m, n, device=run.args.device)
    errors = {  # in standard errors
        "mean": float(z.mean() * (m * n) ** 0.5),
        "variance": float((z.square().mean() - 1) * (m * n / 2) ** 0.5),
        "correlation of neighbouring rows": float((z[1:] * z[:-1]).mean() * ((m - 1) * n) ** 0.5),
        "kurtosis, on a GPU": float((z.pow(4).mean() - 3) * (m * n / 96) ** 0.5),
    }
    same = {
        "drawn again": float((draw_gaussian(draw, n, None, torch.float32) - eps).abs().max()),
        "added to a weight": float((draw_gaussian(draw, n, weight, torch.float32) - weight - eps).abs().max()),
        "in bf16": relative(draw_gaussian(draw, n, None, torch.bfloat16), eps),
    }
    run.note("right", name, errors | same)
    if any(abs(error) > 5 for error in errors.values()) or same["drawn again"] or max(same.values()) > 1e-2:
        run.faults.append(f"right: {name}")


def dense(extra: Any, m: int, n: int) -> Tensor:
    """A perturbation, or an adapter of the layers' view, as a matrix (m, n) in float64."""
    if isinstance(extra, Draw) and extra.kind == "gaussian":
        return draw_gaussian(extra, n, None, torch.float32).double()
    if isinstance(extra, Draw):
        B, A = draw_low_rank(extra, n, torch.float32)
        return B.double() @ A.double()
    product = extra.scaling * extra.B.detach().double() @ extra.A.detach().double()
    return product if product.dim() == 2 else product.transpose(1, 2).reshape(m, n)  # of a grid of blocks


def one_layer(run: Run, name: str, kind: str) -> dict[str, float]:
    """Relative errors of a layer's output and gradients in its second step, the first that every method perturbs."""
    m, n, tokens = (128, 64, 8) if run.args.tiny else (11008, 4096, 512)
    adapt, build = METHODS[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n, m, bias=False, device=run.args.device, dtype=dtype_of(kind)))
    if kind == "nf4":
        quantise(net)
    model = adapt(net.requires_grad_(False), ["0"]).train()
    for p in trained(model):
        if not p.any():
            nn.init.normal_(p, std=0.02)
    optimizer = build(model, lambda params, **_: torch.optim.SGD(params, lr=1e-2))
    for again in (True, False):
        x = torch.randn(1, tokens, n, device=run.args.device, dtype=dtype_of(kind), requires_grad=True)
        g = torch.randn(1, tokens, m, device=run.args.device, dtype=dtype_of(kind))
        out = model(x)
        out.backward(g)
        if again:
            optimizer.step()
            optimizer.zero_grad()

    (layer,) = flatlora.lora_layers(model)
    adapters = layer.adapters()
    W = layer.base.dense(torch.float64) + sum(dense(adapter, m, n) for adapter in adapters)
    eps = torch.zeros_like(W)
    if name == "Bi-LoRA":
        A, B = optimizer.current_perturbation()
        eps += 2.0 * B.double() @ A.double()  # alpha is twice its rank
    elif isinstance(optimizer, flatlora.GGPOOptimizer | flatlora.LoRASAMOptimizer):
        eps += dense(optimizer.current_perturbation()[layer.name], m, n)
    x64, g64 = x.detach()[0].double(), g[0].double()
    found = {"output": relative(out[0], x64 @ (W + eps).t()), "gradient of x": relative(x.grad[0], g64 @ (W + eps))}
    if adapt is lora:
        A, B, s = adapters[0].A.detach().double(), adapters[0].B.detach().double(), adapters[0].scaling
        found["gradient of A"] = relative(adapters[0].A.grad, s * (g64 @ B).t() @ x64)
        found["gradient of B"] = relative(adapters[0].B.grad, s * g64.t() @ (x64 @ A.t()))
    perturbation = float(eps.norm() / W.norm())
    if any(not error <= MOST[kind] for error in found.values()) or (build is not plain and not perturbation > 0.01):
        run.faults.append(f"right: {kind} {name}")
    return found | {"perturbation to weight": perturbation}


def right(run: Run) -> None:
    """Each method over each kind of base, against dense weights in float64."""
    for name in run.methods(["draws", "draws, Triton"]):
        with run.guarded("right", name):
            draws(run, name)
    for kind in MOST:
        for name in run.methods(METHODS):
            if name == "two-pass SAM":
                continue
            with run.guarded("right", f"{kind} {name}"):
                run.note("right", f"{kind} {name}", one_layer(run, name, kind))


# --- what it costs ----------------------------------------------------------------------------------------------------


def costs(run: Run, cell: Cell, methods: list[str]) -> None:
    """Every method's step in one model; the first is measured again at the end, to show how far the clock drifts."""
    base = model_of(cell, run.args.device)
    vocabulary = GEOMETRIES[cell.geometry][5]
    ids = torch.randint(0, vocabulary, (1, cell.tokens), generator=torch.Generator().manual_seed(1)).to(run.args.device)
    reference = None
    for name in run.methods([*methods, methods[0]]):
        key = f"{name}, again" if name in run.found.get(cell.name, ()) else name
        if not run.args.tiny and run.left() < 15:
            run.found["skipped"].append(f"{cell.name}: {key}")
            continue
        with run.guarded(cell.name, key):
            found = cost(run, name, base, ids, cell)
            reference = reference or found["ms"]
            run.note(cell.name, key, found | {"ratio": round(found["ms"] / reference, 3)})


def cost(run: Run, name: str, base: nn.Module, ids: Tensor, cell: Cell) -> dict[str, Any]:
    """Milliseconds, megabytes, kernels and waits of a step."""
    found: dict[str, Any] = {}
    before = 0
    if cell.compile:
        torch.compiler.reset()
    if run.cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    step = step_of(name, base, cell)
    begin = time.monotonic()
    for _ in range(2):
        step(ids)
    if run.cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        found |= {"peak MB": peak // MB, "without base MB": (peak - before) // MB}
    found["two first steps, s"] = round(time.monotonic() - begin, 2)
    times: list[tuple[float, float]] = []
    least, until = (1, 0.0) if run.args.tiny else (5, time.monotonic() + 1.5)
    while len(times) < least or (time.monotonic() < until and len(times) < 30):
        times.append(timed(lambda: step(ids), run.cuda))
    device, host = zip(*times, strict=True)
    found |= {"ms": round(statistics.median(device), 3), "fastest ms": round(min(device), 3), "steps": len(times)}
    found["host ms"] = round(statistics.median(host), 3)
    for measure in (kernels, waits) if run.cuda else (kernels,):
        try:
            found |= measure(step, ids)
        except Exception as error:  # such as a profiler that may not look; the times are kept
            run.faults.append(f"{cell.name}: {name}: {measure.__name__}")
            found[measure.__name__] = f"{type(error).__name__}: {error}"[:500]
    return found


def waits(step: Step, ids: Tensor) -> dict[str, Any]:
    """Where the host waits for the device in a step, by what torch warns of."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]
    return {"waits": len(places), "waits at": sorted(set(places))[:8]}


def kernels(step: Step, ids: Tensor) -> dict[str, Any]:
    """How many kernels and copies a step puts on the device, how long they take, and which take most; of a CPU its
    operators, in which others are nested."""
    kind, activity = (DeviceType.CUDA, "CUDA") if ids.is_cuda else (DeviceType.CPU, "CPU")
    with profile(activities=[getattr(ProfilerActivity, activity)]) as seen:
        step(ids)
        if ids.is_cuda:
            torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
    spent: dict[str, float] = {}
    for event in events:
        name = event.name[:60]
        spent[name] = spent.get(name, 0.0) + event.time_range.elapsed_us() / 1000
    most = sorted(spent, key=spent.__getitem__, reverse=True)[:5]
    return {
        "kernels": len(events),
        "busy ms": round(sum(spent.values()), 3),
        "most, ms": {name: round(spent[name], 2) for name in most},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="for all of it (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are written")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="parts with one of these words in their names")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see whether it runs")
    run = Run(parser.parse_args())
    if run.cuda and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu --tiny shows whether the script runs")
    with run.guarded("environment", "ceilings"):
        environment(run)
    if run.wants("right", 20):
        right(run)
    for cell, methods in TINY_CELLS if run.args.tiny else CELLS:
        if run.wants(cell.name, 30):
            with run.guarded(cell.name, "model"):
                costs(run, cell, methods)
    run.note("end", "seconds", round(time.monotonic() - run.begin, 1))
    run.note("end", "skipped for want of time", run.found["skipped"])
    run.note("end", "wrong or failed", run.faults)
    return int(bool(run.faults))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
