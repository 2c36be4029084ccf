"""Contract 2: remove leaves every module as it was, bit for bit, also after an exception; models do not see each other."""

import copy

import pytest
import torch

import vlmprune
from support.host_parts import decoder
from support.matrix import METHOD_PARAMETERS, over_matrix


def fingerprint(model):
    """Everything of every module that a patch could touch."""
    state = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key == "rope_deltas":
                continue  # The host's own note of its latest call.
            is_table = key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_pre_hooks"))
            state[name, key] = [(k, id(v)) for k, v in value.items()] if is_table else id(value)
        state[name, "forward"] = (id(module.forward.__func__), type(module))
    return state


@over_matrix
def test_remove_is_exact(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs([[3, "A", 4], [2, "B", 6]])
    with torch.no_grad():
        logits = model(**inputs).logits
        before = fingerprint(model)
        vlmprune.apply(model, method, keep=0.3, **METHOD_PARAMETERS[method])
        assert fingerprint(model) != before
        assert not torch.equal(model(**inputs).logits, logits)
        model.generate(**inputs, max_new_tokens=3)
        vlmprune.remove(model)
        assert fingerprint(model) == before
        assert torch.equal(model(**inputs).logits, logits)


@over_matrix
def test_exception_inside_leaves_the_model_usable(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs([[3, "A", 4]])
    last_layer = decoder(model).layers[-1]

    def explode(module, args):
        raise RuntimeError("out of memory")

    with torch.no_grad():
        logits = model(**inputs).logits
        before = fingerprint(model)
        with vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
            pruned_logits = model(**inputs).logits
            handle = last_layer.register_forward_pre_hook(explode)
            try:
                with pytest.raises(RuntimeError, match="out of memory"):
                    model(**inputs)
            finally:
                handle.remove()
            calls = model.__dict__["_vlmprune"].calls
            assert (calls.model, calls.tower) == ([], []), "the failed call left its state behind"
            assert torch.equal(model(**inputs).logits, pruned_logits)
        with (
            pytest.raises(RuntimeError, match="in the body"),
            vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]),
        ):
            raise RuntimeError("in the body")
        assert fingerprint(model) == before
        assert torch.equal(model(**inputs).logits, logits)


@over_matrix
def test_two_models_are_independent(method, family):
    patched, plain = family.build(torch.float32), copy.deepcopy(family.build(torch.float32))
    inputs = family.inputs([[3, "A", 4]])
    with torch.no_grad():
        logits = plain(**inputs).logits
        before = fingerprint(plain)
        with vlmprune.pruned(patched, method, keep=0.3, **METHOD_PARAMETERS[method]):
            patched(**inputs)
            assert torch.equal(plain(**inputs).logits, logits)
            assert fingerprint(plain) == before
            with pytest.raises(vlmprune.errors.NotAppliedError):
                vlmprune.last_run(plain)


@over_matrix
def test_a_copy_of_a_patched_model_is_patched_by_itself(method, family):
    model = copy.deepcopy(family.build(torch.float32))
    inputs = family.inputs([[3, "A", 4]])
    with torch.no_grad():
        logits, before = model(**inputs).logits, fingerprint(model)
        with vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
            expected = model(**inputs).logits
            copied = copy.deepcopy(model)
            assert torch.equal(copied(**inputs).logits, expected)
            vlmprune.remove(copied)
            assert torch.equal(copied(**inputs).logits, logits)
            assert torch.equal(model(**inputs).logits, expected)
            copied = copy.deepcopy(model)
        assert fingerprint(model) == before
        assert torch.equal(copied(**inputs).logits, expected)
        assert torch.equal(copied.generate(**inputs, max_new_tokens=3), copied.generate(**inputs, max_new_tokens=3))


@over_matrix
def test_replaced_forward_of_accelerate_survives(method, family):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = family.build(torch.float32)
    inputs = family.inputs([[3, "A", 4]])
    language_model = decoder(model)
    with torch.no_grad():
        with vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
            expected = model(**inputs).logits
        add_hook_to_module(language_model, ModelHook())
        replaced = language_model.forward
        try:
            with vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
                assert torch.equal(model(**inputs).logits, expected)
            assert language_model.forward is replaced
        finally:
            remove_hook_from_module(language_model)
