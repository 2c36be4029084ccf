"""What goes into a tower, and what comes out of it."""

from vlmprune.patches.families.registry import find_family


def projected_rows(model, inputs):
    """Run a model, and return what its tower is given, `[tiles, 3, ...]`, and what its projector is given."""
    seen = {}
    family = find_family(model)
    handles = [
        family.vision_tower.register_forward_pre_hook(lambda module, args: seen.update(pixels=args[0])),
        family.projector.register_forward_pre_hook(lambda module, args: seen.update(rows=args[0])),
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen["pixels"], seen["rows"]
