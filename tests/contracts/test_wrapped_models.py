"""Models inside the wrappers that scripts put around them: found, pruned as they are alone, given back as they were."""

import copy

import pytest
import torch
import torch.distributed as distributed
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaModel, pipeline
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import vlmprune
from support.deeper import deeper
from support.families.qwen2_vl import QWEN2_VL
from support.families.real_processors import llava_processor, photograph
from support.host_parts import decoder
from support.tiny_models import CLIP, LLAMA_GQA, LLAVA_CLIP_GQA, llava_case
from vlmprune.errors import AlreadyAppliedError, NotAppliedError, UnsupportedCallError, UnsupportedFamilyError

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5 has it for GPUs only.
    fully_shard = None

ROWS = [[3, "A", 4], [2, "B", 1, "C", 6], [9]]
GREEDY = {"max_new_tokens": 4, "do_sample": False}
METHODS = {"fastervlm": {}, "divprune": {}, "fastv": {"layer": 1}}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def fsdp(*layers):
    policy = ModuleWrapPolicy(set(layers)) if layers else None
    device = torch.device("cpu")
    return lambda model: FullyShardedDataParallel(
        model, device_id=device, use_orig_params=True, auto_wrap_policy=policy
    )


def fsdp2(model):
    mesh = distributed.init_device_mesh("cpu", (1,))
    for layer in decoder(model).layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def lora(model):
    config = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=True)
    return get_peft_model(model, config)


def prepared(model):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(model)


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "FSDP": fsdp(),
    "FSDP-layers": fsdp(LlamaDecoderLayer, CLIPEncoderLayer),
    "FSDP-model": fsdp(LlavaModel),
    **({"FSDP2": fsdp2} if fully_shard is not None else {}),
    "PEFT": lora,
    "PEFT-in-DDP": lambda model: DistributedDataParallel(lora(model)),
    "accelerate": prepared,
}
COMPILED = {
    "wrapped": compiled,
    "forward": compiled_forward,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models_are_pruned_as_they_are_alone(wrap, method):
    case = deeper(LLAVA_CLIP_GQA) if method == "fastv" else LLAVA_CLIP_GQA
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    unpruned = model(**inputs).logits
    with vlmprune.pruned(model, method, keep=0.3, **METHODS[method]):
        logits, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    assert not torch.equal(logits, unpruned)

    wrapped = wrap(copy.deepcopy(model))
    torch.testing.assert_close(wrapped(**inputs).logits, unpruned)
    assert vlmprune.list_methods(wrapped) == vlmprune.list_methods(model)
    assert vlmprune.apply(wrapped, method, keep=0.3, **METHODS[method]) is wrapped
    torch.testing.assert_close(wrapped(**inputs).logits, logits)
    assert vlmprune.last_run(wrapped).method == method
    generating = wrapped if hasattr(wrapped, "generate") else wrapped.module
    assert torch.equal(generating.generate(**inputs, **GREEDY), tokens)
    with pytest.raises(AlreadyAppliedError):
        vlmprune.apply(wrapped, method)
    assert vlmprune.remove(wrapped) is wrapped
    torch.testing.assert_close(wrapped(**inputs).logits, unpruned)
    with pytest.raises(NotAppliedError):
        vlmprune.remove(wrapped)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 does not get the unpatched model compiled")
@pytest.mark.parametrize("compile_model", COMPILED.values(), ids=COMPILED)
def test_a_model_compiled_and_run_before_apply_is_pruned(compile_model):
    text = LlamaConfig(**{**LLAMA_GQA.to_dict(), "num_hidden_layers": 1})
    case = llava_case("llava-shallow", text, CLIPVisionConfig(**{**CLIP.to_dict(), "num_hidden_layers": 1}))
    model, inputs = case.build(torch.float32), case.inputs([[3, "A", 4]])
    with vlmprune.pruned(model, "random", keep=0.3):
        expected = model(**inputs).logits
    wrapped = compile_model(model)
    unpruned = wrapped(**inputs).logits
    with vlmprune.pruned(wrapped, "random", keep=0.3):
        torch.testing.assert_close(wrapped(**inputs).logits, expected)
        assert vlmprune.last_run(wrapped).images[0].total == 36
    torch.testing.assert_close(wrapped(**inputs).logits, unpruned)


def test_pipeline():
    model, processor = LLAVA_CLIP_GQA.build(torch.float32), llava_processor()
    asking = pipeline("image-text-to-text", model=model, processor=processor)
    image = Image.fromarray(photograph("astronaut"))
    given = {"images": image, "text": "<image> what is shown here ?", "generate_kwargs": GREEDY}
    unpruned = asking(**given)
    with vlmprune.pruned(asking, "fastervlm", keep=0.3) as same:
        assert same is asking
        answer = asking(**given)
        run = vlmprune.last_run(asking)
        tokens = model.generate(**processor(images=image, text=given["text"], return_tensors="pt"), **GREEDY)
    assert run.images[0].total == 36
    assert run.images[0].kept.numel() == 11
    assert processor.decode(tokens[0], skip_special_tokens=True).endswith(answer[0]["generated_text"][-10:])
    assert answer != unpruned
    assert asking(**given) == unpruned


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_comes_after_apply_is_refused(method):
    case = deeper(LLAVA_CLIP_GQA) if method == "fastv" else LLAVA_CLIP_GQA
    model, inputs = copy.deepcopy(case.build(torch.float32)), case.inputs(ROWS)
    adapted = lora(vlmprune.apply(model, method, keep=0.3, **METHODS[method]))
    if method == "divprune":
        # It hooks no projection, so nothing of it is replaced.
        adapted(**inputs)
        return
    with pytest.raises(UnsupportedCallError, match=r"`[qk]_proj` of a .* was replaced since `apply`: Linear then"):
        adapted(**inputs)
    vlmprune.apply(vlmprune.remove(adapted), method, keep=0.3, **METHODS[method])
    adapted(**inputs)


def test_a_model_wrapped_inside_after_apply_is_refused():
    model, inputs = copy.deepcopy(LLAVA_CLIP_GQA.build(torch.float32)), LLAVA_CLIP_GQA.inputs(ROWS)
    vlmprune.apply(model, "divprune", keep=0.3)
    del model.model.__dict__["get_image_features"]
    with pytest.raises(UnsupportedCallError, match="did not encode them where vlmprune watches"):
        model(**inputs)


def test_replicas_of_data_parallel_are_refused():
    model, inputs = LLAVA_CLIP_GQA.build(torch.float32), LLAVA_CLIP_GQA.inputs(ROWS)
    with vlmprune.pruned(model, "divprune", keep=0.3):
        replica = model.model._replicate_for_data_parallel()
        with pytest.raises(UnsupportedCallError, match="DistributedDataParallel"):
            replica(**inputs)
        model(**inputs)


def test_what_is_no_supported_model_is_named_with_what_is_supported():
    llava = LLAVA_CLIP_GQA.build(torch.float32)
    text_model = LlamaForCausalLM(llava.config.text_config)
    cases = {
        llava.model: r"LlavaModel is only a part: .* whole LlavaForConditionalGeneration is supported",
        QWEN2_VL.build(torch.float32).model: "whole Qwen2VLForConditionalGeneration is supported",
        text_model: r"LlamaForCausalLM is of no supported family \(model type 'llama'\)\. Supported: Llava",
        compiled(text_model): "LlamaForCausalLM in OptimizedModule is of no supported family",
        nn.Linear(2, 2): "Linear is of no supported family",
        "llava": "'str' is no model",
    }
    for model, message in cases.items():
        for call in (vlmprune.apply, vlmprune.list_methods):
            with pytest.raises(UnsupportedFamilyError, match=message) as raised:
                call(model)
            assert "nearest" not in str(raised.value)
