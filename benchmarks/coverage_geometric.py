"""Tries which convolutions of PyTorch Geometric can be hooked and masked, one by one.

Every class in `torch_geometric.nn.conv` is built from the names of its arguments, run on a small graph with a self-loop
and a repeated edge, and checked:

- each message site fires, in every layer inside;
- with all gates open the output is equal bit for bit;
- with all gates closed the gradient to every message is exactly zero, and with open ones it is not;
- there is one gate per message, each between the nodes that PyG's own hook on `propagate` names, and, if a layer sends
  once and its output is per node, a message changes the output of its target only;
- with a weight of one on each edge in every layer at once the output is equal bit for bit;
- the model is unchanged bit for bit: hooks, flags, attributes, weights, random state.

    python benchmarks/coverage_geometric.py [--quick] [--only NAME,...]
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch_geometric
from torch import Tensor, nn
from torch_geometric.nn import conv as convolutions
from torch_geometric.nn.conv import MessagePassing

import maskhooks
from maskhooks import Hooked, Site
from maskhooks.hooks.frozen import frozen
from maskhooks.masks.baselines import Zero
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.masking import Masking
from maskhooks.sites import nested
from maskhooks.sites.places import Places

NODES, WIDTH, RELATIONS, FILTER = 6, 8, 3, 3
EDGES = torch.tensor([[0, 1, 2, 3, 3, 4, 5, 0, 2, 1, 1, 4], [1, 2, 0, 3, 4, 5, 0, 2, 1, 0, 0, 3]])
TYPES = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1, 0, 2, 0])
METADATA = (["a", "b"], [("a", "to", "b"), ("b", "of", "a"), ("a", "with", "a")])
QUICK = ("GCNConv", "GATConv", "RGCNConv", "TAGConv", "SAGEConv", "ARMAConv", "HGTConv", "HypergraphConv", "GPSConv")
NO_MESSAGES = {
    "WLConv": "hashes colours, and sends no messages",
    "XConv": "is not a message passing layer",
    "FusedGATConv": "is one call of the compiled library dgNN, and sends no messages",
}


def mlp(inputs: int, outputs: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())


def arguments(name: str, kind: type[nn.Module]) -> dict[str, Any]:
    """Arguments for a class, by name."""
    takes = inspect.signature(kind.__init__).parameters
    forward = inspect.signature(kind.forward).parameters
    by_name: dict[str, Any] = {
        "in_channels": WIDTH,
        "out_channels": WIDTH,
        "channels": WIDTH,
        "hidden_channels": WIDTH,
        "K": 2,
        "k": 3,
        "alpha": 0.5,
        "num_layers": 2,
        "num_relations": RELATIONS,
        "space_dimensions": 2,
        "propagate_dimensions": 4,
        "first_aggr": True,
        "dim": 2,
        "kernel_size": 2,
        "aggregators": ["mean", "max"],
        "scalers": ["identity", "amplification"],
        "deg": torch.tensor([0, 2, 3, 1]),
        "filter_size": FILTER,
        "metadata": METADATA,
        "num_node_types": 2,
        "num_edge_types": RELATIONS,
        "edge_type_emb_dim": 4,
        "edge_attr_emb_dim": 4,
        "edge_dim": 2,
        "mlp_h": mlp(WIDTH, 3),
        "mlp_f": mlp(WIDTH + 3),
        "mlp_g": mlp(WIDTH),
        "nn": mlp(2 * WIDTH) if name in ("EdgeConv", "DynamicEdgeConv") else mlp(WIDTH),
    }
    found = {key: by_name[key] for key, part in takes.items() if key in by_name and part.default is part.empty}
    if "edge_attr" in forward and "edge_dim" in takes:
        found["edge_dim"] = 2
    if "heads" in takes:
        found |= {"heads": 2} | ({"concat": False} if "concat" in takes else {})
    special: dict[str, dict[str, Any]] = {
        "NNConv": {"nn": mlp(2, WIDTH * WIDTH)},
        "CGConv": {"dim": 2},
        "GENConv": {"edge_dim": 2},
        "PPFConv": {"local_nn": mlp(WIDTH + 4)},
        "PointNetConv": {"local_nn": mlp(WIDTH + 3)},
        "PointTransformerConv": {"pos_nn": mlp(3)},
        "HeteroConv": {"convs": {key: convolutions.SAGEConv((-1, -1), WIDTH) for key in METADATA[1]}},
        "GPSConv": {"conv": convolutions.GINConv(mlp(WIDTH)), "heads": 2},
        "DirGNNConv": {"conv": convolutions.SAGEConv(WIDTH, WIDTH)},
        "MeshCNNConv": {"kernels": None},
        "HypergraphConv": {"heads": 1, "concat": True},
        "FeaStConv": {"heads": 2},
        "EGConv": {"num_heads": 2},
        "GeneralConv": {"in_edge_channels": 2},
    }
    found |= special.get(name, {})
    return {key: value for key, value in found.items() if value is not None}


def inputs(name: str, module: nn.Module) -> dict[str, Any]:
    """Arguments for the module's forward, by name."""
    x = torch.randn(NODES, WIDTH)
    by_name: dict[str, Any] = {
        "x": x,
        "x_0": torch.randn(NODES, WIDTH),
        "edge_index": EDGES,
        "pos_edge_index": EDGES[:, :7],
        "neg_edge_index": EDGES[:, 7:],
        "hyperedge_index": torch.tensor([[0, 1, 2, 2, 3, 4, 5, 5], [0, 0, 0, 1, 1, 1, 2, 0]]),
        "edge_type": TYPES,
        "node_type": torch.tensor([0, 1, 0, 1, 0, 1]),
        "pos": torch.randn(NODES, 3),
        "normal": torch.nn.functional.normalize(torch.randn(NODES, 3), dim=-1),
        "x_dict": {kind: torch.randn(NODES, WIDTH) for kind in METADATA[0]},
        "edge_index_dict": {key: EDGES[:, 3 * n : 3 * n + 6] for n, key in enumerate(METADATA[1])},
    }
    optional = {"edge_weight": torch.rand(EDGES.shape[1]), "edge_attr": torch.rand(EDGES.shape[1], 2)}
    takes = inspect.signature(module.forward).parameters
    if name == "FAConv":
        del optional["edge_weight"]  # FAConv normalises edges itself
    if name == "DNAConv":
        by_name["x"] = torch.randn(NODES, 3, WIDTH)
    if name == "HeteroConv":
        return {"args_dict": by_name["x_dict"], "edge_index_dict": by_name["edge_index_dict"]}
    if name == "AntiSymmetricConv":
        takes = {"x": None, "edge_index": None}  # type: ignore[assignment]
    if name == "MeshCNNConv":  # each edge of a mesh has four neighbours
        around = torch.stack([torch.arange(NODES).repeat_interleave(4), torch.randint(0, NODES, (4 * NODES,))])
        by_name["edge_index"] = around
    return {key: value for key, value in {**by_name, **optional}.items() if key in takes}


class Net(nn.Module):
    """A model with one convolution, and one tensor as output."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        given = dict(batch)
        first = [given.pop("args_dict")] if "args_dict" in given else []
        found = [tensor for _, tensor in nested.tensors(self.conv(*first, **given)) if tensor.is_floating_point()]
        return found[0] if len(found) == 1 else torch.cat([part.flatten() for part in found])


def state(model: nn.Module) -> dict[str, Any]:
    """All that must not change."""
    found: dict[str, Any] = {"rng": torch.get_rng_state().tolist()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = id(value), list(value.items()) if isinstance(value, dict) else value
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f"{name}.{key} bits"] = tensor.detach().clone().numpy().tobytes(), tensor.requires_grad
    return found


def sent(model: Net, batch: Any) -> dict[str, list[tuple[int, int]]]:
    """The source and target of each layer's messages, from PyG's own hook on `propagate`."""
    found: dict[str, list[tuple[int, int]]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, MessagePassing):

            def note(layer: Any, given: Any, name: str = name) -> None:
                edges = given[0]
                if edges.layout != torch.strided:
                    edges = edges.to_sparse_coo()._indices().flip(0)
                pair = edges if layer.flow == "source_to_target" else edges.flip(0)
                found.setdefault(name, []).extend(map(tuple, pair.t().tolist()))

            handles.append(module.register_propagate_forward_pre_hook(note))
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return found


def check(name: str, kind: type[nn.Module]) -> str:
    """What is wrong with one convolution; empty if nothing is."""
    torch.manual_seed(0)
    model = Net(kind(**arguments(name, kind)))
    batch = inputs(name, model.conv)
    with torch.no_grad():
        model(batch)  # the first call creates the weights of a lazy module
    model.train()
    for weight in list(model.parameters())[::2]:
        weight.requires_grad_(False)
    with frozen(model):
        truth = sent(model, batch)
    before = state(model)
    hooked = maskhooks.wrap(model, call=lambda model, batch: model(batch))
    messages = hooked.sites.tagged("message")
    layers = {name for name, part in model.named_modules() if isinstance(part, MessagePassing)}
    if {site.module.removesuffix(".message") for site in messages} != layers or not layers:
        return f"sites {[str(site) for site in messages]} for the layers {sorted(layers)}"
    for site in messages:
        trouble = check_site(hooked, batch, site, truth[site.module.removesuffix(".message")])
        if trouble:
            return f"{site}: {trouble}"
    with torch.no_grad(), frozen(model):
        usual = hooked(batch)
        with hooked.tap(replace={"edge": torch.clone}):
            if not same(usual, hooked(batch)):
                return "weights of one on all edges change the output"
    after = state(model)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return f"the model changed: {', '.join(changed[:5])}" if changed else ""


def check_site(hooked: Hooked, batch: Any, site: Site, truth: list[tuple[int, int]]) -> str:
    with torch.no_grad(), frozen(hooked.model):
        usual = hooked(batch)
        with hooked.tap(read=[site, site.module.removesuffix("message") + "edges:output"]) as tap:
            hooked(batch)
    value = tap.values[site]
    pairs = [tuple(row) for row in tap.values[site.module.removesuffix("message") + "edges:output"][:, :2].tolist()]
    gates = site.gating().mask_shape(value)
    if gates != (len(truth),) or (pairs != truth and not hetero(batch)):
        return f"{gates} gates for {len(truth)} messages, or other ends: {pairs[:4]} for {truth[:4]}"
    masking = Masking(site, 0, [], HardConcrete(), started(value))
    found = {}
    for gate in (1.0, 0.0):
        leaves: list[Tensor] = []

        def gated(part: Tensor, gate: float = gate, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(part.detach().clone().requires_grad_())
            sample = torch.full((len(part),), gate)
            return masking.mask(leaves[-1], Places(torch.ones(len(part), dtype=torch.bool)), sample).replaced

        with frozen(hooked.model), hooked.tap(replace={site: gated}):
            output = hooked(batch)
        if output.requires_grad:
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            (output * weights).sum().backward()
        found[gate] = output.detach(), [leaf.grad for leaf in leaves]
    if not same(usual, found[1.0][0]):
        return f"open gates change the output by {float((usual - found[1.0][0]).abs().max()):.2g}"
    if not any(grad is not None and bool(grad.any()) for grad in found[1.0][1]):
        return "no gradient flows through open gates"
    if any(grad is not None and bool(grad.any()) for grad in found[0.0][1]):
        return "a gradient flows through closed gates"
    return reach(hooked, batch, site, value, truth, usual)


def reach(hooked: Hooked, batch: Any, site: Site, value: Tensor, truth: Any, usual: Tensor) -> str:
    """The message, if any, that changes more than the output of its target, if a layer sends once for each node."""
    once = usual.shape[0] == NODES and usual.dim() > 1 and set(batch) & {"edge_index"}
    layer = dict(hooked.model.named_modules())[site.module.removesuffix(".message")]
    if not once or layer is not hooked.model.conv or calls(hooked, batch, site) != 1:
        return ""
    for row in range(len(value)):
        other = value.clone()
        other[row] += 1.0
        with torch.no_grad(), frozen(hooked.model), hooked.tap(replace={site: lambda part, other=other: other}):
            changed = (hooked(batch) != usual).flatten(1).any(1).nonzero()[:, 0].tolist()
        if not set(changed) <= {truth[row][1]}:
            return f"message {row} to {truth[row][1]} changes the nodes {changed}"
    return ""


def calls(hooked: Hooked, batch: Any, site: Site) -> int:
    with torch.no_grad(), frozen(hooked.model), hooked.tap(read=site.at("*")) as tap:
        hooked(batch)
    return len(tap.values)


def started(value: Tensor) -> Zero:
    baseline = Zero()
    baseline.start(tuple(value.shape[1:]))
    return baseline


def hetero(batch: Any) -> bool:
    """Whether a layer may number nodes across all types, while edges use each type's own numbers."""
    return "edge_index_dict" in batch


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def names(quick: bool, only: str | None) -> list[str]:
    listed = [n for n in convolutions.__all__ if n != "MessagePassing" and inspect.isclass(getattr(convolutions, n))]
    chosen = only.split(",") if only else QUICK if quick else listed
    return [name for name in listed if name in chosen]


def missing(error: BaseException) -> bool:
    """Whether the error says that a compiled library of PyG is missing."""
    text = str(error)
    return isinstance(error, (ImportError, ModuleNotFoundError)) or any(
        word in text for word in ("requires", "torch-cluster", "torch-spline", "pyg-lib", "pylibcugraph", "dgNN")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="nine convolutions")
    parser.add_argument("--only", help="names, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began, good, failures, left = time.perf_counter(), [], {}, {}
    for name in names(options.quick, options.only):
        if name in NO_MESSAGES:
            left[name] = NO_MESSAGES[name]
            continue
        try:
            trouble = check(name, getattr(convolutions, name))
        except Exception as error:
            trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if missing(error):
                left[name] = trouble
                continue
            if options.only:
                traceback.print_exc()
        if trouble:
            failures[name] = trouble
        else:
            good.append(name)
        print(f"{name}: {trouble or 'ok'}", file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "ok": len(good),
                "total": len(good) + len(failures),
                "failures": failures,
                "left_out": left,
                "seconds": round(time.perf_counter() - began, 1),
                "versions": {"torch": torch.__version__, "torch_geometric": torch_geometric.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
