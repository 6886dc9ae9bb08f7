"""The global batch: one batch from each rank, whose gates all ranks draw alike."""

from __future__ import annotations

from maskhooks.distributed.ranks import Ranks
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.masking import Masking, Normal, standard_normal
from maskhooks.passes.clean import Clean


def sharing(group: MaskingGroup, clean: Clean | None, ranks: Ranks) -> MaskingGroup:
    """Return the group with gates and noise that are drawn for the global batch, of which this rank keeps its rows.

    Args:
        clean: this rank's clean pass; None if it has no batch.
    """
    if ranks.world_size == 1:
        return group
    return group.of([_sharing(clean, one, ranks) for one in group.maskings])


def _sharing(clean: Clean | None, masking: Masking, ranks: Ranks) -> Masking:
    pattern = masking.pattern
    value = None if clean is None else clean.values[masking.site]
    gates = None if value is None else pattern.mask_shape(value)
    shard = ranks.shard(ranks.shapes(gates, len(pattern.gated)))
    normal: Normal = standard_normal
    if masking.noisy:
        normal = ranks.shard(ranks.shapes(None if value is None else tuple(value.shape), len(pattern.axes))).normal
    return masking.drawing(shard.drawing(masking.gate), normal)
