"""What scripts do with a model: each feature runs on a pruned one and is checked against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
from decoding.call import Call, plain_model
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import vlmprune
from support.families.qwen_case import QwenCase
from support.layerwise import language_model_inputs, placeholders
from support.oracle import suppressed
from vlmprune.methods.registry import get_method

Feature = Callable[[Call], None]


def greedy(call: Call) -> None:
    """`generate`, greedy search."""
    output = call.generate()
    for row in range(len(output.sequences)):
        chosen = suppressed(torch.stack([step[row] for step in output.logits])).argmax(-1)
        assert chosen.tolist() == output.sequences[row, -len(chosen) :].tolist()


def sampling(call: Call) -> None:
    """Sampling with temperature, top-k and top-p, the same tokens for the same seed."""
    drawn = []
    for seed in (1, 1, 2, 3):
        torch.manual_seed(seed)
        drawn.append(call.generate(do_sample=True, temperature=1.5, top_k=40, top_p=0.95, max_new_tokens=6).sequences)
    assert torch.equal(drawn[0], drawn[1])
    assert any(not torch.equal(drawn[0], other) for other in drawn[2:])


def return_sequences(call: Call) -> None:
    """Several sampled sequences for each prompt."""
    torch.manual_seed(0)
    output = call.generate(do_sample=True, num_return_sequences=2)
    assert len(output.sequences) == 2 * len(call.inputs["input_ids"])


def beams(call: Call) -> None:
    """Beam search; the scores of the beams are those of the oracle."""
    output = call.model.generate(
        **call.inputs,
        **call.cache,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=call.new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    record, width = call.record, call.inputs["input_ids"].shape[1]
    for row, sequence in enumerate(output.sequences):
        prompt, new = row // 2, sequence[width:]
        logits = call.by_hand(call.inputs, record, prompt, new[:-1], 3 * prompt)
        expected = logits.log_softmax(-1).gather(1, new[:, None]).mean()
        tolerance = 0.5 if call.lossy else 5e-4
        torch.testing.assert_close(output.sequences_scores[row], expected, atol=tolerance, rtol=tolerance)


def prompt_lookup(call: Call) -> None:
    """`prompt_lookup_num_tokens`: drafts from the prompt, the tokens of greedy search."""
    call = call.single()
    expected = call.generate(max_new_tokens=8).sequences
    assert torch.equal(call.generate(max_new_tokens=8, prompt_lookup_num_tokens=2).sequences, expected)


def assistant(call: Call) -> None:
    """`assistant_model=`, unpruned: the tokens of greedy search."""
    call = call.single()
    expected = call.generate(max_new_tokens=8).sequences
    assert torch.equal(call.generate(max_new_tokens=8, assistant_model=plain_model(call.case)).sequences, expected)


def streamer(call: Call) -> None:
    """`streamer=`."""

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    seen, call = Collect(), call.single()
    output = call.generate(streamer=seen)
    assert seen.tokens == output.sequences[0].tolist()


def stopping_criteria(call: Call) -> None:
    """`stopping_criteria=` and `eos_token_id=`."""
    width, call = call.inputs["input_ids"].shape[1], call
    stop = StoppingCriteriaList([lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= width + 2)])
    assert call.generate(stopping_criteria=stop).sequences.shape[1] == width + 2
    single = call.single()
    first = int(single.generate().sequences[0, -4])
    assert int(single.generate(eos_token_id=first).sequences[0, -1]) == first


def logits_processors(call: Call) -> None:
    """`logits_processor=`, `repetition_penalty=`, `bad_words_ids=`; processors see the caller's prompt."""
    lengths = []

    def forbid_evens(ids: Tensor, scores: Tensor) -> Tensor:
        lengths.append(ids.shape[1])
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores

    output = call.generate(logits_processor=LogitsProcessorList([forbid_evens]), repetition_penalty=1.3)
    width = call.inputs["input_ids"].shape[1]
    assert lengths == [width, width + 1, width + 2, width + 3]
    assert bool((output.sequences[:, width:] % 2 == 1).all())


def guidance(call: Call) -> None:
    """`guidance_scale=` with a negative prompt: a second, text-only stream through the same model."""
    negative = torch.tensor([[5, 6, 7]]).expand(len(call.inputs["input_ids"]), -1)
    output = call.model.generate(
        **call.inputs,
        **call.cache,
        guidance_scale=1.5,
        negative_prompt_ids=negative,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # The second stream's prefill is the latest. What a plain forward keeps is the same: the selection is deterministic.
    call.model(**call.inputs, use_cache=False)
    call.check_steps(output, call.record)


def second_turn(call: Call) -> None:
    """`generate` again with the cache that it returned."""
    first = call.generate()
    record, rows = call.record, len(first.sequences)
    question = torch.tensor([[21, 22, 23]]).expand(rows, -1)
    ids = torch.cat([first.sequences, question], 1)
    mask = torch.cat([call.inputs["attention_mask"], torch.ones(rows, 7, dtype=torch.int64)], 1)
    output = call.model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    call.check_steps(output, record, start=7)


def edited_question(call: Call) -> None:
    """`cache.crop(-n)`: the last question is taken back and another asked."""
    # Qwen makes its own positions, and remembers how they go on; the others count padding unless they are told not to.
    own = isinstance(call.case, QwenCase)
    given = {} if own else {"position_ids": call.case.positions(plain_model(call.case), call.inputs)}
    cache = call.model(**call.inputs, **given, use_cache=True).past_key_values
    record, rows = call.record, len(call.inputs["input_ids"])
    cache.crop(-2)
    question = torch.tensor([[31, 32, 33]]).expand(rows, -1)
    prompt = {**call.inputs, "input_ids": call.inputs["input_ids"].clone()}
    prompt["input_ids"][:, -2:] = question[:, :2]
    given = {"input_ids": torch.cat([prompt["input_ids"], question[:, 2:]], 1)}
    given["attention_mask"] = torch.cat([call.inputs["attention_mask"], torch.ones(rows, 1, dtype=torch.int64)], 1)
    output = call.model.generate(
        **given,
        past_key_values=cache,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    call.check_steps(output, record, prompt=prompt, start=1)


def own_loop(call: Call) -> None:
    """A decode loop written by hand around `forward`."""
    positions = call.case.positions(plain_model(call.case), call.inputs)
    output = call.model(**call.inputs, position_ids=positions, use_cache=True)
    record, mask, ids = call.record, call.inputs["attention_mask"], call.inputs["input_ids"]
    positions = positions[..., -1:]
    steps = [output.logits[:, -1]]
    for _ in range(3):
        ids = torch.cat([ids, suppressed(steps[-1]).argmax(-1)[:, None]], 1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.int64)], 1)
        positions = positions + 1
        output = call.model(
            input_ids=ids[:, -1:],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=output.past_key_values,
        )
        steps.append(output.logits[:, -1])
    last = torch.cat([ids, suppressed(steps[-1]).argmax(-1)[:, None]], 1)
    call.check_steps(_Steps(last, steps), record)


class _Steps:
    def __init__(self, sequences: Tensor, logits: list[Tensor]) -> None:
        self.sequences, self.logits = sequences, logits


def forward_with_labels(call: Call) -> None:
    """`forward(labels=...)`: the loss over the text after the images, and its gradient."""
    labels = call.inputs["input_ids"].clone()
    visual = placeholders(plain_model(call.case), labels) | (call.inputs["attention_mask"] == 0)
    labels[visual] = -100
    # The token before must be there to predict.
    labels[:, 1:][visual[:, :-1]] = -100
    with torch.enable_grad():
        output = call.model(**call.inputs, labels=labels)
        output.loss.backward()
    call.check_forward(output.logits.detach())
    wanted = labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), wanted, ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)


def logits_to_keep(call: Call) -> None:
    """`forward(logits_to_keep=2)`."""
    whole, last = call.model(**call.inputs).logits, call.model(**call.inputs, logits_to_keep=2).logits
    call.check_forward(whole)
    torch.testing.assert_close(last, whole[:, -2:])


def hidden_states(call: Call) -> None:
    """`output_hidden_states=True`: full length, zero where a token was dropped."""
    output = call.model(**call.inputs, output_hidden_states=True)
    call.check_forward(output.logits)
    head = plain_model(call.case).lm_head
    call.check_forward(head(output.hidden_states[-1]))
    columns = call.inputs["input_ids"].shape[1]
    assert {state.shape[1] for state in output.hidden_states} == {columns}
    record = call.record
    for layer, state in enumerate(output.hidden_states[1:]):
        alive = record.text_tokens[1] + record.visual_tokens_per_layer[1][layer]
        valid = call.inputs["attention_mask"][1].bool()
        assert int(state[1, valid].abs().sum(-1).gt(0).sum()) == alive


def attentions(call: Call) -> None:
    """`output_attentions=True` with eager attention: maps of the tokens that are left, row by row to the right."""
    call.model.set_attn_implementation("eager")
    output = call.model(**call.inputs, output_attentions=True)
    call.check_forward(output.logits)
    record = call.record
    for layer, maps in enumerate(output.attentions):
        longest = max(
            text + counts[layer]
            for text, counts in zip(record.text_tokens, record.visual_tokens_per_layer, strict=True)
        )
        assert maps.shape[-2:] == (longest, longest)
        torch.testing.assert_close(maps[1, :, -1].sum(-1), torch.ones(maps.shape[1]))


def input_embeddings(call: Call) -> None:
    """`inputs_embeds=` with pixels instead of ids."""
    given = {key: value for key, value in call.inputs.items() if key != "input_ids"}
    if isinstance(call.case, QwenCase):
        given["position_ids"] = call.case.positions(plain_model(call.case), call.inputs)
    embeddings = call.model.get_input_embeddings()(call.inputs["input_ids"])
    call.check_forward(call.model(**given, inputs_embeds=embeddings).logits)


def merged_by_hand(call: Call) -> None:
    """Features put into `inputs_embeds` by the caller, with `vlmprune.options(visual_mask=...)`."""
    plain = plain_model(call.case)
    given = language_model_inputs(plain, call.inputs)
    mask = placeholders(plain, call.inputs["input_ids"])
    # Two images of a row may touch; numbers tell them apart.
    kwargs = {"inputs_embeds": given["inputs_embeds"], "attention_mask": call.inputs["attention_mask"]}
    if given.get("position_ids") is not None:
        kwargs["position_ids"] = given["position_ids"]
    with vlmprune.options(call.model, visual_mask=mask):
        logits = call.model(**kwargs).logits
    call.check_forward(logits)


def budget_per_call(call: Call) -> None:
    """`vlmprune.options(keep=...)` around a call."""
    with vlmprune.options(call.model, keep=0.6):
        call.generate()
        more = [len(image.kept) for image in call.record.images]
    call.generate()
    fewer = [len(image.kept) for image in call.record.images]
    assert all(a > b for a, b in zip(more, fewer, strict=True)) or get_method(call.method).site == "layer"


def prefill_in_chunks(call: Call) -> None:
    """`prefill_chunk_size=`, images cut by a chunk's end."""
    call.generate(prefill_chunk_size=16)


def image_in_one_chunk(call: Call) -> None:
    """`prefill_chunk_size=`, images whole in the first chunk."""
    call.generate(prefill_chunk_size=call.inputs["input_ids"].shape[1] - 2)


def no_padding(call: Call) -> None:
    """One prompt, no attention mask."""
    single = call.single()
    inputs = {key: value for key, value in single.inputs.items() if key != "attention_mask"}
    logits = call.model(**inputs, use_cache=True, past_key_values=DynamicCache()).logits
    single.check_forward(logits)


def text_only(call: Call) -> None:
    """Prompts without images."""
    inputs = call.case.inputs([[5], [8]])
    expected = plain_model(call.case).generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(call.model.generate(**inputs, **call.cache, max_new_tokens=4, do_sample=False), expected)
    call.generate()


FEATURES: dict[str, Feature] = {
    "greedy search": greedy,
    "sampling": sampling,
    "several return sequences": return_sequences,
    "beam search": beams,
    "prompt lookup": prompt_lookup,
    "an assistant model": assistant,
    "streamer": streamer,
    "stopping criteria": stopping_criteria,
    "logits processors": logits_processors,
    "guidance": guidance,
    "second turn on the returned cache": second_turn,
    "last question edited (`cache.crop`)": edited_question,
    "prefill in chunks that cut an image": prefill_in_chunks,
    "prefill in chunks, images whole": image_in_one_chunk,
    "own decode loop": own_loop,
    "loss with labels, backward": forward_with_labels,
    "`logits_to_keep`": logits_to_keep,
    "`output_hidden_states`": hidden_states,
    "`output_attentions`": attentions,
    "`inputs_embeds` with pixels": input_embeddings,
    "features merged by hand (`options`)": merged_by_hand,
    "budget of one call (`options`)": budget_per_call,
    "no mask, own `DynamicCache`": no_padding,
    "text-only prompts": text_only,
}
