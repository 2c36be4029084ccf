"""How a method gets into a model and out again: the hooks, on a model of three layers."""

import copy

import pytest
import torch
from patches.toy import ONES, ToyModel

from vlmprune.patches.hooks import HookSet


class Watcher:
    """Hooks as a site has them: bound methods, so that a deep copy of the model gets its own."""

    def __init__(self, log):
        self.log = log

    def enter(self, module, args, kwargs):
        self.log.append(f"enter {module.number}")
        return args, {"hidden": kwargs["hidden"] * 2}

    def leave(self, module, args, kwargs, output):
        self.log.append(f"leave {module.number}")
        return output[:, :2]

    def note(self, module, args, kwargs, output):
        self.log.append("noted")


def test_hooks_run_around_their_module_and_may_replace_what_goes_in_and_out():
    model = ToyModel()
    hooks, watcher = HookSet(), Watcher(model.log)
    hooks.before("entry", model.layers[1], watcher.enter)
    hooks.after("exit", model.layers[1], watcher.leave)
    result = model(ONES)
    assert model.log == ["layer 0", "enter 1", "layer 1", "leave 1", "layer 2"]
    assert torch.equal(result, (ONES[:, :2] + 0) * 2 + 1 + 2)


def test_what_is_hooked_is_told_in_order_with_its_module():
    model, hooks = ToyModel(), HookSet()
    watcher = Watcher(model.log)
    hooks.after("exit", model.layers[2], watcher.leave)
    hooks.before("entry", model.layers[0], watcher.enter)
    hooks.replace("encoder", model, "encode", len)
    assert hooks.described(model) == [
        ("layers.2", "after", "exit"),
        ("layers.0", "before", "entry"),
        ("ToyModel", "encode", "encoder"),
    ]
    assert repr(hooks) == "HookSet(exit, entry, encoder)"


def test_removal_leaves_every_module_as_it_was():
    model = ToyModel()
    before = [dict(module.__dict__) for module in model.modules()]
    tables = [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    hooks, watcher = HookSet(), Watcher(model.log)
    hooks.before("entry", model.layers[0], watcher.enter)
    hooks.after("exit", model, watcher.note, always=True)
    hooks.replace("encoder", model, "encode", len)
    assert model.encode("four") == 4
    hooks.remove()
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == tables
    assert model.encode("four") == "four"


def test_an_attribute_that_the_instance_had_comes_back():
    model, hooks = ToyModel(), HookSet()
    model.__dict__["encode"] = own = lambda value: -value
    hooks.replace("encoder", model, "encode", len)
    hooks.remove()
    assert model.encode is own


def test_a_name_is_given_once_and_the_second_hook_is_not_left_behind():
    model, hooks = ToyModel(), HookSet()
    watcher = Watcher(model.log)
    hooks.before("entry", model.layers[0], watcher.enter)
    with pytest.raises(ValueError, match="'entry' is already registered"):
        hooks.before("entry", model.layers[1], watcher.enter)
    assert not model.layers[1]._forward_pre_hooks


def test_an_exit_hook_that_must_run_runs_after_an_exception():
    model, hooks = ToyModel(), HookSet()
    hooks.after("always", model, Watcher(model.log).note, always=True)
    hooks.after("only on success", model.layers[0], Watcher(model.log).note)
    with pytest.raises(TypeError):
        model("not a tensor")
    assert model.log == ["layer 0", "noted"]


def test_a_deep_copy_has_hooks_of_its_own():
    model = ToyModel()
    watcher = Watcher(model.log)
    model.watcher = watcher
    model.hooks = HookSet()
    model.hooks.before("entry", model.layers[0], watcher.enter)
    twin = copy.deepcopy(model)
    twin(ONES)
    assert model.log == []
    assert twin.log == ["enter 0", "layer 0", "layer 1", "layer 2"]
