"""What explainers share whose masks are trained: fitting, evaluating, saving."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from maskhooks.checks.doctor import check_gradients, warn_bypassed
from maskhooks.data.epochs import Epochs
from maskhooks.distributed.ranks import first_rank
from maskhooks.errors import NotFittedError, SettingError, StorageError, UnfiredSiteWarning
from maskhooks.explainers.base import Explainer
from maskhooks.explainers.saving import save
from maskhooks.hooks.replay import Replay
from maskhooks.masks.masking import Masks
from maskhooks.masks.probes import FreeLogits
from maskhooks.model.fingerprint import fingerprint
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Divergence
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean_cache import Store
from maskhooks.progress import track
from maskhooks.runs.tensorboard import Board
from maskhooks.seeds import forked, generator, seeded
from maskhooks.sites.site import Site
from maskhooks.training.evaluation import Evaluation
from maskhooks.training.preparation import start
from maskhooks.training.problem import Problem
from maskhooks.training.recipe import Recipe

_EVALUATE = 100
_Itself = TypeVar("_Itself", bound="Learned")


class Learned(Explainer):
    """An explainer with maskings whose probes and baselines `fit` learns.

    Attributes:
        sites: what is masked.
        maskings: what is trained, each with an objective of its own.
        result: what the last fit left: log, validation, within_margin, chosen steps.
    """

    _asked: list[Site]  # the sites that it was made for
    sites: list[Site]
    maskings: Sequence[Masks]
    recipe: Recipe
    divergence: Divergence
    amortized: bool
    replay: Replay | None
    fitted = False
    result: Any = None

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
        self: _Itself,
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
    ) -> _Itself:
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
        from maskhooks.training import fit as training

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

    def evaluate(self, batches: Iterable[Any], *, progress: bool = True) -> list[dict[str, Any]]:
        """What the masks do to predictions, a row for each masked site and depth.

        Returns:
            Rows with site, depth; divergence (nats), expected_l0 (fraction kept), agreement (fraction of predictions
            unchanged) with sampled gates, on average over up to 16 samples where there are fewer than 500 examples;
            rounded_divergence, rounded_kept, rounded_agreement with gates rounded at .5.
        """
        if not self.fitted:
            raise NotFittedError(self._unlearned)
        evaluation = Evaluation(
            self.hooked,
            self.maskings,
            self.divergence,
            partial(generator, self.seed, _EVALUATE),
            replay=self.replay,
            rounded=True,
        )
        device = device_of(self.hooked.model)
        return evaluation.rows(enumerate(move(one, device) for one in track(batches, "evaluating", shown=progress)))

    def save(self, folder: str | Path) -> Path:
        """Saves to a folder of safetensors and JSON; `maskhooks.load(folder, model)` is the inverse."""
        return save(self, Path(folder))

    @property
    def parts(self) -> list[nn.Module]:
        """Probes and baselines, each once; no free logits, which live for one batch."""
        found = [part for masking in self.maskings for part in masking.modules]
        return list({id(part): part for part in found if not isinstance(part, FreeLogits)}.values())

    def shapes(self) -> list[dict[str, Any]]:
        """For each masking the sizes that its parts were started with."""
        return [part.sizes for masking in self.maskings for part in masking.parts]

    def restart(self, shapes: Sequence[Mapping[str, Any]]) -> None:
        """Allocates the parts for sizes that `shapes` gave."""
        parts = [part for masking in self.maskings for part in masking.parts]
        for part, sizes in zip(parts, shapes, strict=True):
            start(part, sizes, device_of(self.hooked.model))

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What rebuilds the explainer, as JSON has it; None for a part that is no registered one."""

    @classmethod
    @abstractmethod
    def restored(cls, hooked: Hooked, settings: Mapping[str, Any], **given: Any) -> Learned:
        """The explainer that `settings` describes, not fitted yet."""

    @abstractmethod
    def _make_maskings(self) -> Sequence[Masks]:
        """Maskings with parts that have learned nothing; each fit begins with them."""

    @abstractmethod
    def _problem(self) -> Problem:
        """What is trained."""
