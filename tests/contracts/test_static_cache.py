"""Static caches: the same tokens as with the default cache, and the prompt takes only the places of what was kept."""

import pytest
import torch
from transformers import CompileConfig, StaticCache

import vlmprune
from support.caches import cache_lengths, layer_keys, layers_with_keys
from support.matrix import METHOD_PARAMETERS, over_matrix, over_sites

ROWS = {"single": [[3, "A", 4]], "padded": [[3, "A", 4], [2, "B", 1, "C", 6], [9]]}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
CASES = {case.id: case.values for case in over_matrix.args[1]}
over_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def filled(cache):
    """The places of each layer that hold something."""
    return [int((keys != 0).any(-1).any(1).any(0).sum()) for keys in layer_keys(cache)]


@over_sites
@over_rows
def test_static_equals_dynamic(method, family, rows):
    model = family.build(torch.float32)
    inputs = family.inputs(rows)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        wanted = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        static = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, cache_implementation="static")
    assert torch.equal(static.sequences, wanted.sequences)
    assert isinstance(static.past_key_values, StaticCache)
    # Full windows hold one entry more in a static cache.
    slides = [layer.is_sliding for layer in layers_with_keys(wanted.past_key_values)]
    pairs = zip(filled(static.past_key_values), cache_lengths(wanted.past_key_values), slides, strict=True)
    assert all(one == other or (sliding and one == other + 1) for one, other, sliding in pairs)


@over_sites
def test_beams_on_a_static_cache(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS["padded"])
    beams = {**GREEDY, "num_beams": 2, "num_return_sequences": 2}
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        wanted = model.generate(**inputs, **beams)
        assert torch.equal(model.generate(**inputs, **beams, cache_implementation="static"), wanted)


@over_sites
@over_rows
def test_static_cache_by_hand(method, family, rows):
    """Prefill, a step, a question of three tokens; with a mask and, for one row, without."""
    model = family.build(torch.float32)
    inputs = family.inputs(rows)
    mask = inputs["attention_mask"]
    config = model.config.get_text_config()
    start = family.positions(model, inputs)[..., -1:]
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        for masked in (True, False) if len(rows) == 1 else (True,):
            caches = [None, StaticCache(config=config, max_cache_len=inputs["input_ids"].shape[1] + 8)]
            past, answers = mask, [[], []]
            for new in (None, 1, 3):
                if new is not None:
                    past = torch.cat([past, torch.ones(len(rows), new, dtype=torch.long)], 1)
                for turn in range(2):
                    if new is None:
                        call = inputs
                    else:
                        ids = torch.arange(21, 21 + new)[None].expand(len(rows), -1)
                        offset = past.shape[1] - mask.shape[1] - new + 1
                        call = {"input_ids": ids, "position_ids": start + offset + torch.arange(new)}
                        if masked:
                            call["attention_mask"] = past
                    output = model(**call, past_key_values=caches[turn], use_cache=True)
                    caches[turn] = output.past_key_values
                    answers[turn].append(output.logits[:, -1])
            for dynamic, static in zip(*answers, strict=True):
                torch.testing.assert_close(static, dynamic, atol=1e-5, rtol=1e-4)


@over_sites
def test_second_turn_on_a_static_cache(method, family):
    model = family.build(torch.float32)
    first = family.inputs(ROWS["padded"])
    width = first["input_ids"].shape[1]
    config = model.config.get_text_config()
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        answers = []
        for cache in (None, StaticCache(config=config, max_cache_len=width + 30)):
            turn = model.generate(**first, **GREEDY, past_key_values=cache, return_dict_in_generate=True)
            ids = torch.cat([turn.sequences, torch.tensor([[21, 22, 23]]).expand(3, -1)], 1)
            mask = torch.cat([first["attention_mask"], torch.ones(3, 9, dtype=torch.long)], 1)
            answers.append(
                model.generate(input_ids=ids, attention_mask=mask, past_key_values=turn.past_key_values, **GREEDY)
            )
    assert torch.equal(*answers)


def test_a_full_static_cache_is_named():
    family = CASES["divprune-llava-clip-gqa"][1]
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS["single"])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=20)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3):
        # 43 tokens, of which 18 are kept: they fit in.
        model(**inputs, past_key_values=cache)
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
        with pytest.raises(vlmprune.errors.UnsupportedCallError, match="20 places; layer 0 holds 20 entries"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_a_pruned_static_cache_is_guarded_and_reset():
    family = CASES["divprune-llava-clip-gqa"][1]
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS["single"])
    with torch.no_grad():
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        wanted = model.generate(**inputs, **GREEDY)
        with vlmprune.pruned(model, "divprune", keep=0.3):
            model.generate(**inputs, **GREEDY, past_key_values=cache)
        with pytest.raises(vlmprune.errors.UnsupportedCallError, match="'divprune'"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(vlmprune.errors.UnsupportedCallError, match="cropped"):
            cache.crop(-2)
        cache.reset()
        assert type(cache) is StaticCache
        assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), wanted)


class Graphs:
    """A backend that compiles nothing and counts."""

    def __init__(self):
        self.count = 0

    def __deepcopy__(self, memo):
        return self

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def compiled(graphs, **options):
    config = CompileConfig(backend=graphs, mode=None, **options)
    config._compile_all_devices = True
    torch._dynamo.reset()
    return {"cache_implementation": "static", "compile_config": config}


@over_rows
@pytest.mark.parametrize("name", ["divprune-llava-clip-gqa", "fastervlm-qwen2.5-vl", "divprune-qwen3-vl"])
def test_compiled_decode_is_one_graph(name, rows):
    method, family = CASES[name]
    model = family.build(torch.float32)
    inputs, graphs = family.inputs(rows), Graphs()
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        wanted = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, **compiled(graphs, fullgraph=True)), wanted)
    assert graphs.count == 1


def test_compiled_decode_of_a_layer_method():
    """Layers that hold different tokens are compiled in pieces."""
    method, family = CASES["fastv-llava-clip-gqa"]
    model = family.build(torch.float32)
    inputs, graphs = family.inputs(ROWS["padded"]), Graphs()
    greedy = {**GREEDY, "max_new_tokens": 2}
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        wanted = model.generate(**inputs, **greedy)
        assert torch.equal(model.generate(**inputs, **greedy, **compiled(graphs)), wanted)
    assert graphs.count > 1
