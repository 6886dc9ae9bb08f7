"""DiffMask (De Cao et al. 2020): learn which positions a prediction does not need."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskhooks.baselines import Baseline
from maskhooks.board import Board
from maskhooks.checkpoint import Measure
from maskhooks.doctor import check_gradients, warn_bypassed
from maskhooks.epochs import Epochs
from maskhooks.errors import NotFittedError, SettingError, StorageError, UnfiredSiteWarning
from maskhooks.explainers.base import Explainer
from maskhooks.explanation import Scores
from maskhooks.fingerprint import fingerprint
from maskhooks.free import Estimate, optimise, pathwise
from maskhooks.gates import Gate
from maskhooks.hooked import Hooked
from maskhooks.masking import Masking, Masks, needs
from maskhooks.outputs import DIVERGENCES, Divergence, kl
from maskhooks.preparation import start
from maskhooks.probes import FreeLogits
from maskhooks.problem import Problem
from maskhooks.progress import track
from maskhooks.ranks import first_rank
from maskhooks.recipe import Recipe
from maskhooks.registry import registry
from maskhooks.replay import Replay
from maskhooks.seeds import forked, generator, seeded
from maskhooks.site import Selector, Site
from maskhooks.step import Clean, clean_pass, units
from maskhooks.storage import save
from maskhooks.store import Store
from maskhooks.task import device_of, move
from maskhooks.votes import Vote

_EVALUATE = 100


class DiffMask(Explainer):
    """Gates that drop as many positions as possible while the output distribution stays within a margin.

    min E[mean P(z != 0)] subject to E[D(y || y_masked)] <= margin, over probes and baselines (De Cao et al. 2020,
    eq. 2 to 4). Hidden states: each site is masked by itself, its gates read from the same state. Inputs: masked with
    the product of votes, one for each state up to a depth, each reading input and state; so every depth has a mask, and
    what is dropped at one depth stays dropped further up.

    Args:
        hooked: the wrapped model.
        sites: what to mask: a tag ("hidden", "input"), an address, a glob, a Site, or several of these.
        given: the states on which masks of `sites` are conditioned, depth by depth. Default: for "input" the sites
            tagged hidden that have the same position axes, for anything else each site itself.
        product: whether masks conditioned on states are the product of the votes of all depths up to theirs, as in the
            paper; False takes each depth's own vote alone, with a baseline of its own, so that depths do not share one
            margin, and what is dropped at one depth may be kept further up.
        margin: the divergence allowed on average, in nats.
        gate: a registered name or a `Gate`.
        baseline: a registered name, or a `Baseline` for a single masked site. Default "learned", without amortisation
            "zero".
        divergence: of original and masked outputs, in nats per example; default KL(original || masked).
        amortized: False optimises free logits for each batch in `explain` instead of learning probes in `fit`.
        recipe: a `Recipe`, or the name of one ("stable", "language", "subset", "paper").
        seed: of all random numbers.

    Attributes:
        maskings: one for each masked site and depth.
        result: what the last fit left: log, validation, within_margin, chosen steps.

    Raises:
        SettingError: the margin is not positive, or another setting is out of range.
        UnknownSiteError: no site is meant; near names are listed.
        PatternError: a site has no pattern.
    """

    name = "diffmask"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        given: Selector | None = None,
        product: bool = True,
        margin: float = 0.1,
        gate: str | Gate = "hard-concrete",
        baseline: str | Baseline | None = None,
        divergence: Divergence = kl,
        amortized: bool = True,
        recipe: str | Recipe = "stable",
        seed: int = 0,
    ) -> None:
        super().__init__(hooked, seed=seed)
        self.recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
        self.objective = self.recipe.make_objective(margin)  # checks the margin
        self.margin, self.divergence, self.amortized, self.product = margin, divergence, amortized, product
        self.gate: Gate = registry.make("gates", gate)
        self.sites = self._asked = hooked.needed(sites)
        weights = [site for site in self.sites if "weight" in site.tags]
        self._baseline = baseline if baseline is not None else "learned" if amortized and not weights else "zero"
        if weights and self._baseline != "zero":
            raise SettingError(
                f"{weights[0]} is a weight, 1 where nothing is masked, for which no baseline can be learned. Use "
                "baseline='zero', or mask what is weighted"
            )
        if given is None and sites == "input" and amortized and hooked.sites.tagged("hidden"):
            given = hooked.alike(self.sites)
        self.given = None if given is None else hooked.needed(given)
        if not amortized and self.given is not None:
            raise SettingError("free logits read no states: leave out `given`, or use amortized=True")
        self.maskings = self._make_maskings()
        self.replay = Replay(hooked.model) if self.recipe.replay else None
        self.fitted = False
        self.result: Any = None

    def __repr__(self) -> str:
        state = "fitted" if self.fitted else "not fitted" if self.amortized else "not amortised"
        what = f"{len(self.maskings)} maskings of {len(self.sites)} sites"
        return f"{type(self).__name__}({what}, margin {self.margin} nats, {state})"

    @property
    def reads(self) -> list[Site]:
        return list(dict.fromkeys(site for masking in self.maskings for site in masking.reads))

    @property
    def onward(self) -> list[Site]:
        return [] if self.amortized else self.sites

    @property
    def within_margin(self) -> bool | None:
        """Whether the chosen state keeps every masking's divergence within the margin, on the validation data."""
        return self.result.within_margin if self.result is not None else None

    def fit(
        self,
        train: Iterable[Any],
        validation: Iterable[Any] | None = None,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        run_dir: str | Path | None = None,
        progress: bool = True,
        store: Store | str | Path | None = None,
        resume: bool = False,
        save_every: float = 60.0,
        tensorboard: bool | str | Path = False,
        **devices: Any,
    ) -> DiffMask:
        """Learns probes and baselines from their start; the model is left as it was.

        Args:
            train: batches, in a DataLoader or a list.
            validation: batches on which the sparsest state within the margin is chosen; without them the last is kept.
            steps: training steps in all; default as many as train each masking `recipe.steps` times.
            epochs: instead of steps, how often to go through `train`.
            run_dir: where logs are written as CSV, the state of the run while it goes on, and the fitted explainer.
            progress: whether to show a bar on stderr.
            store: "memory", a folder, or a `Store`, to keep clean passes across epochs: a step then costs only its
                masked half. The batches of the first epoch come again in the later ones, in another order.
            resume: go on from the state in `run_dir`, to what the run would have been without a stop. A finished run is
                returned as it is; where there is none, this one begins.
            save_every: seconds after which the state is saved again; it is saved at each validation too.
            tensorboard: a folder for the logs as TensorBoard reads them; True is `run_dir/tensorboard`.
            devices: settings of Lightning's Fabric: accelerator, devices, num_nodes, precision, strategy.

        Raises:
            EmptyLoaderError, GradientError, NonFiniteError, ResumeError, StorageError, UnknownDistributionError,
                BatchError: see docs/errors.
            KeyboardInterrupt: Ctrl-C, after the step at hand; the explainer can be used. SystemExit for SIGTERM.

        Warns:
            BypassedWarning: information goes around a masked site.
            MarginWarning: no state kept the divergence within the margin; the nearest was kept.
            UnfiredSiteWarning: no output depends on a site, which is left out.
        """
        from maskhooks import training

        for name, value in {"steps": steps, "epochs": epochs}.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SettingError(f"{name} is a whole number from 1, got {value!r}")
        if epochs is not None and not isinstance(train, Sized):
            raise SettingError("epochs needs a loader with a length; give steps instead")
        if resume and run_dir is None:
            raise SettingError("resume goes on from the state in a folder: give it as run_dir")
        self.sites, self.fitted, self.result = self._asked, False, None
        with forked(self.hooked.model), Epochs(train, self.seed).drawn():
            training.check_loaders(train, validation)
            batch = move(next(iter(train)), device_of(self.hooked.model))
            self._leave_out(check_gradients(self.hooked, batch, self.sites, seeded(self.seed)))
            self._check_sites(batch)
        self.maskings = self._make_maskings()
        problem = self._problem()
        folder = None if run_dir is None else Path(run_dir)
        run = training.Run(
            train,
            validation,
            steps=steps or (0 if epochs else -(-self.recipe.steps * len(self.maskings) // self.recipe.per_step)),
            epochs=epochs or 0,
            folder=folder,
            resume=resume,
            save_every=save_every,
            about={**self.settings(), "model": fingerprint(self.hooked.model)["digest"]},
            progress=progress,
            store=None if store is None else Store.named(store),
            board=Board.named(tensorboard, folder, [(one.label, one.depth) for one in self.maskings]),
        )
        if self.amortized:
            self.result = training.fit(problem, run, **devices)
        else:
            training.fit_baselines_only(problem, train, self.replay, progress=progress)
        self.fitted = True
        cause = getattr(self.result, "cause", None)
        if folder is not None and first_rank():
            self._save_run(folder, cause)
        if cause is not None:
            raise cause
        return self

    def _leave_out(self, unused: Sequence[Site]) -> None:
        if unused:
            self.sites = [site for site in self.sites if site not in unused]
            warnings.warn(
                f"nothing that the model returns depends on {', '.join(map(str, unused))}: there is no mask to learn "
                "there, and these are left out. Name the other sites to say so yourself.",
                UnfiredSiteWarning,
                stacklevel=3,
            )

    def _check_sites(self, batch: Any) -> None:
        """Looks at what the sites do with a batch before masks are learned."""
        warn_bypassed(self.hooked, batch, self.sites, seeded(self.seed))

    def _save_run(self, folder: Path, cause: BaseException | None) -> None:
        try:
            self.save(folder)
        except StorageError:
            if cause is None:  # what ended the run says more
                raise

    def check_ready(self) -> None:
        if self.amortized and not self.fitted:
            raise NotFittedError(f"{self._unlearned}, or load a saved one")

    @property
    def _unlearned(self) -> str:
        return f"this {type(self).__name__} has not learned anything yet: call fit(train_loader) first"

    def scores(self, clean: Clean) -> list[Scores]:
        if not self.amortized:
            optimise(self._problem(), clean, self._estimator)
        with torch.no_grad():
            return [
                self.site_scores(clean, part.site, part.depth, self._log_open(clean, part).exp())
                for masking in self.maskings
                for part in masking.parts
            ]

    def _estimator(self) -> Estimate:
        """What samples free gates in each step of a start."""
        return pathwise

    def _log_open(self, clean: Clean, part: Masking) -> Tensor:
        return part.log_open(clean.values, units(self.hooked, clean, part.site))

    def evaluate(self, batches: Iterable[Any], *, progress: bool = True) -> list[dict[str, Any]]:
        """What the masks do to predictions, a row for each masked site and depth.

        Returns:
            Rows with site, depth; divergence (nats), expected_l0 (fraction kept), agreement (fraction of predictions
            unchanged) with sampled gates; rounded_divergence, rounded_kept, rounded_agreement with gates rounded at .5.
        """
        if not self.fitted:
            raise NotFittedError(
                f"this {type(self).__name__} has not learned anything yet: call fit(train_loader) first"
            )
        measures = [Measure(masking, rounded=True) for masking in self.maskings]
        for number, batch in enumerate(track(batches, "evaluating", shown=progress)):
            on_device = move(batch, device_of(self.hooked.model))
            clean = clean_pass(self.hooked, on_device, *needs(self.maskings), self.replay)
            for index, measure in enumerate(measures):
                measure.add(self.hooked, clean, self.divergence, generator(self.seed, _EVALUATE, number, index))
        return [measure.row() for measure in measures]

    def save(self, folder: str | Path) -> Path:
        """Saves to a folder of safetensors and JSON; `maskhooks.load(folder, model)` is the inverse."""
        return save(self, Path(folder))

    @classmethod
    def restored(cls, hooked: Hooked, settings: Mapping[str, Any], **given: Any) -> DiffMask:
        """The explainer that `settings` describes, not fitted yet.

        Args:
            given: `gate`, `baseline` and `divergence` where they were objects that cannot be saved.

        Raises:
            SettingError: one of these is missing.
        """
        for part in ("gate", "baseline", "divergence"):
            if settings[part] is None and part not in given:
                raise SettingError(
                    f"the {part} was an object that cannot be saved. Pass it again: "
                    f"maskhooks.load(folder, model, {part}=...)"
                )
        gate = settings["gate"]
        made = {
            "gate": gate and registry.make("gates", gate["name"], **gate["settings"]),
            "baseline": settings["baseline"],
            "divergence": DIVERGENCES.get(settings["divergence"]),
        }
        return cls(
            hooked,
            [Site.from_dict(site) for site in settings["sites"]],
            **cls._own(settings),
            margin=settings["margin"],
            amortized=settings["amortized"],
            recipe=Recipe(**settings["recipe"]),
            seed=settings["seed"],
            **{**made, **given},
        )

    @classmethod
    def _own(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of this class alone that `settings` describes."""
        given = settings["given"]
        conditions = None if given is None else [Site.from_dict(site) for site in given]
        return {"given": conditions, "product": settings["product"]}

    @property
    def parts(self) -> list[nn.Module]:
        """Probes and baselines, each once; no free logits, which live for one batch."""
        found = [part for masking in self.maskings for part in masking.modules]
        return list({id(part): part for part in found if not isinstance(part, FreeLogits)}.values())

    def settings(self) -> dict[str, Any]:
        """What rebuilds the explainer, as JSON has it; None for a part that is no registered one."""
        return {
            "sites": [site.to_dict() for site in self.sites],
            "given": None if self.given is None else [site.to_dict() for site in self.given],
            "product": self.product,
            "margin": self.margin,
            "gate": registry.spell("gates", self.gate),
            "baseline": self._baseline if isinstance(self._baseline, str) else None,
            "divergence": next((name for name, known in DIVERGENCES.items() if known is self.divergence), None),
            "amortized": self.amortized,
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.seed,
            "units": self.hooked.task.together,
        }

    def shapes(self) -> list[dict[str, Any]]:
        """For each masking the sizes that its parts were started with."""
        return [part.sizes for masking in self.maskings for part in masking.parts]

    def restart(self, shapes: Sequence[Mapping[str, Any]]) -> None:
        """Allocates the parts for sizes that `shapes` gave."""
        parts = [part for masking in self.maskings for part in masking.parts]
        for part, sizes in zip(parts, shapes, strict=True):
            start(part, sizes, device_of(self.hooked.model))

    def provenance(self) -> dict[str, Any]:
        return {**super().provenance(), **self.settings(), "within_margin": self.within_margin}

    def _make_maskings(self) -> Sequence[Masks]:
        """Maskings with parts that have learned nothing; each fit begins with them."""
        return self._conditioned() if self.given is not None else self._unconditioned()

    def _unconditioned(self) -> list[Masking]:
        return [self._alone(site, (site,) if self.amortized else (), _depth(site)) for site in self.sites]

    def _conditioned(self) -> list[Masking]:
        maskings = []
        for site in self.sites:
            states = sorted((s for s in self.given or () if _depth(s) >= _depth(site)), key=_depth)
            if not states:
                raise SettingError(
                    f"no state of `given` comes at or after {site} (depth {_depth(site)}), so nothing can be known of "
                    f"it. Add {site} itself, or sites further up."
                )
            reads = [(site,) if state == site else (site, state) for state in states]
            if not self.product:
                maskings += [self._alone(site, read, _depth(state)) for state, read in zip(states, reads, strict=True)]
                continue
            votes = [Vote(read, self.recipe.make_probe(number, len(states))) for number, read in enumerate(reads)]
            baseline = self._make_baseline()
            maskings += [
                Masking(site, _depth(state), votes[: number + 1], self.gate, baseline)
                for number, state in enumerate(states)
            ]
        return maskings

    def _alone(self, site: Site, read: tuple[Site, ...], depth: int) -> Masking:
        """A masking with one vote, and a baseline of its own."""
        probe = self.recipe.make_probe() if self.amortized else self.recipe.make_free()
        return Masking(site, depth, [Vote(read, probe)], self.gate, self._make_baseline())

    def _make_baseline(self) -> Baseline:
        if not isinstance(self._baseline, str) and len(self.sites) > 1:
            raise SettingError("one Baseline object serves one site; give a registered name, or an explainer for each")
        baseline: Baseline = registry.make("baselines", self._baseline)
        baseline.started = False
        return baseline

    def _problem(self) -> Problem:
        return Problem(
            self.hooked,
            self.maskings,
            [self.recipe.make_objective(self.margin) for _ in self.maskings],
            self.recipe,
            self.divergence,
            self.margin,
            self.seed,
            self.recipe.make_penalty(),
            fit_first=self.maskings if self.given is not None or not self.amortized else (),
        )


def _depth(site: Site) -> int:
    return site.depth or 0
