"""Tries which model types of transformers can be hooked and masked, one by one, on tiny random models.

Every type that transformers lists for a task is built from its own configuration class (see `tiny.py`, `ladder.py`).
The checks: the model can be wrapped; ordered hidden sites and an input site are found; open gates give equal bits;
gradients to closed values are exactly zero, and those to open ones are not; the bypass test answers (these two at up
to eight sites of a kind); the expected L0 of a fixed batch falls in ten steps without a constraint; every probe gets a
finite, non-zero gradient from the whole objective; the model is unchanged bit for bit. Each type runs in its own
process, with a time limit.

    python benchmarks/coverage.py [--quick] [--only TASK] [--types a,b] [--save FILE] [--matrix FILE]
    python benchmarks/coverage.py --from FILE [FILE ...] [--matrix FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tiny
import torch
import transformers
from coverage_table import KINDS, matrix, summary
from maskhooks_transformers import decoding
from maskhooks_transformers.marks import Marks
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import maskhooks
from maskhooks import DiffMask, Hooked, Site
from maskhooks.checks.site_checks import bypassed
from maskhooks.hooks.frozen import frozen
from maskhooks.masks.masking import Masking
from maskhooks.masks.mix import mix
from maskhooks.model.outputs import kl
from maskhooks.model.wrapping import with_shapes
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.passes.masked import masked_pass
from maskhooks.seeds import generator
from maskhooks.sites import nested
from maskhooks.sites.places import Places
from maskhooks.training.preparation import closed_divergence, gather

TASKS = {
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "question-answering": "QUESTION_ANSWERING",
    "masked-lm": "MASKED_LM",
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_TO_SEQ_CAUSAL_LM",
    "image-classification": "IMAGE_CLASSIFICATION",
    "audio-classification": "AUDIO_CLASSIFICATION",
}
QUICK = {
    "sequence-classification": ("albert", "bert", "t5", "xlm"),
    "token-classification": ("bros",),
    "question-answering": ("bart",),
    "masked-lm": ("longformer", "squeezebert"),
    "causal-lm": ("gpt2", "llama", "mamba", "mixtral", "rwkv"),
    "seq2seq-lm": ("bart",),
    "image-classification": ("resnet", "vit"),
    "audio-classification": ("wav2vec2",),
}
CPU_SECONDS, WALL_SECONDS = 60, 600


def classes(task: str) -> dict[str, str]:
    """The model class of each type that transformers lists for a task."""
    listed = getattr(modeling_auto, f"MODEL_FOR_{TASKS[task]}_MAPPING_NAMES")
    return {kind: name if isinstance(name, str) else name[0] for kind, name in listed.items()}


# One type


class CheckError(Exception):
    """A check failed; the message says which, and how."""


def tried(kind: str, class_name: str) -> dict[str, Any]:
    """The result of one type: `ok`, `reason`, `kinds`, `bypassed`, `attends`; or `not_buildable`."""
    try:
        model, batch = tiny.build(getattr(transformers, class_name), transformers.CONFIG_MAPPING[kind])
    except tiny.BuildError as error:
        return {"not_buildable": str(error)}
    except Exception as error:
        return {"not_buildable": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    found: dict[str, Any] = {"ok": False, "kinds": [], "bypassed": [], "attends": attends(model, batch)}
    try:
        before = remembered(model)
        checked(model, batch, found)
        if not same(before, remembered(model)):
            raise CheckError("the model changed")
        found["ok"] = True
    except CheckError as error:
        found["reason"] = str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        found["reason"] = f"{type(error).__name__} ({where}): {' '.join(str(error).split())[:240]}"
    return found


def checked(model: nn.Module, batch: Any, found: dict[str, Any]) -> None:
    """Run the checks, and fill in `found`.

    Raises:
        CheckError: a check fails.
    """
    hooked = maskhooks.wrap(model)
    found["kinds"] = [kind for kind in KINDS if hooked.sites.tagged(kind)]
    hooked = with_shapes(hooked, batch)
    hidden = hooked.sites.tagged("hidden")
    depths = [site.depth for site in hidden]
    if not hooked.sites.tagged("input"):
        raise CheckError("no input site")
    if len(hidden) < 3 or depths != sorted(set(depths)):
        raise CheckError(f"no ordered hidden sites: {', '.join(map(str, hidden)) or 'none'}")
    found["sites"] = {kind: len(hooked.sites.tagged(kind)) for kind in KINDS}
    open_gates_change_nothing(hooked, batch)
    for kind in KINDS:
        for site in some(hooked.sites.tagged(kind)):
            closed_gates_stop_gradients(hooked, batch, site)
    around = bypassed(hooked, batch, some(hidden))
    if None in around.values():
        raise CheckError("the bypass test has no answer: no other input changes the output")
    found["bypassed"] = [str(site) for site, way in around.items() if way]
    with frozen(model):
        for explainer in explainers(hooked):
            masks_learn(explainer, batch)


def some(sites: list[Site]) -> list[Site]:
    """At most eight sites, including the first and the last."""
    step = max(1, -(-(len(sites) - 1) // 7))
    return sites if len(sites) <= 8 else [*sites[:-1:step], sites[-1]]


def attends(model: nn.Module, batch: Any) -> bool:
    """Whether the model computes softmax attention."""
    marks, seen = Marks(values=True), []
    marks.attended = lambda: seen.append(True)
    with torch.no_grad(), marks:
        model(**batch, **decoding.without_cache(model))
    return bool(seen)


def tensors(outputs: Any) -> list[Tensor]:
    return [tensor for _, tensor in nested.tensors(outputs)]


def open_gates_change_nothing(hooked: Hooked, batch: Any) -> None:
    with torch.no_grad(), frozen(hooked.model):
        clean = tensors(hooked(batch))
        with hooked.tap(replace={site: lambda value: mix(value, torch.ones(()), value + 1) for site in hooked.sites}):
            masked = tensors(hooked(batch))
    if [bits(one) for one in clean] != [bits(one) for one in masked]:
        raise CheckError("open gates change the output")


def closed_gates_stop_gradients(hooked: Hooked, batch: Any, site: Site) -> None:
    for sample, stopped in ((1.0, False), (0.0, True)):
        leaves: list[Tensor] = []

        def replaced(value: Tensor, sample: float = sample, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(value.detach().clone().requires_grad_())
            return mix(leaves[-1], torch.tensor(sample), torch.full_like(value, 0.5).requires_grad_())

        with hooked.tap(replace={site: replaced}):
            outputs = hooked(batch)
        (outputs.logits if hasattr(outputs, "logits") else outputs[0]).float().pow(2).sum().backward()
        slope = leaves[0].grad
        nothing = slope is None or not bool(slope.count_nonzero())
        if nothing and not stopped:
            raise CheckError(f"no gradient reaches {site} through open gates")
        if stopped and not nothing:
            raise CheckError(f"a gradient reaches {site} through closed gates")


def explainers(hooked: Hooked) -> list[DiffMask]:
    """DiffMask on hidden states, and on inputs conditioned on the states with the same positions."""
    made = [DiffMask(hooked, some(hooked.sites.tagged("hidden")))]
    for site in hooked.sites.tagged("input"):
        alike = [one for one in hooked.sites.tagged("hidden") if positions(one) == positions(site)]
        made.append(DiffMask(hooked, [site], conditioned_on=some(alike)))
    return made


def positions(site: Site) -> tuple[tuple[str, ...], tuple[int, ...]]:
    assert site.shape is not None
    return site.gating().positions, site.gating().mask_shape(torch.empty(site.shape, device="meta"))


def masks_learn(explainer: DiffMask, batch: Any) -> None:
    hooked = explainer.hooked
    with torch.random.fork_rng():
        torch.manual_seed(0)
        penalty = explainer.recipe.make_penalty()
        gather(hooked, explainer.maskings, [batch], torch.device("cpu"), penalty)
    clean = clean_pass(hooked, batch, explainer.reads)
    for group in explainer.groups:
        (masking,) = group.maskings
        objective = explainer.recipe.make_objective(explainer.margin)
        objective.start(closed_divergence(clean, group, kl).mean())
        for vote in masking.votes:
            vote.probe.zero_grad()  # maskings of deeper states share the votes of earlier ones
        samples, outputs = masked_pass(clean, group, generator(0, 1))
        divergence = kl(clean.outputs, outputs)
        objective(samples, divergence, penalty(clean.outputs, outputs, divergence)).backward()
        for vote in masking.votes:
            slopes = [weight.grad for weight in vote.probe.parameters() if weight.grad is not None]
            if not slopes or not all(bool(slope.isfinite().all()) for slope in slopes):
                raise CheckError(f"a probe of {masking} has no finite gradient")
            if not any(bool(slope.count_nonzero()) for slope in slopes):
                raise CheckError(f"a probe of {masking} has a zero gradient")
    for masking in explainer.maskings:  # after all gradients, since this moves probes
        if not sparsity_falls(clean, masking):
            raise CheckError(f"the expected L0 of {masking} does not fall")


def sparsity_falls(clean: Clean, masking: Masking) -> bool:
    weights = [weight for vote in masking.votes for weight in vote.probe.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    places, course = Places(clean.places[masking.site].valid), []
    for step in range(11):
        kept = masking.sample(clean.values, places, generator(0, 2, step)).expected_l0.mean()
        course.append(float(kept))
        optimizer.zero_grad()
        kept.backward()
        optimizer.step()
    return course[-1] < course[0]


def remembered(model: nn.Module) -> list[Any]:
    """All that must not change: weights, buffers, flags, hooks, attributes, and the random state."""
    weights = [(name, bits(weight), weight.requires_grad) for name, weight in model.state_dict(keep_vars=True).items()]
    modules = [
        (name, module.training, sorted(vars(module)), [len(hooks) for hooks in hooks_of(module)])
        for name, module in model.named_modules()
    ]
    return [weights, modules, bits(torch.get_rng_state())]


def hooks_of(module: nn.Module) -> list[Mapping[int, Any]]:
    return [hooks for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")]


def same(before: list[Any], after: list[Any]) -> bool:
    return before == after


def bits(tensor: Tensor) -> tuple[Any, bytes]:
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return tuple(tensor.shape), flat.numpy().tobytes()


# All types


def alone(kind: str, class_name: str) -> dict[str, Any]:
    """Run `tried` in its own process, forked, so that libraries are imported once."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, kind, class_name))
    process.start()
    sender.close()
    try:
        if receiver.poll(WALL_SECONDS):
            found: dict[str, Any] = receiver.recv()
            return found
        return {"ok": False, "kinds": [], "bypassed": [], "attends": False, "reason": f"took over {WALL_SECONDS} s"}
    except EOFError:
        process.join()
        reason = f"took over {CPU_SECONDS} s" if process.exitcode == -signal.SIGPROF else f"exit {process.exitcode}"
        return {"ok": False, "kinds": [], "bypassed": [], "attends": False, "reason": reason}
    finally:
        process.kill()
        process.join()


def _child(sender: Connection, kind: str, class_name: str) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 # for the life of the process
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    sender.send(tried(kind, class_name))


def merged(files: list[Path]) -> dict[str, dict[str, Any]]:
    """The results of several runs; for a type that was tried twice, the later file counts."""
    results: dict[str, dict[str, Any]] = {}
    for file in files:
        for task, of_task in json.loads(file.read_text(encoding="utf-8")).items():
            results.setdefault(task, {}).update(of_task)
    return {task: dict(sorted(results[task].items())) for task in TASKS if task in results}


def try_all(only: str | None, types: str | None, quick: bool, save: Path | None) -> dict[str, dict[str, Any]]:
    """The result of each type, by task."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    tried("bert", "BertForSequenceClassification")  # loads shared code once for all processes
    results: dict[str, dict[str, Any]] = {}
    for task in [only] if only else list(TASKS):
        wanted = types.split(",") if types else QUICK.get(task, ()) if quick else None
        chosen = {kind: name for kind, name in classes(task).items() if wanted is None or kind in wanted}
        results[task] = {}
        for kind, name in chosen.items():
            begun = time.perf_counter()
            one = results[task][kind] = alone(kind, name)
            said = one.get("not_buildable") or one.get("reason") or f"ok, {one['sites']}"
            print(f"{task} {kind} {time.perf_counter() - begun:.1f} s: {said}", file=sys.stderr, flush=True)
            if save:
                save.write_text(json.dumps(results), encoding="utf-8")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a dozen types, under a minute")
    parser.add_argument("--only", choices=list(TASKS), help="one task")
    parser.add_argument("--types", help="model types, separated by commas")
    parser.add_argument("--save", type=Path, help="write the results as JSON, after each type")
    parser.add_argument(
        "--from", nargs="+", type=Path, dest="saved", metavar="FILE", help="summarise saved results; try nothing"
    )
    parser.add_argument("--matrix", type=Path, help="write a Markdown table of types by kind of site")
    given = parser.parse_args()
    results = merged(given.saved) if given.saved else try_all(given.only, given.types, given.quick, given.save)
    if given.matrix:
        given.matrix.write_text(matrix(results), encoding="utf-8")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    figures = {task: summary(of_task) for task, of_task in results.items() if of_task}
    print(json.dumps({"benchmark": "coverage", "quick": given.quick, **versions, **figures}))


if __name__ == "__main__":
    main()
