"""The adapter for the hook points of a bridge: word embeddings, hidden states, heads and MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from maskhooks.model.adapter import Adapter, join
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import Site
from maskhooks_transformer_lens.loaded import bridge_types

_DECODER = "decoder_blocks"  # TransformerLens's name for the decoder layers of an encoder-decoder


class LensAdapter(Adapter):
    """Finds the sites of a `TransformerBridge`, named after its hooks.

    These are, if the bridge has them, `embed.hook_out` (tags `input` and `hidden`), `blocks.0.hook_resid_pre` and each
    layer's `hook_resid_post` (`hidden`), `attn.hook_z` (`head`; for cross-attention also `cross`) and `hook_mlp_out`
    (`mlp`). Depths count as in Hugging Face models. In an encoder-decoder, sites are also tagged `encoder` or
    `decoder`.
    """

    name = "transformer_lens"

    def types(self) -> tuple[type[nn.Module], ...]:
        return bridge_types()

    def sites(self, name: str, module: nn.Module) -> Iterator[Site]:
        stacks = {key: part for key, part in module.named_children() if _is_stack(part)}
        depth = 0
        for number, (key, stack) in enumerate(stacks.items()):
            token = "target" if key == _DECODER else "token"
            side = set() if _DECODER not in stacks else {"decoder" if key == _DECODER else "encoder"}
            state = Pattern(f"batch {token} hidden -> batch {token}")

            def site(point: str, pattern: Pattern, tag: str, at: int, side: frozenset[str] = frozenset(side)) -> Site:
                return Site(join(name, point), pattern=pattern, tags=side | set(tag.split()), depth=at)

            embeds = number == 0 and _embeds(module)
            if embeds:
                yield site("embed.hook_out", state, "hidden input", depth)
                depth += 1
            for index, layer in enumerate(stack.children()):
                block = f"{key}.{index}"
                if index == 0 and _point(module, f"{block}.hook_resid_pre"):
                    tags = "hidden" if embeds or number else "hidden input"
                    yield site(f"{block}.hook_resid_pre", state, tags, depth)
                    depth += 1
                for part in layer._modules:
                    z = _point(layer, f"{part}.hook_z")
                    if z is not None:
                        tags = "head cross" if "cross" in part else "head"
                        yield site(f"{block}.{part}.hook_z", _heads(module, z, token), tags, depth)
                if _point(module, f"{block}.hook_mlp_out"):
                    yield site(f"{block}.hook_mlp_out", state, "mlp", depth)
                if _point(module, f"{block}.hook_resid_post"):
                    yield site(f"{block}.hook_resid_post", state, "hidden", depth)
                    depth += 1


def _is_stack(part: nn.Module) -> bool:
    blocks = list(part.children()) if isinstance(part, nn.ModuleList) else []
    return bool(blocks) and all(_point(block, "hook_out") for block in blocks)


def _point(bridge: nn.Module, name: str) -> Any:
    """A hook point by TransformerLens's name, old or new; None if the model has none."""
    try:
        return bridge.get_submodule(name)
    except AttributeError:
        return None


def _embeds(bridge: Any) -> bool:
    """Whether words pass the embedding's hook; an encoder may have a separate table instead, as in T5."""
    encoder = getattr(bridge.original_model, "encoder", None)
    table = getattr(encoder, "embed_tokens", None)
    return _point(bridge, "embed.hook_out") is not None and (table is None or table is bridge.embed)


def _heads(bridge: Any, point: Any, token: str) -> Pattern:
    """The pattern of heads; they share the last axis if the point itself splits them for TransformerLens's caches."""
    heads = {"head": int(bridge.cfg.n_heads)}
    if getattr(point, "hook_conversion", None) is None:
        return Pattern(f"batch {token} head dim -> batch {token} head", heads)
    return Pattern(f"batch {token} (head dim) -> batch {token} head", heads)
