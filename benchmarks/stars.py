"""Coloured stars (Schlichtkrull et al. 2021): compares the kept edges with the truth, over seeds.

Each seed has its own data and model. GraphMask is trained on the training stars; its edges and those of other methods
are compared with the truth on 500 test stars, all edges pooled.

    python benchmarks/stars.py [--seeds 5] [--quick]

Other methods: exact erasure (`Erasure`: the smallest set of edges, first in lexicographic order, whose messages alone
keep the prediction, zero for the others); leave-one-out (`LeaveOneOut`, kept above .5); integrated gradients of the
loss with respect to gates on the messages (40 steps, kept above .55 of a star's maximum); PyTorch Geometric's
GNNExplainer on a twin of the model, on some of the stars, kept above .1; per-example logits (unamortised) instead of
learned probes; random scores. Thresholds other than .5 are those of GraphMask's authors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from maskhooks import Erasure, GraphMask, LeaveOneOut, Random, Recipe
from maskhooks.errors import MaskhooksWarning
from maskhooks.toy_tasks import stars

GNN_STARS, GNN_EPOCHS = 50, 200


def _update(model: stars.StarsModel, batch: stars.Graphs) -> Callable[[Tensor], Tensor]:
    """Return a function from the factors of a star's messages to its logits."""
    states = model.embedding(batch.features)
    messages = model.layer.message(states[batch.edges[0]], states[batch.edges[1]], batch.colour)
    own = states[batch.centre]

    def update(masks: Tensor) -> Tensor:
        sums = masks @ messages
        logits: Tensor = model.head(model.layer.update(torch.cat([sums, own.expand(len(sums), -1)], -1))).squeeze(-1)
        return logits

    return update


def integrated_gradients(model: stars.StarsModel, data: stars.Stars, steps: int = 40) -> Tensor:
    """Whether the loss's gradient with respect to an edge's gate, averaged from closed to open, is large."""
    found = []
    for number in range(len(data)):
        batch = data[number : number + 1].graphs()
        with torch.no_grad():
            update = _update(model, batch)
            label = (update(torch.ones(1, batch.edges.shape[1])) > 0).float().expand(steps)
        scale = ((torch.arange(steps) + 1) / steps)[:, None].expand(-1, batch.edges.shape[1])
        gates = scale.clone().requires_grad_()
        with torch.enable_grad():
            loss = torch.nn.functional.binary_cross_entropy_with_logits(update(gates), label, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, gates)
        score = gradient.mean(0).abs()
        found.append(score / score.max().clamp(min=1e-12) > 0.55)
    return torch.cat(found)


def gnn_explainer(model: stars.StarsModel, data: stars.Stars, seed: int) -> Tensor:
    """The edges that PyTorch Geometric's GNNExplainer keeps, star by star."""
    from torch_geometric.explain import Explainer, GNNExplainer
    from torch_geometric.nn import MessagePassing

    class Twin(MessagePassing):
        """The same model, with its messages sent through PyTorch Geometric."""

        def __init__(self) -> None:
            super().__init__(aggr="add")
            self.model = model

        def forward(self, x: Tensor, edge_index: Tensor, colour: Tensor, centre: Tensor) -> Tensor:
            states = self.model.embedding(x)
            sums = self.propagate(edge_index, x=states, colour=colour)
            states = self.model.layer.update(torch.cat([sums, states], -1))
            logits: Tensor = self.model.head(states[centre])
            return logits

        def message(self, x_j: Tensor, x_i: Tensor, colour: Tensor) -> Tensor:
            messages: Tensor = self.model.layer.message(x_j, x_i, colour)
            return messages

    torch.manual_seed(seed)
    explainer = Explainer(
        Twin().eval(),
        GNNExplainer(epochs=GNN_EPOCHS),
        explanation_type="model",
        edge_mask_type="object",
        model_config={"mode": "binary_classification", "task_level": "graph", "return_type": "raw"},
    )
    found = []
    for number in range(len(data)):
        batch = data[number : number + 1].graphs()
        mask = explainer(batch.features, batch.edges, colour=batch.colour, centre=batch.centre).edge_mask
        found.append(mask > 0.1)
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many models, each with its own seed and data")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps and stars, under a minute")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MaskhooksWarning)
    rows = []
    for seed in range(1 if given.quick else given.seeds):
        rows.append(run(seed, given.quick))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    ours = [row["methods"]["graphmask"] for row in rows]
    names = rows[0]["methods"]
    print(
        json.dumps(
            {
                "benchmark": "stars",
                "quick": given.quick,
                "torch": torch.__version__,
                "seeds": len(rows),
                "f1_min": min(one["f1"] for one in ours),
                "precision_min": min(one["precision"] for one in ours),
                "recall_min": min(one["recall"] for one in ours),
                "model_accuracy_min": min(row["accuracy"] for row in rows),
                "methods": {
                    name: {
                        key: statistics.median(row["methods"][name][key] for row in rows)
                        for key in rows[0]["methods"][name]
                    }
                    for name in names
                },
                "errors": {name: why for row in rows for name, why in row["errors"].items()},
                "by_seed": rows,
            }
        )
    )


def run(seed: int, quick: bool) -> dict[str, Any]:
    """Train one seed's model, and score the edges that each method keeps."""
    train, validation, test = stars.generate(seed=seed)
    *_, (_, model) = stars.train_model(train, seed=seed, epochs=5 if quick else 8)
    for weight in model.parameters():
        weight.requires_grad_(False)
    hooked = stars.hook(model)
    begun = time.perf_counter()
    recipe = Recipe.named("graph")
    learned = GraphMask(
        hooked, seed=seed, recipe=dataclasses.replace(recipe, learning_rate=1e-2, steps=100) if quick else recipe
    )
    learned.fit(train.batches(), validation.batches(500), progress=False)
    seconds = time.perf_counter() - begun
    test = test[:50] if quick else test
    few = test[: 5 if quick else GNN_STARS]
    free = GraphMask(hooked, amortized=False, seed=seed)
    random = Random(hooked, stars.MESSAGE, seed=seed)
    everything = torch.ones(len(test.truth()), dtype=torch.bool)
    methods: dict[str, tuple[stars.Stars, Callable[[], Tensor]]] = {
        "graphmask": (test, lambda: stars.kept(learned.explain(test.graphs()))),
        "graphmask_per_graph": (test, lambda: stars.kept(free.explain(test.graphs()))),
        "erasure": (test, lambda: stars.kept(Erasure(hooked, stars.MESSAGE).explain(test.graphs()))),
        "leave_one_out": (test, lambda: stars.kept(LeaveOneOut(hooked, stars.MESSAGE).explain(test.graphs()))),
        "integrated_gradients": (test, lambda: integrated_gradients(model, test)),
        "gnnexplainer": (few, lambda: gnn_explainer(model, few, seed)),
        "random": (test, lambda: stars.kept(random.explain(test.graphs()))),
        "keep_all": (test, lambda: everything),
    }
    found: dict[str, Any] = {}
    errors = {}
    for name, (data, method) in methods.items():
        begun = time.perf_counter()
        try:
            kept = method()
        except Exception as error:  # a method that fails is reported, not scored
            errors[name] = f"{type(error).__name__}: {error}"
            continue
        found[name] = {**stars.quality(kept, data)._asdict(), "seconds": time.perf_counter() - begun}
        print(f"seed {seed}: {name} {found[name]}", file=sys.stderr, flush=True)
    return {
        "seed": seed,
        "accuracy": stars.accuracy(model, test),
        "within_margin": learned.within_margin,
        "fit_seconds": seconds,
        "methods": found,
        "errors": errors,
    }


if __name__ == "__main__":
    main()
