"""Every proxy against its definition, computed another way, and on every kind of network that derc handles."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from derc.artifacts import Consensus
from derc.data import Data, Split
from derc.errors import DercError, UsageError
from derc.judge import beliefs, logits
from derc.modules import Normalize
from derc.registry import PROXIES
from derc.scoring import open_proxy, version
from derc.scoring.evidence import Evidence, Subject, gather, squash
from derc.scoring.fisher import Fisher
from derc.scoring.gradients import GradNorm, Snip
from derc.scoring.jacobian import Jacov, score
from derc.scoring.linear_probe import LinearProbe, features, left_out, ridge
from derc.scoring.outputs import Accuracy, Divergence
from derc.scoring.synflow import log_flow
from tests.networks import FAMILIES, Functional, make

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 4, 12)


class Small(nn.Module):
    """A convolution, an activation in place, a linear map over tokens; small enough to write down by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(x), inplace=True).flatten(2).transpose(1, 2)).mean(1)


class Mixer(nn.Module):
    """One mixer block: linear maps over tokens, then over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.tokens = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))
        self.channels = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return self.fc((x + self.channels(self.norms[1](x))).mean(1))


class Attention(nn.Module):
    """torch's own attention and a SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.fc(F.silu(self.attention(x, x, x)[0]).mean(1))


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def evidence(classes: int = 4) -> Evidence:
    split = Split(IMAGES, LABELS)
    return Evidence(split, split, LABELS, True, None, LABELS, RNG.dirichlet(np.ones(classes), 12))


def subject(network: nn.Module) -> Subject:
    return Subject(network, lambda split: logits(network, split))


def inputs() -> torch.Tensor:
    return torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).astype(np.float64) / 255)


def differences(network: nn.Module) -> dict[str, np.ndarray]:
    """The mean cross entropy's gradient by central differences in float64."""
    network, x, y = copy.deepcopy(network).double(), inputs(), torch.from_numpy(LABELS)
    found = {}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            flat, gradient = parameter.view(-1), np.zeros(parameter.numel())
            for i in range(len(flat)):
                ends = []
                for step in (1e-6, -1e-6):
                    flat[i] += step
                    ends.append(float(F.cross_entropy(network(x), y)))
                    flat[i] -= step
                gradient[i] = (ends[0] - ends[1]) / 2e-6
            found[name] = gradient
    return found


def test_grad_norm_and_snip_against_finite_differences():
    network = small()
    found, weights = differences(network), dict(network.named_parameters())
    norm = sum(np.linalg.norm(found[name]) for name in ("conv.weight", "fc.weight"))
    snip = sum(np.abs(found[n] * weights[n].detach().numpy().ravel()).sum() for n in ("conv.weight", "fc.weight"))
    assert GradNorm(batch=5).measure(subject(network), evidence()) == pytest.approx(norm, rel=1e-4)
    assert Snip(batch=5).measure(subject(network), evidence()) == pytest.approx(snip, rel=1e-4)


def test_gradients_are_of_the_first_images_alone():
    network, part = small(), Split(IMAGES[:7], LABELS[:7])
    fewer = Evidence(part, part, LABELS[:7], True, None, LABELS[:7])
    for proxy in (GradNorm, Snip, Fisher):
        value = proxy(images=7, batch=4).measure(subject(network), evidence())
        assert value == pytest.approx(proxy(images=99, batch=7).measure(subject(network), fewer), rel=1e-5)


def test_fisher_against_masks_on_every_channel_by_finite_differences():
    """½ mean (dL/dm)² over a mask m that multiplies one channel of what one map gives, at m = 1 (Theis et al. 2018)."""
    network, y = small().double(), torch.from_numpy(LABELS)

    def losses(conv_mask: torch.Tensor, fc_mask: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(network.conv(inputs()) * conv_mask[:, None, None])
        outputs = (network.fc(maps.flatten(2).transpose(1, 2)) * fc_mask).mean(1)
        return F.cross_entropy(outputs, y, reduction="none")

    total = 0.0
    with torch.no_grad():
        for which, channels in ((0, 5), (1, 4)):
            for channel in range(channels):
                ends = []
                for step in (1e-6, -1e-6):
                    masks = [torch.ones(5).double(), torch.ones(4).double()]
                    masks[which][channel] += step
                    ends.append(losses(*masks))
                total += float((((ends[0] - ends[1]) / 2e-6) ** 2).mean() / 2)
    assert Fisher(batch=5).measure(subject(network.float()), evidence()) == pytest.approx(total, rel=1e-3)


def test_jacov_against_numpy_and_finite_differences():
    network = small().double()
    x, rows = inputs(), np.zeros((12, 108))
    with torch.no_grad():
        for i in range(108):
            step = torch.zeros(108).double()
            step[i] = 1e-6
            ends = [network(x + sign * step.view(3, 6, 6)).sum(1) for sign in (1, -1)]
            rows[:, i] = (ends[0] - ends[1]).numpy() / 2e-6
    values = np.linalg.eigvals(np.corrcoef(rows)).real + 1e-5
    want = -np.sum(np.log(values) + 1 / values)
    assert score(rows) == pytest.approx(want, rel=1e-6)
    assert Jacov(batch=12).measure(subject(network.float()), evidence()) == pytest.approx(want, rel=0.02)


def test_jacov_of_unrelated_rows_is_its_largest_value_and_equal_rows_are_far_below():
    free = np.array([[1, -1, 0, 0], [0, 0, 1, -1]], float)
    assert score(free) == pytest.approx(-2 * (math.log1p(1e-5) + 1 / (1 + 1e-5)))
    assert score(free[[0, 0]]) < -1e4
    assert Jacov(batch=2).share(score(free)) > 0.99


class Positive(nn.Module):
    """A plain network with a batch norm, whose SynFlow has a closed form."""

    def __init__(self, first: nn.Module, norm: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.normalize = Normalize((0.4,) * 3, (0.2,) * 3)
        self.first, self.norm, self.second = first, norm, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.norm(self.first(self.normalize(x)))).mean((2, 3)))


def test_synflow_is_the_sum_of_absolute_paths_and_batch_norm_scales_them():
    """Without biases each of the network's three layers of weights carries the whole flow R."""
    torch.manual_seed(0)
    network = Positive(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Linear(5, 4, bias=False)).eval()
    network.norm.weight.data.uniform_(-2, 2)
    network.norm.running_mean.uniform_(-1, 1)
    network.norm.running_var.uniform_(0.5, 2)
    conv = network.first.weight.detach().double().abs().sum((1, 2, 3)).numpy()
    scale = np.abs(network.norm.weight.detach().double().numpy()) / np.sqrt(
        network.norm.running_var.double().numpy() + network.norm.eps
    )
    flow = (network.second.weight.detach().double().abs().numpy() @ (conv * scale)).sum()
    assert log_flow(network, (3, 6, 6)) == pytest.approx(math.log(3 * flow), rel=1e-9)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(1, 5, affine=False), nn.Hardtanh(0, 1e-3)])
def test_synflow_takes_away_what_normalises_or_clips(norm):
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 5, 3, bias=False), nn.Linear(5, 4, bias=False)
    plain = log_flow(Positive(parts[0], nn.Identity(), parts[1]), (3, 6, 6))
    assert log_flow(Positive(parts[0], norm, parts[1]), (3, 6, 6)) == pytest.approx(plain, rel=1e-12)


def test_accuracy_and_divergence_by_hand():
    network, seen = small(), evidence()
    with torch.no_grad():
        outputs = network.double()(inputs()).numpy()
    network.float()
    q = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    p = seen.believed()
    assert Accuracy().measure(subject(network), seen) == (outputs.argmax(1) == LABELS).mean()
    assert Divergence().measure(subject(network), seen) == pytest.approx(-(p * np.log(p / q)).sum(1).mean(), rel=1e-4)
    assert Divergence().share(0.0) == 1.0


def test_divergence_from_itself_is_nothing_and_uses_the_columns_of_the_classes():
    network, split = small(), Split(IMAGES, LABELS % 2)
    belief = logits(network, split)[:, [2, 0]].softmax(1).numpy()
    seen = Evidence(split, split, LABELS % 2, True, (2, 0), LABELS % 2, belief)
    assert Divergence().measure(subject(network), seen) == pytest.approx(0.0, abs=1e-6)


def test_ridge_leaves_each_row_out_as_refitting_without_it_does():
    rng = np.random.default_rng(1)
    for shape in ((20, 6), (10, 25)):
        x, y = rng.normal(size=shape), rng.normal(size=(shape[0], 3))
        strength, errors = 0.7, []
        for i in range(len(x)):
            keep = np.arange(len(x)) != i
            mx, my = x[keep].mean(0), y[keep].mean(0)
            a = x[keep] - mx
            w = np.linalg.solve(a.T @ a + strength * np.eye(shape[1]), a.T @ (y[keep] - my))
            errors.append(y[i] - my - (x[i] - mx) @ w)
        u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
        centred = y - y.mean(0)
        assert left_out(u, s, u.T @ centred, centred, strength) == pytest.approx(np.mean(np.square(errors)), rel=1e-9)


def test_ridge_finds_a_linear_map_and_refuses_what_is_not_finite():
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(50, 4)), rng.normal(size=(4, 3))
    weight, bias = ridge(x, x @ w + 2)
    assert np.allclose(weight, w, atol=1e-4) and np.allclose(bias, 2, atol=1e-4)
    with pytest.raises(DercError, match="not finite"):
        ridge(np.full((4, 2), np.nan), np.eye(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_what_goes_into_the_classifier(family):
    network = make(family)
    split = Split(RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8), None)
    images = next(iter(split.batches(3)))[0]
    with torch.no_grad():
        want = network.forward_head(network.forward_features(images), pre_logits=True)
    assert np.allclose(features(network, split), want.numpy(), atol=1e-5)


def test_a_linear_probe_separates_what_is_separable_and_shuffled_labels_are_chance():
    data = Data.load("digits", probe=300)
    network = make("vit")
    seen = gather(data, tuple("0123456789"), Consensus(np.zeros(0, np.int64)))
    assert LinearProbe().measure(subject(network), seen) > 0.6
    order = np.random.default_rng(3).permutation(300)
    wrong = Evidence(data.probe, data.validation, data.validation.labels, True, None, data.probe.labels[order])
    assert LinearProbe().measure(subject(network), wrong) < 0.25


NETWORKS = {
    **{family: lambda family=family: make(family) for family in FAMILIES},
    "functional": Functional,
    "mixer": Mixer,
    "attention": Attention,
}


def small_data() -> tuple[Data, Split]:
    data = Data.load("digits", probe=24)
    part = Split(data.validation.images[:24], data.validation.labels[:24])
    return data, part


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_proxy_leaves_every_network_exactly_as_it_was(kind):
    torch.manual_seed(0)
    network = NETWORKS[kind]()
    network.train()
    frozen = next(iter(network.parameters()))
    frozen.requires_grad_(False)
    next(iter(network.children())).eval()
    list(network.parameters())[-1].grad = kept = torch.ones_like(list(network.parameters())[-1])
    state = copy.deepcopy(network.state_dict())
    flags = [p.requires_grad for p in network.parameters()]
    modes = [m.training for m in network.modules()]
    data, part = small_data()
    belief = np.full((24, 10), 0.1)
    seen = Evidence(data.probe, part, part.labels, True, None, data.probe.labels, belief)
    for name in PROXIES:
        proxy = open_proxy(name)
        options = {"images": 24, "batch": 12} if "images" in proxy.__dataclass_fields__ else {}
        value = type(proxy)(**options).measure(subject(network), seen)
        # Few activation units may have the same code for two images, and the kernel then has no logarithm.
        assert math.isfinite(value) or name == "naswot", name
        assert 0 <= proxy.share(value) <= 1, name
        assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == flags
    assert list(network.parameters())[-1].grad is kept and bool((kept == 1).all())
    assert all(p.grad is None for p in list(network.parameters())[:-1])
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", PROXIES)
def test_shares_rise_with_values_and_the_same_network_gets_the_same_value(name):
    proxy = open_proxy(name)
    assert proxy.name == name and len(version(type(proxy))) == 64
    ordered = [-1e6, -300.0, -40.0, -1.0, 0.0, 0.3, 0.9]
    if name in ("accuracy", "linear_probe"):
        ordered = [0.0, 0.2, 1.0]
    shares = [proxy.share(value) for value in ordered]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    network = small()
    wide = Split(np.tile(IMAGES, (8, 1, 1, 1)), np.tile(LABELS, 8))
    seen = Evidence(wide, wide, wide.labels, True, None, wide.labels, np.full((96, 4), 0.25))
    assert proxy.measure(subject(network), seen) == proxy.measure(subject(network), seen)


def test_squash():
    assert squash(-np.inf) == squash(np.nan) == 0.0
    assert (squash(np.inf), squash(3.0, 1.0)) == (1.0, 0.75)


def test_without_labels_the_consensus_answers():
    data = Data.load("digits", probe=32)
    bare = Data("bare", None, *(Split(s.images, None) for s in (data.probe, data.validation, data.heldout)))
    belief = np.random.default_rng(0).dirichlet(np.ones(10), 32)
    seen = gather(bare, None, Consensus(np.arange(300) % 10, belief))
    assert not seen.labelled and (seen.asked() == belief.argmax(1)).all()
    assert (seen.validation_answers == np.arange(300) % 10).all()
    unasked = gather(bare, None, Consensus(np.arange(300) % 10))
    for proxy, words in ((Snip(), "answer for each"), (Divergence(), "donors' predictions")):
        with pytest.raises(UsageError, match=words):
            proxy.measure(subject(make("vit")), unasked)


def test_a_head_that_does_not_know_the_classes_is_refused():
    data = Data.load("digits", probe=32)
    with pytest.raises(UsageError, match="do not stand for the data's classes"):
        gather(data, ("even", "odd"), Consensus(np.zeros(0, np.int64)))


def test_beliefs_are_the_mean_of_the_softmax_over_the_columns_of_each_donor():
    class Plain:
        def __init__(self, program: nn.Module) -> None:
            self.program = program

    first, second = small(), Small()
    split = Split(IMAGES, None)
    found = beliefs([(Plain(first), (0, 2)), (Plain(second), (3, 1))], split)
    a, b = logits(first, split)[:, [0, 2]].softmax(1), logits(second, split)[:, [3, 1]].softmax(1)
    assert np.allclose(found, ((a + b) / 2).numpy())
