"""What the language models here have in common around their bodies: head, cache policy, published layout.

Legend: B batch, T tokens, V vocabulary, M model width.
"""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging

from kernels.context_parallel import SequencePart
from models.next_token_loss import counted_targets, next_token_loss
from models.reference_layout import load_reference, reference_parameters, strip_prefixes

logger = logging.get_logger(__name__)


class CausalLanguageModel(PreTrainedModel, GenerationMixin):
    """A body called ``model`` with an embedding, and a head tied to it."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _reference_prefixes: tuple[str, ...] = ("module.",)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The caches here are not lists of growing layers: forward builds the right one.
        return False

    @staticmethod
    def reference_name(name: str) -> str:
        """Return the published name of a parameter."""
        return name

    @classmethod
    def from_reference_state_dict(cls, state_dict: Mapping[str, Tensor], config: Any, *, strict: bool = True) -> Self:
        """Build a model from a state dict in the published layout.

        Args:
            state_dict: Published names, matrices as ``[outputs, inputs]``; a leading ``module.`` and ALiBi buffers
                are dropped.
            config: The configuration of the model.
            strict: Refuse missing and unexpected names.

        Raises:
            ValueError: If names or shapes do not fit.
        """
        model = cls(config)
        load_reference(model, strip_prefixes(state_dict, cls._reference_prefixes), strict=strict)
        return model

    def to_reference_state_dict(self, *, gradients: bool = False) -> dict[str, Tensor | None]:
        """Map published names to parameters (or to their gradients), the tied head once as the embedding."""
        parameters = reference_parameters(self)
        return {name: parameter.grad if gradients else parameter for name, parameter in parameters.items()}

    def caches(self, use_cache: bool | None, labels: Tensor | None, past_key_values: Any) -> bool:
        """Decide whether a forward call keeps a cache; None means: in evaluation mode without ``labels`` ``[B, T]``."""
        if use_cache is None:
            use_cache = past_key_values is not None or (not self.training and labels is None and self.config.use_cache)
        if past_key_values is not None and not use_cache:
            raise ValueError("use_cache=False contradicts past_key_values, leave one of them out")
        checkpointing = self.training and any(getattr(part, "gradient_checkpointing", False) for part in self.modules())
        if checkpointing and past_key_values is not None:
            raise ValueError("past_key_values cannot be used in training mode with gradient checkpointing")
        if use_cache and checkpointing:
            logger.warning_once("use_cache=True has no effect in training mode with gradient checkpointing")
        return bool(use_cache) and not checkpointing

    def recorded(self, wanted: bool | None) -> list[Tensor] | None:
        """Return a list that takes hidden states ``[B, T, M]``, None if none are wanted (None = as the config says)."""
        return [] if (self.config.output_hidden_states if wanted is None else wanted) else None

    def score(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        *,
        documents: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items: Tensor | int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits of the last (or chosen) positions and, with labels, the loss over all of them.

        Args:
            hidden: Normed hidden states ``[B, T, M]``.
            labels: Un-shifted ``[B, T]`` int64, -100 ignored, or None.
            documents: Document of every token ``[B, T]``, -1 = padding; None = one document.
            logits_to_keep: The last so many positions (0 = all), or positions ``[n]``.
            num_items: Divisor of the summed loss; None = the number of counted targets.

        Returns:
            Logits ``[B, T or n, V]`` and the float32 loss ``[]``, None without labels.
        """
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None:
            return self.lm_head(hidden[:, kept]), None
        if labels.shape != hidden.shape[:2]:
            raise ValueError(
                f"labels must have the shape of input_ids {list(hidden.shape[:2])}, got {list(labels.shape)}"
            )
        logits = self.lm_head(hidden)
        loss = next_token_loss(logits, counted_targets(labels, documents), num_items)
        return logits[:, kept], loss


# What transformers passes along by itself.
HARMLESS = ("cache_position", "is_first_iteration", "next_sequence_length", "return_dict")


def check_inputs(input_ids: Tensor | None, extra: Mapping[str, Any]) -> Tensor:
    """Return ``input_ids`` [B, T]; refuse what these models cannot take.

    Raises:
        ValueError: On embeddings or positions from outside, attention maps, ids of another shape, or any argument
            that would have no effect.
    """
    if extra.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds is not supported: the model inserts landmarks by token id, pass input_ids")
    if extra.get("position_ids") is not None:
        raise ValueError("position_ids is not supported: positions follow from attention_mask and document_ids")
    if extra.get("output_attentions"):
        raise ValueError("output_attentions is not supported: attention maps are never formed")
    unknown = sorted(
        name for name, value in extra.items() if name not in HARMLESS and value is not None and value is not False
    )
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such argument of this model's forward; leave it out")
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(
            f"input_ids must be [batch, tokens], got {None if input_ids is None else list(input_ids.shape)}"
        )
    return input_ids


def check_same_shape(name: str, given: Tensor | None, input_ids: Tensor) -> None:
    """Raise a ValueError unless ``given`` is None or shaped like ``input_ids`` ``[B, T]``."""
    if given is not None and given.shape != input_ids.shape:
        raise ValueError(f"{name} must have the shape of input_ids {list(input_ids.shape)}, got {list(given.shape)}")


def check_documents(document_ids: Tensor | None, input_ids: Tensor, **others: Any) -> None:
    """Raise a ValueError unless ``document_ids`` is None, or shaped like ``[B, T]`` and no other argument is given."""
    check_same_shape("document_ids", document_ids, input_ids)
    given = [name for name, value in others.items() if value is not None and value is not False]
    if document_ids is not None and given:
        raise ValueError(f"document_ids cannot be combined with {', '.join(given)}: drop one of them")


def check_part(part: SequencePart | None, input_ids: Tensor, **others: Any) -> None:
    """Raise a ValueError unless ``part`` is None, or has the tokens ``[B, T]`` and no other argument is given."""
    if part is None:
        return
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(
            f"part cannot be combined with {', '.join(given)}: a part has one document, no padding, no loss"
        )
    if input_ids.shape[1] != part.stop - part.start:
        raise ValueError(
            f"part has tokens {part.start} to {part.stop} of a sequence, got input_ids {list(input_ids.shape)}"
        )
