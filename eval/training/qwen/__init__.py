"""Training of tiny-qwen2.5-vl, a very small Qwen2.5-VL on the scenes of `vlmprune.eval.training`."""
