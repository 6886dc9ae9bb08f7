"""Names the axes of a value from a pass over a sample, and so finds its pattern."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskhooks.sites.pattern import Pattern
from maskhooks_transformers.marks import RADIX
from maskhooks_transformers.samples import BATCH, DECODED, TOKENS


def names(shape: Sequence[int], kind: str) -> tuple[str, ...] | None:
    """The axes of hidden states; None if they are unknown.

    Tokens of the encoder's or only input are `token`, those of an encoder-decoder's decoder `target`. Patches and
    frames share one axis, or patches lie in `height` and `width`; `position` is any other sequence. Parallel streams of
    states (AltUp, hyper-connections) are features, like `hidden`.
    """
    sizes = {TOKENS: "token", DECODED: "target"} if kind == "token" else {}
    if len(shape) not in (3, 4) or BATCH not in shape[:2]:
        return None
    batch = 0 if shape[0] == BATCH else 1
    if kind == "patch" and len(shape) == 4 and batch == 0:
        last = shape[1] == shape[2] != shape[3]
        return ("batch", "height", "width", "channel") if last else ("batch", "channel", "height", "width")
    others = [axis for axis in range(len(shape)) if axis != batch]
    known = [axis for axis in others if shape[axis] in sizes]
    sequence = (known or others)[0]
    features = [axis for axis in others if axis != sequence]
    called = {batch: "batch", sequence: position(shape[sequence], kind), features[-1]: "hidden"}
    if len(features) > 1:
        called[features[0]] = "stream"
    return tuple(called[axis] for axis in range(len(shape)))


def position(size: int, kind: str) -> str:
    """The name of the position axis."""
    if kind != "token":
        return kind
    return {TOKENS: "token", DECODED: "target"}.get(size, "position")


def pattern(shape: Sequence[int], kind: str) -> Pattern | None:
    """The pattern that gates each position of hidden states as a whole."""
    axes = names(shape, kind)
    if axes is None:
        return None
    gated = [axis for axis in axes if axis not in ("batch", "hidden", "channel", "stream")]
    return Pattern(f"{' '.join(axes)} -> batch {' '.join(gated)}")


def heads(codes: Tensor, kind: str) -> Pattern | None:
    """The pattern that gates each head of each position, from labels; None if no pattern fits their arrangement.

    None fits windowed and block attention, where examples and positions share an axis, or attention from each token to
    parts of itself, such as streams.
    """
    parts = {"batch": codes // (RADIX * RADIX), "position": codes // RADIX % RADIX, "head": codes % RADIX}
    places = {name: [axis for axis in range(codes.dim()) if _varies(part, axis)] for name, part in parts.items()}
    count = int(parts["head"].max()) + 1
    (batch,), (sequence,) = (places[name] if len(places[name]) == 1 else (-1,) for name in ("batch", "position"))
    rest = [axis for axis in range(codes.dim()) if axis not in (batch, sequence)]
    if -1 in (batch, sequence) or batch == sequence or not rest or not set(places["head"]) <= {rest[0], rest[-1]}:
        return None
    if not (_counts(parts["batch"], batch) and _counts(parts["position"], sequence)):
        return None
    called = {batch: "batch", sequence: position(codes.shape[sequence], kind)}
    if kind == "token" and called[sequence] == "position" and position(count, kind) != "position":
        return None
    along = parts["head"].movedim(rest[-1], -1).reshape(-1, codes.shape[rest[-1]])[0]
    if len(rest) == 1:
        size = len(along) // count
        order = {
            "(head dim)": torch.arange(count).repeat_interleave(size),
            "(dim head)": torch.arange(count).repeat(size),
        }
        arrangement = next((name for name, wanted in order.items() if torch.equal(wanted.to(along), along)), None)
        if arrangement is None:
            return None
        called[rest[0]] = arrangement
    elif len(rest) == 2 and len(places["head"]) == 1:
        called.update({axis: "head" if axis in places["head"] else "dim" for axis in rest})
        if not _counts(parts["head"], places["head"][0]):
            return None
    elif places["head"] == rest and not count % codes.shape[rest[0]]:  # equal groups of heads
        groups, count = codes.shape[rest[0]], count // codes.shape[rest[0]]
        inside = torch.arange(count).repeat_interleave(codes.shape[rest[1]] // count)
        own = parts["head"].movedim((batch, sequence), (0, 1))[0, 0].cpu()
        if not torch.equal(own, torch.arange(groups)[:, None] * count + inside):
            return None
        called.update({rest[0]: "group", rest[1]: "(head dim)"})
    else:
        return None
    left = " ".join(called[axis] for axis in range(codes.dim()))
    gated = "group head" if "group" in called.values() else "head"
    return Pattern(f"{left} -> batch {called[sequence]} {gated}", {"head": count})


def _varies(part: Tensor, axis: int) -> bool:
    return bool((part != part.narrow(axis, 0, 1)).any())


def _counts(part: Tensor, axis: int) -> bool:
    """Whether the numbers along an axis are 0, 1, 2, ..."""
    line = part.movedim(axis, 0).reshape(part.shape[axis], -1)[:, 0]
    return torch.equal(line, torch.arange(len(line)).to(line))
