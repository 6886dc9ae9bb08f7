"""Devices: where a training run computes, and in how many processes, as Lightning's Fabric has it."""

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


def connect(**settings: Any) -> Fabric:
    """Lightning's Fabric for these settings, not launched yet.

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
        raise SettingError(f"Lightning's Fabric cannot be set up so: {' '.join(str(error).split())}") from error
    if not isinstance(fabric.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise SettingError(
            f"strategy={settings.get('strategy')!r} splits a model over devices, and masks have nothing to split. Use "
            f"'ddp', 'ddp_spawn' or 'ddp_fork'. A model that is spread over devices already may stay so: devices=1."
        )
    return fabric


def starts_processes(fabric: Fabric) -> bool:
    """Whether training runs in processes of its own, and what it learned must come back from there."""
    return isinstance(fabric.strategy, DDPStrategy) and getattr(fabric.strategy, "_start_method", "popen") != "popen"


def leave() -> None:
    """Ends the exchange with other processes; threads of gloo that outlive it abort the process at its end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def ranks_of(fabric: Fabric) -> Ranks:
    """This process among those that Fabric launched."""
    if fabric.world_size > 1:
        atexit.register(leave)
    return Ranks(fabric.global_rank, fabric.world_size, fabric.device)
