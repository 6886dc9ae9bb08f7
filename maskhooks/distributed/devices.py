"""Devices: where a training run computes and in how many processes, through Lightning's Fabric."""

from __future__ import annotations

import atexit
from typing import Any

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from maskhooks.distributed.ranks import Ranks
from maskhooks.errors import SettingError


def make_fabric(**settings: Any) -> Fabric:
    """Return Lightning's Fabric for these settings, not launched yet.

    Args:
        settings: accelerator, devices, num_nodes, precision, strategy; see Lightning's documentation. None is Fabric's
            default.

    Raises:
        SettingError: a precision would rewrite the model's weights, or a strategy would split them.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if str(settings.get("precision", "")).endswith("-true"):
        raise SettingError(
            f"precision={settings['precision']!r} would rewrite the model's weights. Use '16-mixed' or 'bf16-mixed', "
            f"or load the model in that dtype."
        )
    try:
        fabric = Fabric(**settings)
    except (ValueError, RuntimeError, TypeError, ImportError, MisconfigurationException) as error:
        raise SettingError(f"Lightning's Fabric rejects these settings: {' '.join(str(error).split())}") from error
    if not isinstance(fabric.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise SettingError(
            f"strategy={settings.get('strategy')!r} splits a model over devices, but masks have nothing to split. Use "
            f"'ddp', 'ddp_spawn' or 'ddp_fork'. If the model is already spread over devices, use devices=1."
        )
    return fabric


def starts_processes(fabric: Fabric) -> bool:
    """Whether training runs in separate processes, which must send back what they learned."""
    return isinstance(fabric.strategy, DDPStrategy) and getattr(fabric.strategy, "_start_method", "popen") != "popen"


def close_process_group() -> None:
    """Leave the process group; gloo threads that outlive it abort the process at exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def ranks_of(fabric: Fabric) -> Ranks:
    """Return the ranks that Fabric launched, as seen by this process."""
    if fabric.world_size > 1:
        atexit.register(close_process_group)
    return Ranks(fabric.global_rank, fabric.world_size, fabric.device)
