"""What the projector gets, as one vector a visual token."""

from __future__ import annotations

from torch import Tensor

from vlmprune.methods.batch import TowerFacts, VisionSignal, VisualBatch


def features_signal(tower: TowerFacts) -> VisionSignal:
    """Return the signal that `tower_features` reads."""
    return VisionSignal("features", tower.feature_layer)


def tower_features(batch: VisualBatch) -> Tensor:
    """Return the features before the projector, fp32 `[tokens, dim]`; of patches that become one visual token the mean."""
    features = batch.vision[features_signal(batch.tower)]
    patches = batch.tower.patches_per_token
    return features if patches == 1 else features.unflatten(-1, (patches, -1)).mean(1)
