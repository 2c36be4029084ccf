"""Engines of vLLM in this process beside transformers, with the same checkpoints and prompts."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune.eval.training.common.questions import TASKS
from vlmprune.eval.training.common.scenes import make_scene, render

CHECKPOINTS = Path(__file__).parents[2] / "eval" / "checkpoints"
NEW_TOKENS = 8


@dataclass(frozen=True)
class Prompt:
    """A question about pictures; none for text alone."""

    question: str
    pictures: tuple[Image.Image, ...] = ()

    def text(self, processor: Any) -> str:
        """The prompt in the model's chat format."""
        content = [{"type": "image"} for _ in self.pictures] + [{"type": "text", "text": self.question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def scene_prompts(count: int, seed: int = 0, tall: Sequence[int] = (0,)) -> list[Prompt]:
    """Questions that the trained checkpoints can answer, about scenes of several heights."""
    prompts: list[Prompt] = []
    index = 0
    while len(prompts) < count:
        rng = np.random.default_rng([seed, index])
        scene = make_scene(rng, test=True, tall=tall[index % len(tall)])
        index += 1
        question = list(TASKS.values())[index % len(TASKS)](scene, rng)
        if question is not None:
            prompts.append(Prompt(question.text, (Image.fromarray(render(scene)),)))
    return prompts


@dataclass
class Answers:
    """What a model generated, and per picture in the order of the prompts what was kept of it."""

    tokens: list[list[int]]
    kept: list[list[int]] = field(default_factory=list)


class Reference:
    """A checkpoint under transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def answers(self, prompts: Sequence[Prompt], method: str | None = None, **parameters: Any) -> Answers:
        """Answer one by one, greedily."""
        answers = Answers([])
        if method is not None:
            vlmprune.apply(self.model, method, **parameters)
        try:
            for prompt in prompts:
                pictures = list(prompt.pictures) or None
                inputs = self.processor(text=[prompt.text(self.processor)], images=pictures, return_tensors="pt")
                inputs = inputs.to(self.model.dtype)
                output = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
                answers.tokens.append(self._ended(output[0, inputs["input_ids"].shape[1] :].tolist()))
                if method is not None and prompt.pictures:
                    answers.kept += [image.kept.tolist() for image in vlmprune.last_run(self.model).images]
        finally:
            if method is not None:
                vlmprune.remove(self.model)
        return answers

    def _ended(self, tokens: list[int]) -> list[int]:
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]


class Engine:
    """A checkpoint under vLLM; `kept` collects what is kept of every picture that is encoded, `image_inputs` what was encoded."""

    def __init__(self, folder: Path, setting: dict[str, Any] | None, **flags: Any) -> None:
        from vllm import LLM

        overrides = {} if setting is None else {"vlmprune": setting}
        defaults = {"dtype": "float32", "block_size": 32, "max_model_len": 2048, "enforce_eager": True}
        self.llm = LLM(str(folder), hf_overrides=overrides, **(defaults | flags))
        self.kept: list[list[int]] = []
        self.image_inputs: list[Any] = []
        self.model = self.llm.apply_model(lambda model: model)[0]
        pruner = getattr(self.model, "pruner", None)
        if pruner is not None:
            self._watch(pruner)

    def _watch(self, pruner: Any) -> None:
        prune, process = pruner.prune, self.model._process_image_input

        def processed(image_input: Any) -> Any:
            self.image_inputs.append(image_input)
            return process(image_input)

        self.model._process_image_input = processed

        def watched(*arguments: Any) -> Any:
            images = prune(*arguments)
            self.kept += [image.kept.tolist() for image in images]
            return images

        pruner.prune = watched

    def answers(self, prompts: Sequence[Prompt], processor: Any, one_by_one: bool = False) -> Answers:
        """Answer greedily, all at once or one after the other."""
        from vllm import SamplingParams

        settings = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
        requests = [
            {
                "prompt": prompt.text(processor),
                **({"multi_modal_data": {"image": list(prompt.pictures)}} if prompt.pictures else {}),
            }
            for prompt in prompts
        ]
        self.kept.clear()
        groups = [[request] for request in requests] if one_by_one else [requests]
        outputs = [output for group in groups for output in self.llm.generate(group, settings, use_tqdm=False)]
        return Answers([list(output.outputs[0].token_ids) for output in outputs], list(self.kept))

    def close(self) -> None:
        """Free it, so that the next one can be made."""
        from vllm.distributed import cleanup_dist_env_and_memory

        del self.model, self.llm
        self.image_inputs.clear()
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def engine(folder: Path, setting: dict[str, Any] | None, **flags: Any) -> Iterator[Engine]:
    """An engine for the body."""
    running = Engine(folder, setting, **flags)
    try:
        yield running
    finally:
        running.close()
