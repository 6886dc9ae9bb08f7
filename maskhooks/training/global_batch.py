"""The global batch: one batch from each rank, whose gates all ranks draw alike."""

from __future__ import annotations

from maskhooks.distributed.ranks import Ranks, Shard
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.masking import Masking
from maskhooks.passes.clean import Clean


def sharing(group: MaskingGroup, clean: Clean | None, ranks: Ranks) -> MaskingGroup:
    """Return the group with gates that draw for the global batch, and keep this rank's rows.

    Args:
        clean: this rank's clean pass; None if it has no batch.
    """
    if ranks.world_size == 1:
        return group
    return group.with_gates([_shard(clean, one, ranks).drawing(one.gate) for one in group.maskings])


def _shard(clean: Clean | None, masking: Masking, ranks: Ranks) -> Shard:
    pattern = masking.pattern
    own = None if clean is None else pattern.mask_shape(clean.values[masking.site])
    return ranks.shard(ranks.shapes(own, len(pattern.gated)))
