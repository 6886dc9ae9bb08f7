"""The base class of Captum's methods as explainers."""

from __future__ import annotations

import contextlib
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskhooks.errors import EmptyLoaderError, MissingExtraError, NotFittedError, SettingError
from maskhooks.explainers.base import Explainer
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import ATTRIBUTION
from maskhooks.hooks.preserved import preserved
from maskhooks.masks.baselines import BASELINES, Baseline, BaselineSetting
from maskhooks.model.hooked import Hooked
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.plugins.registry import registry
from maskhooks.seeds import seeded
from maskhooks.settings.types import Seed
from maskhooks.sites.site import Selector, Site
from maskhooks_captum.at_site import AtSite
from maskhooks_captum.explained import Explained, Output, Target
from maskhooks_captum.layout import Layout

_STREAM = 320


class _Tensors:
    """Checks a baseline that is a tensor."""

    words = "a tensor over its features, or of the shape of its value"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Tensor)


#: A baseline as a tensor, over the features of a site or of the shape of its value.
Value = Annotated[Tensor, _Tensors()]


class CaptumExplainer(Explainer):
    """Scores positions by a method of Captum, applied to the value at each site by itself.

    A score is an attribution with its sign: of `output` for `target`, in the units of that number. Methods that use
    gradients sum over a position's features. Positions that the task gates together have one score. Padding keeps its
    value, and scores 0. Where rows belong to examples by an index, as in a batch of graphs, the numbers of all examples
    are summed: a row affects only its own.

    Args:
        hooked: the wrapped model.
        sites: what is explained, each site by itself: a tag, an address, a glob, a Site, or several of these.
        target: the class that is explained, or a class for each example; None for the one that the model predicts. Of
            several heads or positions it is always what the model predicts.
        output: what of that class: its logit, its log-probability or its probability. None is the logit if the model
            returns logits, else the log-probability; of a distribution without classes, the mean.
        baseline: what a position without information has: a registered baseline, or a tensor over the site's features
            or of the shape of its value. One that needs training data, such as "mean", gets it from `fit`.
        seed: the random seed.

    Raises:
        MissingExtraError: captum is not installed.
        UnknownSiteError: no site matches.
    """

    score_label = ATTRIBUTION

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        target: Target = None,
        output: Output | None = None,
        baseline: BaselineSetting | Value = "zero",
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, seed=seed)
        library(self.name)
        self.sites = hooked.required_sites(sites)
        self.target, self.output, self.baseline = target, output, baseline
        self._baselines: dict[Site, Baseline] = {}
        if isinstance(baseline, Baseline) and len(self.sites) > 1:
            raise SettingError("one Baseline object serves one site; give a registered name, or an explainer for each")
        self._fitted: dict[Site, Baseline] = {}
        registry.check(BASELINES, baseline)

    @property
    def reads(self) -> Sequence[Site]:
        return self.sites

    def fit(self, train: Iterable[Any], validation: Iterable[Any] | None = None) -> CaptumExplainer:
        """Gather what a baseline such as "mean" needs from the training data; other baselines need none.

        Args:
            train: batches.
            validation: not used.

        Raises:
            EmptyLoaderError: the loader yields no batch.
        """
        if not self._learns or isinstance(self.baseline, Tensor):
            return self
        fitted: dict[Site, Baseline] = {}
        for batch in train:
            clean = clean_pass(self.hooked, move(batch, device_of(self.hooked.model)), self.sites)
            for site in self.sites:
                features = site.gating().feature_shape(clean.values[site], site=site)
                if site not in fitted:
                    fitted[site] = _started(registry.make(BASELINES, self.baseline), features, clean.values[site])
                rows = site.gating().rows(clean.values[site], site=site)[clean.places[site].valid]
                fitted[site].fit(rows.reshape(len(rows), *features))
        if not fitted:
            raise EmptyLoaderError("there is nothing to take a baseline from: the loader yields no batch")
        self._fitted, self.fitted = fitted, True
        return self

    def check_ready(self) -> None:
        if self._learns and not self._fitted:
            raise NotFittedError(
                f"the baseline {self.baseline!r} needs training data: call fit(train) first, or use baseline='zero'"
            )

    def scores(self, clean: Clean) -> list[Scores]:
        with _undisturbed(self.hooked), torch.inference_mode(False), torch.enable_grad():
            explained = Explained(clean, self.target, self.output)
            return [self._site(clean, site, number, explained) for number, site in enumerate(self.sites)]

    @abstractmethod
    def attributed(self, at: AtSite) -> Float[Tensor, "*gated"]:
        """Return the scores at a site, by calling Captum with `at`, `at.layout.value` and `at.rows`."""

    def baseline_of(self, at: AtSite) -> Tensor:
        """Return the baseline at a site, like `at.layout.value`.

        Raises:
            SettingError: it has another shape.
        """
        site, value = at.layout.site, at.layout.value
        if isinstance(self.baseline, Tensor):
            return at.layout.baseline(self.baseline)
        made = self._fitted.get(site) or registry.make(BASELINES, self.baseline)
        return at.layout.baseline(_started(made, at.layout.features, value))

    def _site(self, clean: Clean, site: Site, number: int, explained: Explained) -> Scores:
        at = AtSite(clean, Layout(clean, site), explained)
        seed = seeded(self.seed, _STREAM, number)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # Lime and GradientShap draw from numpy's global state
        with self.hooked.tap(replace={site: at.replacement}):
            values = self.attributed(at)
        return self.site_scores(clean, site, site.depth or 0, values)

    @property
    def _learns(self) -> bool:
        """Whether the baseline must be fitted."""
        if isinstance(self.baseline, Tensor):
            return False
        made = registry.make(BASELINES, self.baseline)
        return not made.started and type(made).fit is not Baseline.fit


def library(purpose: str) -> ModuleType:
    """Return `captum.attr`.

    Raises:
        MissingExtraError: captum is not installed.
    """
    try:
        import captum.attr
    except ImportError as error:
        raise MissingExtraError("captum", "captum", purpose) from error
    found: ModuleType = captum.attr
    return found


def _started(baseline: Baseline, features: tuple[int, ...], value: Tensor) -> Baseline:
    if not baseline.started:
        baseline.start(features)
        baseline.to(value.device).started = True
    return baseline


@contextlib.contextmanager
def _undisturbed(hooked: Hooked) -> Iterator[None]:
    """Restore the global random states of torch and numpy, and keep Captum's notes on how it works from the user."""
    state = np.random.get_state()
    try:
        with preserved(hooked.model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"captum\.")
            yield
    finally:
        np.random.set_state(state)
