"""What the model classes of all families add to vLLM's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger

from .facts import VllmFamily
from .health import PruneLog
from .image_pruner import ImagePruner, PrunedImage
from .places import append_places, base_positions, split_places
from .refusals import check_engine, check_family
from .settings import read_setting
from .versions import installed_version

logger = init_logger("vllm.plugins.vlmprune")


class PrunedModel:
    """Mixin of vLLM's model classes: images are pruned where they are encoded. Without the setting it does nothing.

    Attributes:
        family: the facts of the family.
        pruner: what prunes; None without the setting.
    """

    family: ClassVar[type[VllmFamily]]
    encoder_inputs: ClassVar[tuple[str, ...]] = ()
    """Names of what transformers' encoder takes beside the pixels, as vLLM's image inputs call it too."""
    pruner: ImagePruner | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        model_config = vllm_config.model_config
        served = read_setting(model_config.hf_config)
        if served is None:
            return
        family = self.family(self)  # type: ignore[arg-type]
        check_family(served.method, family)
        reads_tower = bool(served.method.vision_signals(family.tower_facts))
        check_engine(vllm_config, reads_tower=reads_tower, mrope=family.mrope)
        width = model_config.hf_config.get_text_config().hidden_size
        self.pruner = ImagePruner(self, self.family, served.method, width)  # type: ignore[arg-type]
        self.prune_log = PruneLog(logger, repr(served.method))
        logger.info(
            "vlmprune: %r prunes the images of this %s model (vLLM %s)",
            *(served.method, family.name, installed_version()),
        )

    def _process_image_input(self, image_input: Any) -> Any:
        if self.pruner is None:
            return super()._process_image_input(image_input)  # type: ignore[misc]
        with self.pruner.encoding() as call:
            encoded = list(super()._process_image_input(image_input))  # type: ignore[misc]
        images = self.pruner.prune(encoded, self._encoder_inputs(image_input), call)
        self.prune_log.count([len(item) for item in encoded], [len(image.kept) for image in images])
        return tuple(self._placed(image) for image in images)

    def _encoder_inputs(self, image_input: Any) -> Mapping[str, Any]:
        return {name: image_input[name] for name in self.encoder_inputs}

    def _placed(self, image: PrunedImage) -> Tensor:
        return image.features


class PrunedMRopeModel(PrunedModel):
    """The same for models with 3-D positions: kept tokens carry the places that they have in their image.

    vLLM counts positions before it encodes, and later only adds to what it counted; so all tokens of an image get the position
    of its first place, and the places are added where the embeddings enter the model. Text behind an image follows from its
    grid and needs no embeddings, which a prompt whose beginning is cached does not have.
    """

    encoder_inputs = ("image_grid_thw",)
    _places: tuple[Tensor, Tensor] | None = None

    def _placed(self, image: PrunedImage) -> Tensor:
        kept = image.kept.cpu()
        return append_places(image.features, image.layout.row[kept], image.layout.column[kept])

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Return the ids of a prompt, `[3, tokens]`, and what is added to the index of a generated token for its own."""
        if self.pruner is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        merge = int(self.pruner.family.config.vision_config.spatial_merge_size)
        images = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            _, rows, columns = feature.data["image_grid_thw"].data.tolist()
            place = feature.mm_position
            images.append((place.offset, place.length, max(rows, columns) // merge))
        return base_positions(len(input_tokens), images)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings of text and images; where the images' tokens stand in them is kept for `forward`."""
        self._places = None
        if self.pruner is not None and multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            multimodal_embeddings, places = split_places(multimodal_embeddings)
            self._places = is_multimodal.nonzero().flatten().to(places.device), places
        embedded: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model, tokens of images at the places that they have in them."""
        if self._places is not None:
            columns, places = self._places
            self._places = None
            # In place: graphs of the layers read the positions where vLLM has them, which writes them anew each step.
            positions.index_add_(1, columns, places.to(positions.dtype))
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]
