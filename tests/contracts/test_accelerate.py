"""Models that accelerate has dispatched or offloaded: its hooks rebuild what a call is given, signals included."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import vlmprune
from support.deeper import deeper
from support.families import gemma4
from support.family_cases import FAMILY_CASES
from support.matrix import serves
from support.tiny_models import LLAVA_CLIP_GQA

ROWS = [[3, "A", 4], [2, "B", 1, "C", 6], [9]]
CPU = torch.device("cpu")
# A method without signals of the tower, one with, one between layers.
METHODS = ("divprune", "fastervlm", "fastv")


def split(model, folder):
    """Dispatch with the language model on disk; everything else stays where it is."""
    places = {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_parameters(recurse=False)}
    decoders = [path for path in places if path in ("model.language_model", "model.text_model")]
    places |= {**dict.fromkeys(decoders, "disk"), "lm_head": "cpu"}
    skipped = sorted(model._skip_keys_device_placement)
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, skip_keys=skipped, force_hooks=True)


WAYS = {
    "dispatch_model": split,
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
}


def case_of(family, method):
    return deeper(family) if method == "fastv" else family


def check(case, method, dispatched):
    """Compare generations of a dispatched copy with those of the model itself."""
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    beams = {**greedy, "num_beams": 3, "num_return_sequences": 2}
    parameters = {"layer": 1} if method == "fastv" else {}
    results = []
    for each in (model, dispatched):
        with torch.no_grad(), vlmprune.pruned(each, method, keep=0.3, **parameters):
            tokens = [each.generate(**inputs, **greedy), each.generate(**inputs, **beams)]
            results.append((tokens, vlmprune.last_run(each)))
    (expected, _), (given, run) = results
    assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
    assert all(image.stages[-1][1].numel() < image.total for image in run.images)


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method)
        for family in FAMILY_CASES
        for method in METHODS
        if serves(method, family) and family not in gemma4.CASES
    ],
)
def test_generate_on_a_split_model(family, method, tmp_path):
    case = case_of(family, method)
    check(case, method, split(copy.deepcopy(case.build(torch.float32)), tmp_path))


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_the_host_of_gemma_4_reads_weights_of_its_offloaded_decoder(tmp_path):
    case = gemma4.CASES[0]
    model = split(copy.deepcopy(case.build(torch.float32)), tmp_path)
    with torch.no_grad(), pytest.raises(RuntimeError, match="device meta"):
        model.generate(**case.inputs(ROWS), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("method", METHODS)
def test_generate_on_an_offloaded_model(method, way, tmp_path):
    case = case_of(LLAVA_CLIP_GQA, method)
    check(case, method, WAYS[way](copy.deepcopy(case.build(torch.float32)), tmp_path))


def test_apply_before_dispatch_and_remove_after(tmp_path):
    model, inputs = LLAVA_CLIP_GQA.build(torch.float32), LLAVA_CLIP_GQA.inputs(ROWS)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        unpruned = model.generate(**inputs, **greedy)
        with vlmprune.pruned(model, "fastervlm", keep=0.3):
            expected = model.generate(**inputs, **greedy)
        dispatched = split(vlmprune.apply(copy.deepcopy(model), "fastervlm", keep=0.3), tmp_path)
        assert torch.equal(dispatched.generate(**inputs, **greedy), expected)
        assert torch.equal(vlmprune.remove(dispatched).generate(**inputs, **greedy), unpruned)
