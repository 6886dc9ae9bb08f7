"""The task for bridges: how to call one, and what its logits mean."""

from __future__ import annotations

import copy
from typing import Any

from maskhooks_transformers.heads import CausalLanguageModel, head_of
from maskhooks_transformers.task import TransformersTask
from maskhooks_transformers.words import Words
from torch import Tensor, nn

from maskhooks.model.outputs import Outputs
from maskhooks_transformer_lens.loaded import bridge_types

_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values")


class LensTask(TransformersTask):
    """Knows how to call a `TransformerBridge`: like the model inside it, with the same options.

    A batch is the tokenizer's output, or a tensor of token ids as from `bridge.to_tokens`. A model inside that is not
    from transformers predicts the next token.
    """

    name = "transformer_lens"

    def types(self) -> tuple[type[nn.Module], ...]:
        return bridge_types()

    def serve(self, model: Any) -> LensTask:
        task = copy.copy(self)
        inside = model.original_model
        task.served = type(inside).__name__
        task.words = Words(getattr(inside, "config", model.cfg), model.tokenizer)
        task.head = head_of(inside, task.words) if hasattr(inside, "config") else None
        if task.head is None and model.cfg.attention_dir == "causal":
            task.head = CausalLanguageModel(model.cfg, task.words)
        task.name = f"transformer_lens ({task.head.name if task.head is not None else 'no known head'})"
        return task

    def arguments(self, model: Any, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make the arguments from a batch.

        Raises:
            BatchError: the batch has no input for the model, or lists where tensors belong.
        """
        _, kwargs = super().arguments(model.original_model, batch)
        (first,) = [key for key in _INPUTS if key in kwargs][:1]
        return (kwargs.pop(first),), {"return_type": "logits", **kwargs}

    def distribution(self, result: Any, batch: Any) -> Outputs:
        """Read the logits as the head of the model inside defines them."""
        given = (result,) if self._output is None and isinstance(result, Tensor) else result
        return super().distribution(given, batch)
