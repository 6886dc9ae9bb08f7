"""Model check: is the model a function of its input, and are its outputs finite?"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from maskhooks.checks.site_checks import differ, outputs_of
from maskhooks.errors import BatchError, MaskhooksError, MaskhooksWarning, NonFiniteError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.preserved import preserved
from maskhooks.model.hooked import Hooked
from maskhooks.sites import nested

VARIES = (
    "two passes of one batch give different outputs: the model draws random numbers even in eval mode, as with "
    "dropout(training=True), or remembers earlier passes. Masks and scores then tell of noise, and if the model draws "
    "edges, a gate belongs to another edge in each pass. Turn it off while masks are learned and read"
)


def check_model(hooked: Hooked, batch: Any) -> bool:
    """Run a batch twice, and check that the model is a function of it. What the model changes is restored.

    Returns:
        Whether both passes gave the same outputs, up to the order of summation.

    Raises:
        BatchError: the model changed the batch in place.
        NonFiniteError: an output is NaN or infinite.

    Warns:
        MaskhooksWarning: the passes differ.
    """
    found = model_trouble(hooked, batch)
    if isinstance(found, MaskhooksError):
        raise found
    if found is not None:
        warnings.warn(found, stacklevel=4)
    return found is None


def model_trouble(hooked: Hooked, batch: Any) -> MaskhooksError | MaskhooksWarning | None:
    """Return what is wrong with the model as a function of its input, in two passes; None if nothing is."""
    given = [(path, tensor, tensor.detach().clone()) for path, tensor in _tensors(batch) if not tensor.is_meta]
    changed: list[str] = []
    with preserved(hooked.model), torch.no_grad(), hooked.expose_sites(()), frozen(hooked.model):
        try:
            first, second = outputs_of(hooked, batch), outputs_of(hooked, batch)
        except NonFiniteError as error:
            return error
        finally:
            changed += [nested.format_path(path) for path, tensor, before in given if _restored(tensor, before)]
    if changed:
        where = f" at {', '.join(changed)}" if changed[0] else ""
        return BatchError(
            f"the model changes its input in place{where}, so the next pass would get another one. The batch is as it "
            "was. Let forward copy it first, x = x.clone(), or wrap the model so that it gets a copy: "
            "wrap(model, call=lambda model, batch: model(copy.deepcopy(batch)))"
        )
    if any(not bool(one.isfinite().all()) for one in first if one.is_floating_point()):
        return NonFiniteError(
            "the model's outputs are not finite. Look for NaN or infinity in this batch and in the weights"
        )
    return MaskhooksWarning(VARIES) if differ(first, second) else None


def _tensors(batch: Any) -> list[tuple[nested.Path, Tensor]]:
    """Return the tensors of a batch; a graph of PyTorch Geometric lists its own in a dictionary."""
    listed = getattr(batch, "to_dict", None)
    return list(nested.tensors(listed() if callable(listed) else batch))


def _restored(tensor: Tensor, before: Tensor) -> bool:
    """Whether a tensor had changed; it has its values again."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.shape != before.shape:
        return False
    if torch.equal(tensor, before) or bool(((tensor == before) | (tensor.isnan() & before.isnan())).all()):
        return False
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(before)
    return True
