"""Masking, probes, objectives and steps on small models."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

from maskhooks.distributed.ranks import Shard
from maskhooks.errors import BatchError, PatternError, ReplacementError, SettingError, UnknownNameError
from maskhooks.hooks.replay import Replay
from maskhooks.hooks.tap import Values
from maskhooks.masks.baselines import Learned, Zero
from maskhooks.masks.gates import Bernoulli, HardConcrete
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.masking import Masking
from maskhooks.masks.probes import MLP, PaperMLP, PerExampleLogits, Probe
from maskhooks.masks.samples import GateSamples
from maskhooks.masks.votes import Vote
from maskhooks.model.outputs import kl
from maskhooks.model.wrapping import wrap
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.masked import masked_pass
from maskhooks.seeds import generator, seeded
from maskhooks.sites.places import Places
from maskhooks.sites.site import Site
from maskhooks.training.objectives import AugmentedLagrangian, PaperLagrangian, RatioLagrangian
from maskhooks.training.optimizers import Lookahead
from maskhooks.training.preparation import closed_divergence, gather, random_mask
from maskhooks.training.recipe import Recipe

TOKENS = "batch token hidden -> batch token"


class Tagger(nn.Module):
    """An embedding, three layers, and a mean over real tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.head = nn.Linear(12, 3)

    def forward(self, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        states = self.embedding(ids)
        for layer in self.layers:
            states = torch.tanh(layer(states))
        return self.head((states * valid[..., None]).sum(1) / valid.sum(1, keepdim=True))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 11, (4, 6), generator=generator(1))
    return ids, torch.arange(6) < torch.tensor([[6], [4], [2], [5]])


@pytest.fixture
def hooked():
    names = ["embedding:output", "layers.0:output", "layers.1:output", "layers.2:output"]
    return wrap(
        Tagger(),
        sites=dict.fromkeys(names, TOKENS),
        output=lambda o: Categorical(logits=o),
        valid=lambda b: b[1],
    )


def make(hooked, batch, site="layers.1:output", probe: Probe | None = None, baseline=None, gate=None) -> Masking:
    site = hooked.find(site)[0]
    masking = Masking(site, 1, [Vote((site,), probe or MLP())], gate or HardConcrete(), baseline or Learned())
    torch.manual_seed(0)
    gather(hooked, [masking], [batch], torch.device("cpu"))
    return masking


def test_only_real_positions_are_masked(hooked, batch):
    masking = make(hooked, batch)
    clean = clean_pass(hooked, batch, masking.reads)
    masked = masking.sample(clean.values, clean.places[masking.site], generator(3))
    padding = ~batch[1]
    assert bool((masked.sample[padding] == 1).all())
    assert torch.equal(masked.replaced[padding], masked.original[padding])
    assert bool((masked.sample[batch[1]] < 1).any())


def test_expected_l0_is_the_mean_probability_over_real_positions(hooked, batch):
    masking = make(hooked, batch)
    clean = clean_pass(hooked, batch, masking.reads)
    masked, _ = masked_pass(clean, MaskingGroup([masking]), generator(3))
    (logits,) = masking.logits(clean.values)
    probability = torch.sigmoid(logits + 0.2 * math.log(5))
    expected = torch.stack([p[r].mean() for p, r in zip(probability, batch[1], strict=True)])
    torch.testing.assert_close(masked.expected_l0, expected)


def test_votes_multiply(hooked, batch):
    first, second = hooked.find(["embedding:output", "layers.1:output"])
    votes = [Vote((first,), MLP()), Vote((first, second), MLP())]
    masking = Masking(first, 2, votes, HardConcrete(), Learned())
    gather(hooked, [masking], [batch], torch.device("cpu"))
    clean = clean_pass(hooked, batch, masking.reads)
    each = [HardConcrete().probability(logits) for logits in masking.logits(clean.values)]
    torch.testing.assert_close(masking.probability(clean.values, clean.places[first]), each[0] * each[1])
    assert [str(site) for site in masking.reads] == ["embedding:output", "layers.1:output"]
    assert str(masking) == "embedding:output given layers.1:output"


def test_every_part_gets_a_gradient(hooked, batch):
    masking = make(hooked, batch)
    clean = clean_pass(hooked, batch, masking.reads)
    masked, outputs = masked_pass(clean, MaskingGroup([masking]), generator(3))
    objective = RatioLagrangian(0.001, initial=10.0)
    objective.start(closed_divergence(clean, MaskingGroup([masking]), kl).mean())
    divergence = kl(clean.outputs, outputs)
    objective(masked, divergence, divergence).backward()
    for part in masking.modules:
        for weight in part.parameters():
            assert weight.grad is not None
            assert bool(weight.grad.abs().sum() > 0)
    assert all(weight.grad is None for weight in hooked.model.parameters())


def test_a_masked_pass_from_the_site_onward_is_the_full_one(hooked, batch):
    masking = make(hooked, batch)
    replay = Replay(hooked.model)
    for rounded in (None, 0.5):
        short = clean_pass(hooked, batch, masking.reads, [masking.site], replay)
        full = clean_pass(hooked, batch, masking.reads)
        one = masked_pass(short, MaskingGroup([masking]), generator(3), rounded=rounded)[1]
        other = masked_pass(full, MaskingGroup([masking]), generator(3), rounded=rounded)[1]
        assert torch.equal(one.logits, other.logits)


def test_grouped_positions(batch):
    pattern = "batch token (head dim) -> batch token head, head=3"
    hooked = wrap(
        Tagger(),
        sites={"layers.1:output": pattern},
        output=lambda o: Categorical(logits=o),
        valid=lambda b: b[1],
    )
    masking = make(hooked, batch)
    assert masking.sizes == {"baseline": [3, 4], "reads": [[12]], "groups": 3}
    clean = clean_pass(hooked, batch, masking.reads)
    masked = masking.sample(clean.values, clean.places[masking.site], generator(3))
    assert masked.sample.shape == (4, 6, 3)
    assert bool((masked.sample[~batch[1]] == 1).all())
    heads = masked.replaced.view(4, 6, 3, 4)
    closed = masked.sample == 0
    assert bool(closed.any())
    assert torch.equal(heads[closed], masked.baseline.view(1, 1, 3, 4).expand(4, 6, 3, 4)[closed])


def test_sites_read_together_need_the_same_positions(hooked, batch):
    first = hooked.find("embedding:output")[0]
    other = Site.parse("layers.1:output", "token batch hidden -> token batch")
    masking = Masking(first, 0, [Vote((other,), MLP())], HardConcrete(), Zero())
    clean = clean_pass(hooked, batch, masking.reads)
    masking.start(masking.sizes_for(clean.values), torch.device("cpu"))
    square = Values({**clean.values, "layers.1:output": clean.values["layers.1:output"][:3]})
    with pytest.raises(PatternError, match="same positions"):
        masking.sample(square, clean.places[first])


def test_random_masks_keep_at_random_rates(hooked, batch):
    masking = make(hooked, batch)
    clean = clean_pass(hooked, batch, masking.reads)
    shares = Shard(0, tuple(batch[1].shape)), Shard(0, (len(batch[1]),))
    kept = torch.cat([random_mask(clean, masking, generator(i), *shares).sample[batch[1]] for i in range(200)])
    assert 0.4 < kept.mean() < 0.6
    assert bool((kept == 0).any())


def test_positions_of_a_unit_share_one_gate_and_count_as_one(batch):
    numbers = torch.tensor([0, 0, 1, 2, 2, 2]).expand(4, 6)
    hooked = wrap(
        Tagger(),
        sites={"layers.1:output": TOKENS},
        output=lambda o: Categorical(logits=o),
        valid=lambda b: b[1],
        units=lambda b: numbers,
    )
    masking = make(hooked, batch)
    clean = clean_pass(hooked, batch, masking.reads, [masking.site])
    masked, _ = masked_pass(clean, MaskingGroup([masking]), generator(3))
    open_ = masked.log_open.detach().exp()
    assert len(set(open_[0].tolist())) == 3
    assert open_[0, 0] == open_[0, 1]
    assert torch.equal(masked.sample[0, 3:], masked.sample[0, 3].expand(3))
    assert 0 < masked.sample[0, 0] < 1
    assert masked.expected_l0[0].item() == pytest.approx(open_[0, [0, 2, 3]].mean().item())
    assert masked.expected_l0[2].item() == pytest.approx(open_[2, 0].item())
    assert bool((masked.sample[2, 2:] == 1).all())
    drawn = random_mask(clean, masking, generator(2), Shard(0, (4, 6)), Shard(0, (4,)))
    assert torch.equal(drawn.sample[:2, 0], drawn.sample[:2, 1])


def test_units_have_the_shape_of_positions(batch):
    for numbers in (torch.zeros(4, 5).long(), torch.zeros(4, 6)):
        hooked = wrap(Tagger(), sites={"layers.1:output": TOKENS}, valid=lambda b: b[1], units=lambda b, n=numbers: n)
        with pytest.raises(BatchError, match=r"units have shape .* whole number for each"):
            hooked.task.units(hooked.find("layers.1:output")[0], batch, {"layers.1:output": torch.zeros(4, 6, 12)})


def test_words_are_unknown_to_a_task_without_a_tokenizer(batch):
    hooked = wrap(Tagger(), sites={"layers.1:output": TOKENS}, valid=lambda b: b[1], units="words")
    with pytest.raises(BatchError, match=r"units='words': the task 'function' does not know"):
        hooked.task.units(hooked.find("layers.1:output")[0], batch, {"layers.1:output": torch.zeros(4, 6, 12)})


class TestProbes:
    def test_values_are_standardised(self):
        probe = MLP()
        probe.start([3, 12], 1)
        torch.manual_seed(0)
        rows = [torch.randn(500, 3) * 5 + 7, torch.randn(500, 12) * 0.1 - 2]
        for part in range(5):  # in batches, as in all at once
            probe.fit([value[part * 100 : part * 100 + 100] for value in rows])
        both = torch.cat(rows, -1)
        torch.testing.assert_close(probe.mean, both.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(probe.variance, both.var(0, unbiased=False), rtol=1e-3, atol=1e-5)

    def test_the_clamp_lets_a_logit_come_back(self):
        probe = PerExampleLogits(init_logit=2.0, min_logit=-7.0, max_logit=5.0)
        probe.start([], 1)
        probe.begin([2], torch.device("cpu"))
        probe.logits.data.copy_(torch.tensor([[9.0], [-9.0]]))
        out = probe([])
        assert out.flatten().tolist() == [5.0, -7.0]
        out.backward(torch.tensor([[1.0], [-1.0]]))  # descent takes both back inside
        assert probe.logits.grad.flatten().tolist() == [1.0, -1.0]
        probe.logits.grad = None
        probe([]).backward(torch.tensor([[-1.0], [1.0]]))  # further out
        assert probe.logits.grad.flatten().tolist() == [0.0, 0.0]

    def test_settings_out_of_range(self):
        with pytest.raises(SettingError, match="between min_logit and max_logit"):
            MLP(init_logit=9.0)

    def test_the_papers_head_saturates_open(self):
        probe = PaperMLP()
        probe.start([4], 1)
        logits = probe([torch.randn(100, 4)])
        assert logits.shape == (100, 1)
        assert bool((logits > -5).all() and (logits < 15).all())


class TestObjectives:
    def masked(self, probability: torch.Tensor, valid: torch.Tensor | None = None) -> GateSamples:
        valid = torch.ones_like(probability, dtype=torch.bool) if valid is None else valid
        return GateSamples(probability, probability.log(), valid)

    @pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
    def test_the_margin_is_positive(self, margin):
        with pytest.raises(SettingError, match="margin"):
            RatioLagrangian(margin)

    def test_augmented_formula(self):
        objective = AugmentedLagrangian(0.125, target_fraction=0.8, rate=0.05, damping=5.0, initial=0.5)
        objective.start(torch.tensor(2.0))
        masked = self.masked(torch.tensor([[0.2, 0.4], [0.6, 0.8]]))
        divergence = torch.tensor([0.5, 0.3])
        e = (0.4 - 0.1) / 2
        mu = 0.5 + 5 * e
        torch.testing.assert_close(objective(masked, divergence, divergence), torch.tensor((0.5 + mu * e) / (1 + mu)))
        objective.ascend(divergence)
        torch.testing.assert_close(objective.multiplier, torch.tensor(0.5 + 0.05))  # D / t - 1 clipped to 1
        objective.ascend(torch.tensor([0.05, 0.05]))
        torch.testing.assert_close(objective.multiplier, torch.tensor(0.5 + 0.025))
        for _ in range(1000):
            objective.ascend(torch.zeros(2))
        assert objective.multiplier == 0

    def test_ratio_formula(self):
        objective = RatioLagrangian(
            0.125, target_fraction=0.8, rate=0.1, power=2.0, initial=4.0, l0_price=0.1, ema_decay=0.5
        )
        objective.start(torch.tensor(2.0))  # the multiplier is now 4 * .1 / 2
        masked = self.masked(torch.tensor([[0.2, 0.4], [0.6, 0.8]]))
        divergence = torch.tensor([0.5, 0.3])
        torch.testing.assert_close(objective(masked, divergence, divergence), torch.tensor((0.5 + 0.2 * 4) / 1.2))
        objective.ascend(divergence)  # the running mean is now (.1 + .4) / 2
        multiplier = 0.2 * 2.5**0.1
        torch.testing.assert_close(objective.multiplier, torch.tensor(multiplier))
        mu = multiplier * 2.5**2
        torch.testing.assert_close(objective(masked, divergence, divergence), torch.tensor((0.5 + mu * 4) / (1 + mu)))
        for _ in range(1000):
            objective.ascend(torch.zeros(2))
        assert objective.multiplier.item() == pytest.approx(0.1)

    @pytest.mark.parametrize("make", [AugmentedLagrangian, RatioLagrangian])
    def test_a_level_multiplier_has_no_slope(self, make):
        """With a penalty that falls by 2 nats per fraction kept, at the target."""
        objective = make(0.1)
        objective.start(torch.tensor(1.5))
        objective.level(2.0)
        losses = []
        for kept in (0.4, 0.5):
            far = torch.tensor([objective.target])
            penalty = far + 2.0 * (0.4 - kept)
            losses.append(objective(self.masked(torch.tensor([[kept]])), far, penalty))
        torch.testing.assert_close(*losses)

    def test_the_excess_is_within_two_e_folds(self):
        objective = RatioLagrangian(0.1, rate=0.01, power=2.0)
        objective.start(torch.tensor(2.0))
        for _ in range(50):
            objective.ascend(torch.tensor([1e6]))
        before = objective.multiplier
        divergence = torch.tensor([0.085])
        loss = objective(self.masked(torch.tensor([[0.5]])), divergence, divergence)
        mu = before * math.exp(4)
        torch.testing.assert_close(loss, (0.5 + mu) / (1 + mu))
        objective.ascend(torch.tensor([1e6]))
        torch.testing.assert_close(objective.multiplier, before * math.exp(0.01))

    def test_a_multiplier_for_each_example(self):
        objective = RatioLagrangian(0.1)
        objective.start(torch.tensor([1.0, 1.0]))
        for _ in range(30):
            objective.ascend(torch.tensor([1.0, 0.0]))
        assert objective.multiplier[0] > 0.5 * objective.target > objective.multiplier[1]

    def test_paper_formula(self):
        objective = PaperLagrangian(0.1)
        objective.start(torch.tensor(2.0))
        masked = self.masked(torch.tensor([[0.5, 0.5]]))
        divergence = torch.tensor([0.4])
        loss = objective(masked, divergence, divergence)
        torch.testing.assert_close(loss, torch.tensor(0.3 + math.log(0.5)))
        objective.ascend(torch.tensor([0.4]))
        assert objective.multiplier.item() == pytest.approx(1 + 0.3 * 0.3 / math.sqrt(0.01 * 0.09), rel=1e-4)
        for _ in range(500):
            objective.ascend(torch.tensor([9.0]))
        assert objective.multiplier <= 200

    def test_padding_does_not_count(self):
        masked = self.masked(torch.tensor([[0.5, 1.0]]), torch.tensor([[True, False]]))
        assert masked.expected_l0.item() == pytest.approx(0.5)


def test_lookahead_goes_half_the_way_back():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = Lookahead(torch.optim.SGD([weight], lr=1.0), k=2)
    for _ in range(2):
        weight.grad = torch.tensor([-1.0])
        optimizer.step()
    assert weight.item() == 1.0  # two fast steps to 2, half of the way
    for _ in range(2):
        optimizer.step()
    assert weight.item() == 2.0


def test_recipes_by_name():
    paper = Recipe.named("paper")
    probe, objective = paper.make_probe(), paper.make_objective(0.1)
    assert isinstance(probe, PaperMLP)
    assert isinstance(objective, PaperLagrangian)
    assert isinstance(paper.make_optimizer([nn.Parameter(torch.zeros(1))], []), Lookahead)
    with pytest.raises(
        UnknownNameError, match="The recipes are graph, guan, iba, language, paper, readout, schulz, stable, subset"
    ):
        Recipe.named("papr")


def test_rates_rise_and_fall():
    recipe = dataclasses.replace(Recipe(), warmup_steps=10, decay_fraction=0.5)
    rates = [recipe.rate(step, step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[49] == 1
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


def test_seeds_are_of_their_own():
    assert seeded(0, 1) == seeded(0, 1)
    assert len({seeded(seed, number) for seed in range(10) for number in range(10)}) == 100
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0))
    assert torch.equal(before, torch.get_rng_state())


def test_bernoulli_gates_learn(hooked, batch):
    masking = make(hooked, batch, gate=Bernoulli())
    clean = clean_pass(hooked, batch, masking.reads)
    masked, outputs = masked_pass(clean, MaskingGroup([masking]), generator(3))
    assert set(masked.sample.unique().tolist()) <= {0.0, 1.0}
    kl(clean.outputs, outputs).mean().backward()
    assert any(bool(weight.grad.abs().sum() > 0) for weight in masking.votes[0].probe.parameters())


def test_whole_numbers_are_not_masked() -> None:
    masking = Masking(Site.parse("m:output", "batch feature -> batch feature"), 0, [], HardConcrete(), Zero())
    masking.baseline.start((3,))
    with pytest.raises(ReplacementError, match=r"has values of type torch.int64, .* as x.float\(\)"):
        masking.mask(torch.ones(2, 3, dtype=torch.long), Places(torch.ones(2, 3).bool()), torch.ones(2, 3))
