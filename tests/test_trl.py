"""TRL's trainers: the policy is perturbed where it is trained; reference, old log-probabilities and samples are not."""

from __future__ import annotations

import warnings

import accelerate
import pytest
import torch
import transformers
from helpers import adamw, adapters, difference, frozen, tokens
from models import tiny_llama
from peft import GraloraConfig, LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from flatlora import BiLoRAOptimizer, GGPOOptimizer, LoRASAMOptimizer
from flatlora.hf import BiLoRAFactory, GGPOFactory, LoRASAMFactory, log_metrics

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="with a CUDA build of torch, TRL asks triton for a driver, and there is no GPU",
)


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text(*numbers):
    return " ".join(f"w{3 + i % 61}" for i in numbers)


COMMON = {
    "max_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
}


def dpo(model, folder, **kwargs):
    rows = [{"prompt": text(i), "chosen": text(i, i + 1), "rejected": text(i, i + 2)} for i in range(8)]
    config = trl.DPOConfig(output_dir=str(folder), per_device_train_batch_size=2, max_length=16, **COMMON)
    return trl.DPOTrainer(
        model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer(), **kwargs
    )


def grpo(model, folder, **kwargs):
    rows = [{"prompt": text(i, i + 1)} for i in range(8)]
    config = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        beta=0.1,
        num_iterations=2,
        gradient_accumulation_steps=1,
        steps_per_generation=2,
        **COMMON,
    )
    reward = lambda completions, **_: [float(len(set(c))) for c in completions]  # noqa: E731
    return trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        **kwargs,
    )


def with_ggpo(model):
    return GGPOOptimizer(adamw(model), model, sigma=0.3, seed=1)


def with_bilora(model):
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, rho=1.0, seed=1)
    with torch.no_grad():
        for p in optimizer.perturbation_parameters():
            p.normal_(0, 0.05)
    return optimizer


def with_lorasam(model):
    """After a step, since the first one is unperturbed."""
    optimizer = LoRASAMOptimizer(adamw(model), model, rho=1.0)
    model(input_ids=tokens(0), labels=tokens(0)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def watch(model):
    """What each pass through one layer was: recording gradients, its active adapters, perturbed."""
    seen = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))

    def look(module, args, output):
        with torch.no_grad():
            clean = type(module).forward(module, *args)
        off = bool((output.detach() - clean).abs().max() > 1e-5)
        seen.append(
            (torch.is_grad_enabled(), "disabled" if module.disable_adapters else module.active_adapters[0], off)
        )

    layer.register_forward_hook(look)
    return seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [with_ggpo, with_bilora, with_lorasam])
@pytest.mark.parametrize("reference", ["ref", "disabled"])
@pytest.mark.parametrize("build", [dpo, grpo])
def test_the_policy_alone_is_perturbed(build, reference, wrap, tmp_path):
    model = tiny_llama()
    if reference == "disabled":  # a new adapter over a plain model: the reference is the base
        base: LlamaForCausalLM = model.unload()
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        trainer = build(base, tmp_path, peft_config=config)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = build(model, tmp_path)
    model = trainer.model
    trainer.optimizer = optimizer = wrap(model)
    before, start, seen = frozen(model), adapters(model), watch(model)
    trainer.train()
    assert difference(before, frozen(model)) is None and difference(start, adapters(model)) is not None
    assert {off for grad, name, off in seen if grad and name == "default"} == {True}
    assert {off for grad, _, off in seen if not grad} == {False}
    assert any(name == reference for _, name, _ in seen)
    assert not any(off for _, name, off in seen if name == reference) and optimizer is not None


def sent_to_vllm(model):
    """The names under which TRL sends the weights of `model`, by each of its loops that runs without processes."""
    generation = pytest.importorskip("trl.generation.vllm_generation")
    grpo = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    loop = object.__new__(generation.VLLMGeneration)
    loop.model, loop.accelerator = model, accelerate.Accelerator(cpu=True)
    loop._dist = generation.DistributedBackend(loop.accelerator)
    loop.mode, loop.enable_sleep_mode, loop._weight_metadata = "server", False, None
    sent = []
    loop.vllm_client = type(
        "Client",
        (),
        {
            "update_named_params": lambda self, metadata, params: sent.extend(name for name, _ in params),
            "reset_prefix_cache": lambda self: None,
        },
    )()
    loop.sync_weights()
    assert [name for name, *_ in loop._weight_metadata] == sent
    return sent, [name for name, _ in grpo._iter_vllm_named_params(model)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [LoraConfig, GraloraConfig])
def test_no_name_of_the_auxiliary_is_sent_to_vllm(kind, training):
    torch.manual_seed(0)
    base = tiny_llama().unload()
    names = [name for name, _ in base.named_parameters()]
    model = get_peft_model(base, kind(r=4, target_modules=["q_proj", "down_proj"])).train(training)
    optimizer = BiLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, rho=1.0)
    for _ in range(2):
        model.train()(input_ids=tokens(0), labels=tokens(0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.train(training)
    assert optimizer.perturbation_norm() > 0
    assert sent_to_vllm(model) == (names, names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("is_optimizer_factory" not in vars(transformers.trainer), reason="calls no factories")
@pytest.mark.parametrize(
    ("factory", "method"),
    [(GGPOFactory, GGPOOptimizer), (BiLoRAFactory, BiLoRAOptimizer), (LoRASAMFactory, LoRASAMOptimizer)],
)
def test_sft_by_a_factory_logs_its_own_numbers_and_the_methods(factory, method, tmp_path):
    base: LlamaForCausalLM = tiny_llama().unload()
    trainer = trl.SFTTrainer(
        base,
        trl.SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, logging_steps=1, **COMMON),
        train_dataset=datasets.Dataset.from_dict({"text": [text(i, i + 1, i + 2) for i in range(8)]}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=(factory, {"lr": 1e-2}),
    )
    log_metrics(trainer)
    start = adapters(trainer.model)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is method
    assert all(not torch.equal(p, start[n]) for n, p in adapters(trainer.model).items() if n in start)
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 2 and all("mean_token_accuracy" in log for log in steps)
    assert {key for log in steps for key in log if key.startswith("flatlora/")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [with_ggpo, with_bilora, with_lorasam])
def test_sft_of_an_optimizer_that_is_handed_over(wrap, tmp_path):
    model = tiny_llama()
    optimizer = wrap(model)
    before, start = frozen(model), adapters(model)
    config = {**COMMON, "save_strategy": "steps"}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(output_dir=str(tmp_path), gradient_accumulation_steps=2, **config),
        train_dataset=datasets.Dataset.from_dict({"text": [text(i, i + 1, i + 2) for i in range(8)]}),
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert difference(before, frozen(model)) is None and difference(start, adapters(model)) is not None
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert saved["flatlora"].keys() == {type(optimizer).__name__}
