"""How the shipped tiny models were trained, on procedural scenes; not part of the wheel.

`common` has what all share (scenes, questions, test sets, the loop, the card), `llava`, `next` and `qwen` a schedule and the
parts of one model each; `train` runs them.
"""
