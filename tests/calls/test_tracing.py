"""Export, tracing and compilation in one graph: an error that names pruning and the remedy; plain compilation works."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import UnsupportedCallError

CASE = LLAVA_CLIP_GQA


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("method", "parameters"), [("divprune", {}), ("fastv", {"layer": 1})])
def test_export_names_pruning_and_the_remedy(method, parameters):
    case = deeper(CASE)
    model, inputs = case.build(torch.float32), case.inputs([[3, "A", 4]])
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.5, **parameters):
        expected = model(**inputs).logits
        with pytest.raises(UnsupportedCallError, match=r"cannot be exported.*call vlmprune.remove\(model\) first"):
            torch.export.export(model, (), inputs, strict=False)
        with pytest.raises(UnsupportedCallError, match="cannot be exported or traced"):
            torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
        # Nothing is left of the calls that failed.
        assert torch.equal(model(**inputs).logits, expected)


def test_one_graph_for_a_prefill_is_refused_by_torch_in_our_words():
    model, inputs = CASE.build(torch.float32), CASE.inputs([[3, "A", 4]])
    refused = torch._dynamo.exc.Unsupported
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.5):
        for called in (model, model.forward):
            compiled = torch.compile(called, fullgraph=True, backend="eager")
            with pytest.raises(refused, match=r"vlmprune prunes visual tokens here[\s\S]*without fullgraph=True"):
                compiled(**inputs)
        encode = torch.compile(model.model.get_image_features, fullgraph=True, backend="eager")
        with pytest.raises(refused, match="vlmprune prunes visual tokens here"):
            encode(inputs["pixel_values"])
        with pytest.raises(refused, match=r"vlmprune prunes[\s\S]*call vlmprune.remove\(model\)"):
            torch.export.export(model, (), inputs, strict=True)


def test_compiled_in_several_graphs_it_prunes_and_takes_options():
    model, inputs = CASE.build(torch.float32), CASE.inputs([[3, "A", 4], [2, "B", 6]])
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.5):
        compiled = torch.compile(model, backend="eager")
        with vlmprune.options(model, keep=[0.4, 9]):
            expected = model(**inputs).logits
            kept = [image.kept.tolist() for image in vlmprune.last_run(model).images]
            torch.testing.assert_close(compiled(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
            assert [image.kept.tolist() for image in vlmprune.last_run(model).images] == kept
        assert [len(tokens) for tokens in kept] == [14, 9]
