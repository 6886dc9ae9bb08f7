"""The base class of explainers with trained masks: settings, fitting, scoring, evaluating and saving."""

from __future__ import annotations

import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from maskhooks.checks.doctor import check_gradients, warn_bypassed
from maskhooks.data.epochs import Epochs
from maskhooks.distributed.ranks import first_rank
from maskhooks.errors import NotFittedError, SettingError, StorageError, UnfiredSiteWarning
from maskhooks.explainers.base import Explainer
from maskhooks.explainers.saving import save
from maskhooks.explainers.stored_settings import restored
from maskhooks.explanations.explanation import Scores
from maskhooks.hooks.preserved import preserved
from maskhooks.hooks.replay import Replay
from maskhooks.masks.baselines import BASELINES, Baseline, BaselineSetting
from maskhooks.masks.gates import GATES, GateSetting
from maskhooks.masks.group import MaskingGroup, modules_of, reads_of
from maskhooks.masks.masking import Masking
from maskhooks.masks.probes import PerExampleLogits
from maskhooks.masks.votes import Vote
from maskhooks.model.fingerprint import fingerprint
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DIVERGENCES, DivergenceSetting
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import Clean
from maskhooks.passes.clean_cache import CleanCache
from maskhooks.plugins.registry import registry
from maskhooks.progress import length, track
from maskhooks.runs.tensorboard import Board
from maskhooks.seeds import generator, seeded
from maskhooks.settings.duration import Budget, Duration
from maskhooks.settings.schema import checked
from maskhooks.settings.types import Batches, Count, Folder, Natural, NonNegative, Positive, Seed, Text
from maskhooks.sites.site import Selector, Site
from maskhooks.training.copies import Estimate
from maskhooks.training.evaluation import Evaluation
from maskhooks.training.objectives import Objective
from maskhooks.training.per_example import optimise, pathwise
from maskhooks.training.problem import Problem
from maskhooks.training.recipe import RECIPES, RecipeSetting
from maskhooks.training.run import Run

_EVALUATE = 100
_Itself = TypeVar("_Itself", bound="Learned")


class Learned(Explainer):
    """An explainer with probes and baselines that `fit` trains.

    Args:
        hooked: the wrapped model.
        sites: what to mask: a tag ("hidden", "input", "message"), an address, a glob, a Site, or several of these.
        margin: the divergence allowed on average, in nats; None for methods without a margin.
        gate: the distribution of gate values.
        baseline: what a closed gate lets through; a `Baseline` object serves a single masked site. Default "learned",
            for per-example logits "zero".
        divergence: distance between original and masked outputs, in nats per example.
        amortized: True trains probes in `fit`, which compute masks for any batch; False optimises per-example logits
            for each batch in `explain`.
        recipe: how masks are trained. Default: the recipe of the model's task, "language" for models of text, "graph"
            for graph networks, and "stable" for others, such as images and tables; "stable" for per-example logits.
        seed: the random seed.

    Attributes:
        sites: what is masked.
        groups: what is trained; each group has its own masked passes and objective.
        result: the `FitResult` of the last fit: log, validation, within_margin, chosen steps.

    Raises:
        SettingError: a setting is of the wrong type or out of range.
        UnknownNameError: no part is registered under a name.
        UnknownSiteError: no site matches; the message lists similar names.
        PatternError: a site has no pattern.
    """

    groups: Sequence[MaskingGroup]
    result: Any = None

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector,
        margin: Positive | None,
        gate: GateSetting,
        baseline: BaselineSetting | None,
        divergence: DivergenceSetting,
        amortized: bool,
        recipe: RecipeSetting | None,
        seed: Seed,
    ) -> None:
        super().__init__(hooked, seed=seed)
        self.recipe_chosen = recipe is None
        self.recipe = registry.make(RECIPES, recipe or (hooked.task.recipe if amortized else "stable"))
        self.margin, self.amortized = margin, amortized
        self.divergence = registry.make(DIVERGENCES, divergence)
        self.gate = registry.make(GATES, gate)
        self.sites = self._asked = hooked.required_sites(sites)
        weights = [site for site in self.sites if "weight" in site.tags]
        self.baseline = baseline if baseline is not None else "learned" if amortized and not weights else "zero"
        registry.check(BASELINES, self.baseline)
        if weights and self.baseline != "zero":
            raise SettingError(
                f"{weights[0]} is a weight, 1 if nothing is masked, so no baseline can be learned for it. Use "
                "baseline='zero', or mask what it weights."
            )
        self.recorder = Replay(hooked.model) if self.recipe.replay else None
        self._gradients: set[str] = set()  # groups to whose sites they are known to come back
        self._baselines_first = not amortized  # learned ones are fitted before any gate, and then frozen

    def __repr__(self) -> str:
        state = "fitted" if self.fitted else "not fitted" if self.amortized else "not amortised"
        what = f"{len(self.maskings)} maskings of {len(self.sites)} sites"
        margin = "" if self.margin is None else f", margin {self.margin} nats"
        return f"{type(self).__name__}({what}{margin}, {state})"

    @property
    def maskings(self) -> list[Masking]:
        """One for each masked site and depth."""
        return [masking for group in self.groups for masking in group.maskings]

    @property
    def reads(self) -> list[Site]:
        return reads_of(self.groups)

    @property
    def onward(self) -> list[Site]:
        return [] if self.amortized else self.sites

    @property
    def within_margin(self) -> bool | None:
        """Whether the chosen state keeps every group's divergence within the margin, on the validation data."""
        return self.result.within_margin if self.result is not None and self.margin is not None else None

    def fit(
        self: _Itself,
        train: Batches,
        validation: Batches | None = None,
        *,
        steps: Count | None = None,
        epochs: Count | None = None,
        budget: Duration | None = None,
        run_dir: Folder | None = None,
        progress: bool = True,
        cache: CleanCache | Folder | None = "auto",
        resume: bool = False,
        save_every: NonNegative = 60.0,
        tensorboard: bool | Folder = False,
        accelerator: Text | None = None,
        devices: Natural | Text | Sequence[Natural] | None = None,
        num_nodes: Count | None = None,
        precision: Text | None = None,
        strategy: Any = None,
    ) -> _Itself:
        """Train probes and baselines from scratch, or resume a run. The model is unchanged.

        Args:
            train: training batches, in a DataLoader or a list.
            validation: batches on which the sparsest state within the margin is chosen; without them the last is kept.
            steps: total training steps; by default each masking gets `recipe.steps`.
            epochs: instead of steps, the number of passes over `train`.
            budget: instead of steps, the time that the fit may take, such as "10m" or a number of seconds. Learning
                rates and checks follow the clock, so the number of steps depends on the machine.
            run_dir: folder for the CSV logs, the state of the run, and the fitted explainer.
            progress: whether to show the plan, its time and progress on stderr.
            cache: where clean passes are stored for later epochs, so that a step costs only its masked half: "auto",
                "memory", a folder, a `CleanCache`, or None to store none. "auto" stores them in memory, as many as fit
                into half of what is free; with several processes, or no more than one epoch, it stores none. Later
                epochs repeat the batches of the first, in another order.
            resume: whether to resume from the state in `run_dir`, to the result of an uninterrupted run. A finished run
                is returned as it is; if there is no state, training starts.
            save_every: seconds between two saved states; the state is also saved at each validation.
            tensorboard: a folder for TensorBoard logs; True is `run_dir/tensorboard`.
            accelerator: what Lightning's Fabric trains on, such as "cpu" or "gpu"; by default the best available.
            devices: number of devices, or which ones; by default one.
            num_nodes: number of machines.
            precision: "16-mixed" or "bf16-mixed", which are faster on many GPUs; by default float32.
            strategy: how several devices share the work, such as "ddp".

        Raises:
            SettingError: a budget beside steps or epochs, for per-example logits, or too short for a step of each mask.
            EmptyLoaderError, GradientError, NonFiniteError, ResumeError, StorageError, UnknownDistributionError,
                BatchError: see docs/reference/errors.
            KeyboardInterrupt: Ctrl-C, after the current step; the explainer can be used. SystemExit for SIGTERM.

        Warns:
            BypassedWarning: information bypasses a masked site.
            CacheWarning: clean passes do not all fit into the memory or limit of the cache.
            MarginWarning: no state kept the divergence within the margin; the closest was kept.
            UnfiredSiteWarning: no output depends on a site, which is left out.
        """
        begun = time.monotonic()
        # Lightning is imported only for training.
        from maskhooks.training.fit import check_loaders, fit_baselines_only
        from maskhooks.training.fit import fit as train_run

        lengths = {"steps": steps, "epochs": epochs, "budget": budget}
        given = [name for name, value in lengths.items() if value is not None]
        if len(given) > 1:
            raise SettingError(f"{type(self).__name__}.fit: give {' or '.join(given)}, not both")
        if epochs is not None and length(train) is None:
            raise SettingError("epochs needs a loader with a length; give steps instead")
        if given and not self.amortized:
            raise SettingError(
                f"{given[0]} limits the training of probes, but per-example logits are optimised in explain. Leave it "
                "out; the recipe has the number of steps there."
            )
        if resume and run_dir is None:
            raise SettingError("resume needs the folder of the run. Give it as run_dir.")
        self.sites, self.fitted, self.result = self._asked, False, None
        with preserved(self.hooked.model), Epochs(train, self.seed).seeded():
            check_loaders(train, validation)
            self._check_data(train)
            self._check_sites(move(next(iter(train)), device_of(self.hooked.model)))

        self.groups = self._make_groups()
        if steps is None and epochs is None and budget is None:
            count = len(self.groups)
            steps = -(-self.recipe.steps * count // self.recipe.together(count))
        folder = None if run_dir is None else Path(run_dir)
        run = Run(
            self._problem(),
            train,
            validation,
            steps=steps or 0,
            epochs=epochs or 0,
            budget=None if budget is None else Budget.of(budget, begun),
            folder=folder,
            resume=resume,
            save_every=save_every,
            metadata={**self.settings(), "model": fingerprint(self.hooked.model)["digest"]},
            progress=progress,
            cache=_cache(cache, train, steps, epochs),
            board=Board.open(tensorboard, folder, [(group.label, group.depth) for group in self.groups]),
        )

        if self.amortized:
            self.result = train_run(
                run,
                accelerator=accelerator,
                devices=devices,
                num_nodes=num_nodes,
                precision=precision,
                strategy=strategy,
            )
        else:
            fit_baselines_only(run.problem, train, self.recorder, progress=progress)
        self.fitted = True

        self._save_run(run)
        return self

    def _check_sites(self, batch: Any) -> None:
        """Check the sites on a batch before training; leave out those that have no effect."""
        skipped = self.hooked.skipped_checks
        repeats = self.check_model(batch)
        unused = [] if "gradients" in skipped else check_gradients(self.hooked, batch, self.sites, seeded(self.seed))
        if unused:
            self.sites = [site for site in self.sites if site not in unused]
            warnings.warn(
                f"the model's output does not depend on {', '.join(map(str, unused))}, so there is no mask to learn "
                "there, and these sites are left out. To silence this warning, name the other sites.",
                UnfiredSiteWarning,
                stacklevel=3,
            )
        if repeats and "bypass" not in skipped:
            warn_bypassed(self.hooked, batch, self.sites, seeded(self.seed))
        self._check_batch(batch)

    def _check_data(self, train: Iterable[Any]) -> None:
        """Check the data before training; explainers may override this."""

    def _check_batch(self, batch: Any) -> None:
        """Check a batch further before training; explainers may override this."""

    def _save_run(self, run: Run) -> None:
        """Save into the run's folder, and raise what ended the run early."""
        cause: BaseException | None = getattr(self.result, "cause", None)
        try:
            if run.folder is not None and first_rank():
                self.save(run.folder)
        except StorageError:
            if cause is None:  # the exception that ended the run says more
                raise
        if cause is not None:
            raise cause

    def check_ready(self) -> None:
        if self.amortized and not self.fitted:
            raise NotFittedError(f"{self._unlearned}, or load a saved one")

    @property
    def _unlearned(self) -> str:
        return f"this {type(self).__name__} has not learned anything yet: call fit(train_loader) first"

    def scores(self, clean: Clean) -> list[Scores]:
        self.optimise(clean)
        with torch.no_grad():
            return [
                self.site_scores(clean, one.site, one.depth, one.probability(clean.values, clean.places[one.site]))
                for one in self._scored
            ]

    def optimise(self, clean: Clean) -> None:
        """Optimise per-example logits for a batch, if masks are not amortised."""
        if not self.amortized:
            optimise(self._problem(), clean, self._estimator, self.recorder, self._gradients)

    @property
    def _scored(self) -> Sequence[Masking]:
        """The maskings with the gates that become scores."""
        return self.maskings

    def _estimator(self) -> Estimate:
        """Return the function that samples per-example gates in each step."""
        return pathwise

    @checked
    def evaluate(self, batches: Batches, *, progress: bool = True) -> list[dict[str, Any]]:
        """Measure what the masks do to predictions: a row for each masked site and depth, or one for all layers.

        Returns:
            Rows with site, depth; divergence (nats), expected_l0 (fraction kept), agreement (fraction of predictions
            unchanged) with sampled gates, averaged over up to 16 samples if there are fewer than 500 examples;
            rounded_divergence, rounded_kept, rounded_agreement with gates rounded at .5.
        """
        if not self.fitted:
            raise NotFittedError(self._unlearned)
        evaluation = Evaluation(
            self.hooked,
            self.groups,
            self.divergence,
            partial(generator, self.seed, _EVALUATE),
            replay=self.recorder,
            rounded=True,
        )
        with preserved(self.hooked.model):
            return evaluation.rows(enumerate(self._on_device(track(batches, "evaluating", shown=progress))))

    @checked
    def save(self, folder: Folder) -> Path:
        """Save to a folder of safetensors and JSON; `maskhooks.load(folder, model)` loads it."""
        return save(self, Path(folder))

    @property
    def parts(self) -> list[nn.Module]:
        """Probes and baselines, each once, without per-example logits, which last for one batch."""
        return [module for module in modules_of(self.maskings) if not isinstance(module, PerExampleLogits)]

    def shapes(self) -> list[dict[str, Any]]:
        """Return for each masking the sizes that its parts were started with."""
        return [masking.sizes for masking in self.maskings]

    def restart(self, shapes: Sequence[Mapping[str, Any]]) -> None:
        """Allocate the parts for sizes that `shapes` returned."""
        for masking, sizes in zip(self.maskings, shapes, strict=True):
            masking.start(sizes, device_of(self.hooked.model))

    def settings(self) -> dict[str, Any]:
        """Return the settings, each JSON-serialisable, and the unit in which positions are gated together."""
        return {**super().settings(), "units": self.hooked.task.unit_name}

    def provenance(self) -> dict[str, Any]:
        return {**super().provenance(), "within_margin": self.within_margin}

    @classmethod
    def restored(cls: type[_Itself], hooked: Hooked, settings: Mapping[str, Any], **given: Any) -> _Itself:
        """Return the explainer that `settings` describes, not fitted yet.

        Args:
            given: `gate`, `baseline` and `divergence`, if they were objects that cannot be saved.

        Raises:
            SettingError: one of these is missing, or a setting is wrong.
            UnknownNameError: a part is not registered here.
        """
        own = {name: value for name, value in settings.items() if name != "units"}
        return cls(hooked, **restored(cls, own, given))

    @abstractmethod
    def _make_groups(self) -> Sequence[MaskingGroup]:
        """Return groups of maskings with untrained parts; each fit starts from them."""

    def _vote(self, *reads: Site) -> Vote:
        """Return a vote with a new probe that reads these sites; without amortisation, with per-example logits."""
        return Vote(reads, self.recipe.make_probe()) if self.amortized else Vote((), self.recipe.make_logits())

    def _masking(self, site: Site, vote: Vote, depth: int | None = None) -> Masking:
        """Return a masking with one vote and a new baseline."""
        return Masking(site, (site.depth or 0) if depth is None else depth, [vote], self.gate, self._make_baseline())

    def _make_baseline(self) -> Baseline:
        if isinstance(self.baseline, Baseline) and len(self.sites) > 1:
            raise SettingError("one Baseline object serves one site; give a registered name, or an explainer for each")
        baseline = registry.make(BASELINES, self.baseline)
        baseline.started = False
        return baseline

    def _make_objective(self) -> Objective:
        """Return the objective of one group; explainers without a margin override this."""
        assert self.margin is not None
        return self.recipe.make_objective(self.margin)

    def _problem(self) -> Problem:
        """Return the problem to train."""
        return Problem(
            self.hooked,
            self.groups,
            [self._make_objective() for _ in self.groups],
            self.recipe,
            self.divergence,
            math.inf if self.margin is None else self.margin,
            self.seed,
            self.recipe.make_penalty(),
            fit_first=self.maskings if self._baselines_first else (),
        )


def _cache(
    cache: CleanCache | Folder | None, train: Iterable[Any], steps: int | None, epochs: int | None
) -> CleanCache | None:
    """Return the clean cache for what a user writes; "auto" is none if no batch is sure to come a second time.

    Args:
        steps, epochs: the length of the run; both None with a budget.
    """
    found, batches = None if cache is None else CleanCache.named(cache), length(train)
    once = batches is None or epochs == 1 or (steps is not None and steps <= batches)
    return None if found is not None and found.automatic and once else found
