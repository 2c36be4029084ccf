"""Classes of one's own: registered in a line, explained, and never taken for a class of transformers that has their name."""

import pytest
import torch
from torch import nn

import vlmprune
from support.general.host_case import build
from vlmprune.errors import ParameterError, UnknownNameError, UnsupportedFamilyError
from vlmprune.patches.families import registry
from vlmprune.patches.families.llava import Llava


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(registry, "REGISTERED", {})
    return build("LlavaForConditionalGeneration")


def own_class(case, name):
    """The model as one of a class that transformers has not, built of the same modules."""
    facts = {key: value for key, value in vars(type(case.model)).items() if key not in ("__dict__", "__weakref__")}
    case.model.__class__ = type(name, type(case.model).__bases__, {**facts, "__module__": "someone.modeling"})
    return case.model


def test_a_class_of_ones_own_is_registered_in_a_line(case):
    model = own_class(case, "SomeonesVLM")
    inputs = case.inputs([[3, "A", 4]])
    vlmprune.register_family(type(model), multimodal_model="model", language_model="language_model")
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.5):
        model(**inputs)
        assert vlmprune.last_run(model).images[0].kept.numel() == case.tokens("A") // 2
    with pytest.raises(UnknownNameError, match="language_model"):
        vlmprune.register_family(type(model), languag_model="llm")
    with pytest.raises(ParameterError, match="class of modules"):
        vlmprune.register_family(model)
    with pytest.raises(ParameterError, match="no family"):
        vlmprune.register_family(type(model), nn.Module)


def test_a_wrong_path_is_named(case):
    model = own_class(case, "SomeonesVLM")
    vlmprune.register_family(type(model), language_model="llm")
    with pytest.raises((UnsupportedFamilyError, AttributeError), match="llm"):
        vlmprune.apply(model, "divprune", keep=0.5)


def test_a_class_of_the_same_name_is_refused_until_it_is_registered(case):
    model = own_class(case, "LlavaForConditionalGeneration")
    with pytest.raises(
        UnsupportedFamilyError, match=r"someone\.modeling\.LlavaForConditionalGeneration.*register_family"
    ):
        vlmprune.apply(model, "divprune", keep=0.5)
    assert "_vlmprune" not in vars(model)
    vlmprune.register_family(type(model), Llava)
    assert "fastervlm" in vlmprune.list_methods(model)


def test_what_was_found_is_explained():
    model = build("AyaVisionForConditionalGeneration").model
    said = vlmprune.explain(model)
    for part in ("language_model: Cohere2Model", "placeholders", "divprune", "tower", "so not"):
        assert part in said
    assert "cross attention" in vlmprune.explain(build_mllama())


def build_mllama():
    from support.general.shrunk import model_class, shrunk_config

    cls = model_class("MllamaForConditionalGeneration")
    with torch.device("meta"):
        return cls(shrunk_config(cls))
