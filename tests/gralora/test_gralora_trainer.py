"""GraLoRA under transformers' Trainer and TRL's: quantised models too, checkpoints of the adapters alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from gralora_models import adapted, llama, logits, randomised
from helpers import adapters as trained
from helpers import difference
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from flatlora import GGPOOptimizer, apply_gralora, load_gralora, merge_gralora, save_gralora, unload_gralora

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS = {
    "float": None,
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
ROWS = [{"input_ids": [(i * j) % 64 for j in range(8)], "labels": [(i * j) % 64 for j in range(8)]} for i in range(16)]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(autouse=True)
def unpacked(monkeypatch):
    """bitsandbytes fails to repack layers as small as these, on CPUs where it repacks in evaluations."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model on disk."""
    path = tmp_path_factory.mktemp("base")
    llama(tie_word_embeddings=False).save_pretrained(path)
    return str(path)


def base(folder, kind):
    quantised = {} if CONFIGS[kind] is None else {"quantization_config": CONFIGS[kind], "device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **quantised)


def with_adapter(folder, kind, **settings):
    torch.manual_seed(0)
    return apply_gralora(base(folder, kind), ["q_proj", "down_proj"], r=4, k=2, **settings)


def plain(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def ggpo(model):
    return GGPOOptimizer(plain(model), model, sigma=0.1, seed=1)


def arguments(path, **options):
    common = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "seed": 3, "use_cpu": True}
    return TrainingArguments(str(path), **common, report_to=[], disable_tqdm=True, **options)


def trainer(model, path, optimizer=plain, **options):
    return Trainer(model, arguments(path, **options), train_dataset=ROWS, optimizers=(optimizer(model), None))


def files(path):
    return {file.name for file in path.iterdir()}


@pytest.mark.parametrize("optimizer", [plain, ggpo])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_resumed_run_is_the_uninterrupted_one_and_its_adapter_loads(kind, optimizer, folder, tmp_path, caplog):
    straight = with_adapter(folder, kind)
    start = trained(straight)
    trainer(straight, tmp_path / "a", optimizer).train()
    assert not any(torch.equal(p, start[name]) for name, p in trained(straight).items())
    assert files(tmp_path / "a" / "checkpoint-2") >= {*ADAPTER, "model.safetensors"}
    assert load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors").keys() == start.keys()

    resumed = with_adapter(folder, kind)
    trainer(resumed, tmp_path / "b", optimizer).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert difference(trained(straight), trained(resumed)) is None and "missing keys" not in caplog.text

    last = tmp_path / "a" / "checkpoint-4"
    expected = logits(straight.eval())
    assert torch.equal(logits(load_gralora(base(folder, kind), last).eval()), expected)
    theirs = PeftModel.from_pretrained(base(folder, kind), last).eval()
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    if kind == "float":  # the file names the base, not how it was quantised
        through_transformers = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32).eval()
        assert torch.allclose(logits(through_transformers), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["float", "nf4"])
def test_the_best_model_is_loaded_at_the_end(kind, folder, tmp_path):
    best = {}

    class Judge(TrainerCallback):
        """Says that step 2 was the best."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

        def on_save(self, args, state, control, model=None, **kwargs):
            best.setdefault("weights", trained(model))

    model = with_adapter(folder, kind, modules_to_save=["model.norm"])
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = Trainer(
        model, arguments(tmp_path, **options), train_dataset=ROWS, eval_dataset=ROWS[:2], callbacks=[Judge()],
        optimizers=(plain(model), None),
    )  # fmt: skip
    at_end = {}
    load = run._load_best_model
    run._load_best_model = lambda: at_end.update(trained(model)) or load()
    run.train()
    assert difference(trained(model), best["weights"]) is None and difference(trained(model), at_end) is not None


def test_what_is_trained_beside_the_adapters_is_resumed_too(folder, tmp_path):
    """A parameter that the user unfroze, and a buffer that forward passes change."""

    def build():
        model = with_adapter(folder, "float")
        model.model.norm.weight.requires_grad_(True)
        model.register_buffer("passes", torch.zeros(()))
        model.register_forward_hook(lambda module, *_: module.passes.add_(1) and None)
        return model

    straight, resumed = build(), build()
    trainer(straight, tmp_path / "a").train()
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert difference(trained(straight), trained(resumed)) is None and straight.passes == resumed.passes == 4


def test_gradient_checkpointing_reaches_the_adapters(folder, tmp_path):
    runs = []
    for options in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}):
        model = with_adapter(folder, "nf4")
        trainer(model, tmp_path, **options).train()
        runs.append(trained(model))
    assert all(torch.allclose(runs[0][name], runs[1][name], atol=1e-6) for name in runs[0])


@pytest.mark.parametrize("kind", ["float", "nf4"])
def test_save_pretrained_writes_what_save_gralora_does(kind, folder, tmp_path):
    model = randomised(with_adapter(folder, kind, modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "a")
    save_gralora(model, tmp_path / "b")
    model.save_pretrained(tmp_path / "c", state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "d", is_main_process=False)
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c") == ADAPTER
    a, b, c = ((tmp_path / path / "adapter_config.json").read_text() for path in "abc")
    assert a == b == c
    a, b, c = (load_file(tmp_path / path / "adapter_model.safetensors") for path in "abc")
    assert difference(a, b) is None and difference(a, c) is None
    model.save_pretrained(tmp_path / "d", is_main_process=False, state_dict={})
    with pytest.raises(ValueError, match=r"no adapter of 4 layers \(first: 'model\.layers\.0\.mlp\.down_proj'\)"):
        model.save_pretrained(tmp_path / "d", state_dict={})
    assert not (tmp_path / "d").exists()


def test_the_adapter_alone_is_pushed_to_the_hub(folder, tmp_path, monkeypatch):
    pushed = []

    class Upload:
        def push_to_hub(self, repo_id, **kwargs):
            self.save_pretrained(tmp_path / "temporary", max_shard_size="50GB")
            pushed.append((repo_id, kwargs, files(tmp_path / "temporary")))

    monkeypatch.setattr(transformers.LlamaForCausalLM, "push_to_hub", Upload.push_to_hub)
    model = with_adapter(folder, "nf4")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert pushed == [("mine", {"private": True}, ADAPTER)]


@pytest.mark.parametrize("take_off", [unload_gralora, merge_gralora])
def test_no_trace_is_left_of_it(take_off, folder, tmp_path):
    model, fresh = with_adapter(folder, "float"), base(folder, "float")
    take_off(model)
    assert model.__dict__.keys() == fresh.__dict__.keys()
    model.save_pretrained(tmp_path)
    assert files(tmp_path) >= {"config.json", "model.safetensors"} and not files(tmp_path) & ADAPTER
    quantised = unload_gralora(with_adapter(folder, "nf4"))
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(quantised, arguments(tmp_path), train_dataset=ROWS)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(how, folder, tmp_path):
    model = with_adapter(folder, "float")
    twin = randomised(how(model))
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(load_gralora(base(folder, "float"), tmp_path).eval()), logits(twin.eval()))


def test_other_modules_are_told_nothing(folder):
    plain_module = apply_gralora(nn.Sequential(nn.Linear(8, 8)), ["0"], r=4, k=2)
    assert "save_pretrained" not in vars(plain_module) and not hasattr(plain_module, "_hf_peft_config_loaded")
    around = nn.Sequential(base(folder, "float"))
    apply_gralora(around, ["q_proj"], r=4, k=2)
    assert "save_pretrained" not in vars(around[0])


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="with a CUDA build of torch, TRL asks triton for a driver, and there is no GPU",
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_trl_trains_it_and_resumes_to_the_bit(kind, folder, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from test_trl import text, tokenizer

    def run(path, **options):
        model = with_adapter(folder, kind)
        config = trl.SFTConfig(
            str(path), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        rows = datasets.Dataset.from_dict({"text": [text(i, i + 1, i + 2) for i in range(8)]})
        trainer = trl.SFTTrainer(
            model, config, train_dataset=rows, processing_class=tokenizer(), optimizers=(ggpo(model), None)
        )
        trainer.train(**options)
        return model

    straight = run(tmp_path / "a")
    resumed = run(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert difference(trained(straight), trained(resumed)) is None
    loaded = load_gralora(base(folder, kind), tmp_path / "a" / "checkpoint-4")
    for name, p in trained(straight).items():  # TRL trains the adapters of quantised models in bfloat16
        assert p.dtype == (torch.float32 if kind == "float" else torch.bfloat16)
        loaded.get_parameter(name).data = loaded.get_parameter(name).data.to(p.dtype)
    assert torch.equal(logits(loaded.eval()), logits(straight.eval()))


# --- a layer whose weight is another module's too ---------------------------------------------------------------------


def test_a_tied_head_trains_and_is_saved_by_the_trainer(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")

    def build():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        return apply_gralora(model, ["lm_head", "q_proj"], r=4, k=2)

    straight, resumed = build(), build()
    trainer(straight, tmp_path / "a").train()
    trainer(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert difference(trained(straight), trained(resumed)) is None
    assert straight.lm_head.base_layer.weight is straight.model.embed_tokens.weight
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = load_gralora(again, tmp_path / "a" / "checkpoint-4").eval()
    assert torch.equal(logits(loaded), logits(straight.eval()))


@pytest.mark.parametrize("how", [{"targets": ["lm_head"]}, {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}])
def test_merging_says_that_it_unties(how, tmp_path):
    model = adapted(llama(tie_word_embeddings=True), **how)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "lm_head.weight":
                p.normal_()
    expected, embeddings = logits(model), model.model.embed_tokens.weight.clone()
    with pytest.warns(UserWarning, match=r"of lm_head were tied.*tie_word_embeddings = False before saving"):
        merge_gralora(model)
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected, atol=1e-5)
