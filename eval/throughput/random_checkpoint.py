"""A preset with random weights as a folder that servers can load, with a tokenizer in which every id is a word."""

from __future__ import annotations

from pathlib import Path

from vlmprune.eval.models.random_weights import build_random, preset_config, preset_image_processor
from vlmprune.eval.models.synthetic_request import make_processor, stand_in_tokenizer
from vlmprune.patches.families.registry import family_of_config

TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}PICTURE {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def write_random_checkpoint(preset: str, folder: Path, dtype: str = "auto") -> Path:
    """Write model, processor and chat template.

    Args:
        preset: a true architecture (`llava-160m`, ...).
        folder: where to; it is made.
        dtype: "auto" is bfloat16.

    Returns:
        The folder.

    Raises:
        UnknownNameError: there is no preset of that name.
    """
    config = preset_config(preset)
    processor = make_processor(preset_image_processor(preset), stand_in_tokenizer(config, every_id=True), config)
    processor.chat_template = TEMPLATE.replace("PICTURE", family_of_config(config).preparation.picture)
    build_random(config, dtype, "cpu").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
