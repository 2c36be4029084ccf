"""Every published test vector, run through the conformance runner."""

import json
from pathlib import Path

import conformance
import pytest
import torch
from safetensors.torch import load_file, save_file

from official_cases.comparison import MODEL_ROUNDING, differences

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = list(conformance.find_cases(GOLDEN))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_results_equal_the_official_ones(case):
    results, found = conformance.run_case(case)
    assert not found
    assert set(results) == set(case.entry["expected"])


def test_inputs_alone_are_enough(tmp_path):
    source = next(case for case in CASES if case.name == "fastervlm/n36_t7.safetensors")
    folder = tmp_path / "cases" / "fastervlm"
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text((source.path.parent / "cases.json").read_text())
    for case in CASES:
        if case.method == "fastervlm":
            stored = load_file(str(case.path))
            save_file({name: stored[name] for name in case.entry["inputs"]}, str(folder / case.path.name))
    assert conformance.main([str(tmp_path / "cases"), "--out", str(tmp_path / "out")]) == 0
    written = load_file(str(tmp_path / "out" / "fastervlm" / source.path.name))
    expected = load_file(str(source.path))
    assert (written["keep_idx"] == expected["keep_idx"]).all()


def stored_case(name):
    case = next(case for case in CASES if case.name == f"{name}.safetensors")
    stored = load_file(str(case.path))
    return case, {name: stored[name] for name in case.entry["inputs"]}


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("hired/llava15_r20", {"cls_attn_final": None}),
        ("hired/llava15_k1", {"cls_attn_final": None}),
        ("vtc_cls/l24_s16_t64", {"cls_attn_rows": 1}),
        ("divprune/n577_k1", {"features": 0}),
        ("todre/s1_n576_k58", {"features": 0, "cls_attention": 0}),
        ("fastv/select_lmms_odd_trunc", {"q_last": 0, "k": 0}),
    ],
)
def test_a_batched_case_gives_what_its_images_give(name, axes):
    """The second image is the first one backwards, so that the answer of one image is wrong for the other."""
    case, inputs = stored_case(name)
    run, params = conformance.RUNS[case.method], case.entry["params"]
    other = {name: values.flip(-2 if values.ndim > 2 or name == "features" else -1) for name, values in inputs.items()}
    if "cls_attn_final" in inputs:
        other = {"cls_attn_final": inputs["cls_attn_final"].flip(-1)}
    both = {
        name: torch.cat([inputs[name], other[name]])
        if axes[name] is None
        else torch.stack([inputs[name], other[name]], dim=axes[name])
        for name in axes
    }
    first, second = run(params, inputs), run(params, other)
    assert any(not torch.equal(first[result], second[result]) for result in first)
    for result, values in run(params, both).items():
        torch.testing.assert_close(values, torch.stack([first[result], second[result]]))


def test_a_batch_of_tiled_images_gives_what_its_images_give():
    _, inputs = stored_case("globalcom2/wide_2x2_r25")
    case, other = stored_case("globalcom2/sq_2x2_r25")
    both = {
        "cls_scores": torch.cat([inputs["cls_scores"], other["cls_scores"]]),
        "num_tiles": torch.tensor([len(inputs["cls_scores"]), len(other["cls_scores"])]),
        **{name: torch.stack([inputs[name], other[name]]) for name in ("grid", "image_size")},
    }
    run = conformance.RUNS["globalcom2"]
    first, second = (run(case.entry["params"], each) for each in (inputs, other))
    for result, values in run(case.entry["params"], both).items():
        torch.testing.assert_close(values, torch.cat([first[result], second[result]]))


def test_hidden_states_may_differ_by_roundings_of_their_scale_and_nothing_else_may():
    rule = {"prefill_out": "rtol 1e-3, atol 1e-4"}
    expected = {"keys": torch.tensor([8.0, 1e-3]), "kept": torch.tensor([3, 4])}
    small, large = (expected["keys"] + 8 * MODEL_ROUNDING * factor for factor in (0.5, 2))
    assert not differences({"compare": rule}, {}, {**expected, "keys": small}, expected)
    assert differences({"compare": rule}, {}, {**expected, "keys": large}, expected)
    assert differences({"compare": {}}, {}, {**expected, "keys": small}, expected)
    assert differences({"compare": rule}, {}, {**expected, "kept": torch.tensor([3, 5])}, expected)
    assert differences({"compare": rule}, {}, {"scores": small}, {"scores": expected["keys"]})


def test_a_difference_is_named_and_fails(tmp_path, capsys):
    source = next(case for case in CASES if case.name == "fastervlm/n36_t7.safetensors")
    folder = tmp_path / "fastervlm"
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps([dict(source.entry)]))
    stored = load_file(str(source.path))
    stored["keep_idx"][0, 0] += 1
    save_file(stored, str(folder / source.path.name))
    assert conformance.main([str(tmp_path)]) == 1
    assert "keep_idx" in capsys.readouterr().out
