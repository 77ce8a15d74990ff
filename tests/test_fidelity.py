"Measures of fidelity against captum, Quantus and plain loops, on a small network with bends in it."
import importlib
import warnings

import numpy as np
import pytest
import torch
from captum import metrics as captum_metrics
from torch import nn

from pcim_nb import fidelity
from pcim_nb.attribution import METHODS, make, make_baseline
from pcim_nb.fidelity import (FIDELITY, _random_sets, _random_squares, deletion_auc, faithfulness_correlation, infidelity, insertion_auc,
                              perturbation_curve, pixel_flipping, ranks)

N, C, SIZE = 3, 2, 16
TARGET = [2, 0, 1]


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(C, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 3)).eval()
    for m in model: m.weight.data.mul_(2) if hasattr(m, "weight") else None
    return model, torch.rand(N, C, SIZE, SIZE), torch.randn(N, C, SIZE, SIZE)


@pytest.fixture
def quantus(monkeypatch):
    "Quantus 0.6 asks numpy for a function that numpy 2 no longer has; it's given back here, for this test."
    if importlib.util.find_spec("quantus") is None: pytest.skip("Quantus is not installed")
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("quantus")


def features(maps, per):
    "`N×P` from `N×C×H×W`, in words of their own."
    return [[float(m[:, i, j].sum()) for i in range(SIZE) for j in range(SIZE)] if per == "position" else m.flatten().tolist() for m in maps]


def replaced(image, other, chosen, per):
    "`image` with the features `chosen` taken from `other`."
    out = image.clone()
    for p in chosen:
        if per == "position": out[:, p // SIZE, p % SIZE] = other[:, p // SIZE, p % SIZE]
        else: out.view(-1)[p] = other.reshape(-1)[p]
    return out


@torch.no_grad()
def score(model, image, target, probability): s = model(image[None])[0]; return float((s.softmax(0) if probability else s)[target])


def loop_curve(model, x, maps, base, per, steps, order, probability):
    curves = []
    for i in range(N):
        f = features(maps, per)[i]
        descending = sorted(range(len(f)), key=lambda p: -f[p])
        start, end = (x[i], base[i]) if order == "deletion" else (base[i], x[i])
        curves.append([score(model, replaced(start, end, descending[:round(k * len(f) / steps)], per), TARGET[i], probability) for k in range(steps + 1)])
    return np.array(curves)


@pytest.mark.parametrize("per", ["position", "value"])
@pytest.mark.parametrize("order", ["deletion", "insertion"])
@pytest.mark.parametrize("baseline", ["zeros", "blur"])
def test_curves_equal_a_plain_loop(case, per, order, baseline):
    model, x, maps = case
    base = make_baseline(baseline, x)
    curve = perturbation_curve(model, x, maps, TARGET, base, order, 16, per, batch_size=5)
    expected = loop_curve(model, x, maps, base, per, 16, order, True)
    assert np.allclose(curve.scores, expected, atol=1e-6)
    auc = {"deletion": deletion_auc, "insertion": insertion_auc}[order](model, x, maps, TARGET, base, 16, per)
    assert np.allclose(auc, [sum((a + b) / 2 for a, b in zip(c, c[1:])) / 16 for c in expected], atol=1e-6)


@pytest.mark.parametrize("per", ["position", "value"])
def test_pixel_flipping_equals_a_plain_loop(case, per):
    model, x, maps = case
    c = loop_curve(model, x, maps, 0 * x, per, 8, "deletion", False)
    assert np.allclose(pixel_flipping(model, x, maps, TARGET, steps=8, per=per), [np.mean([v[0] - s for s in v]) for v in c], atol=1e-5)


@pytest.mark.parametrize("per", ["position", "value"])
def test_faithfulness_correlation_equals_a_plain_loop(case, per):
    model, x, maps = case
    p = SIZE * SIZE * (C if per == "value" else 1)
    sets, f = _random_sets(p, 20, range(15), 3), features(maps, per)
    assert (sets.sum(1) == 20).all() and len({tuple(s) for s in sets}) == 15
    base = make_baseline("blur", x)
    expected = []
    for i in range(N):
        chosen = [np.flatnonzero(s) for s in sets]
        sums = [sum(f[i][q] for q in s) for s in chosen]
        falls = [score(model, x[i], TARGET[i], False) - score(model, replaced(x[i], base[i], s, per), TARGET[i], False) for s in chosen]
        expected.append(np.corrcoef(sums, falls)[0, 1])
    assert np.allclose(faithfulness_correlation(model, x, maps, TARGET, base, 15, 20, per, seed=3, batch_size=4), expected, atol=1e-4)


@pytest.mark.parametrize("per", ["position", "value"])
@pytest.mark.parametrize("normalize", [True, False])
def test_infidelity_equals_captum(case, per, normalize):
    model, x, maps = case
    base, runs = make_baseline("blur", x), 40
    squares = torch.from_numpy(_random_squares((C, SIZE, SIZE), 4, range(runs), 0, per)).view(runs, -1, SIZE, SIZE).expand(-1, C, -1, -1)
    assert (squares.sum((1, 2, 3)) == 16 * (C if per == "position" else 1)).all()
    def perturb(inputs):   # captum asks for all copies of an image in a row
        m = squares[torch.arange(len(inputs)) % runs]
        return m.float(), torch.where(m, base.repeat_interleave(runs, 0), inputs)
    expected = captum_metrics.infidelity(model, perturb, x, maps, target=torch.tensor(TARGET), n_perturb_samples=runs, normalize=normalize)
    assert np.allclose(infidelity(model, x, maps, TARGET, base, runs, 4, normalize, per, batch_size=7), expected.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("probability", [True, False])
def test_curves_equal_quantus(case, quantus, probability):
    model, x, maps = case
    step, p = 16, C * SIZE * SIZE
    metric = quantus.PixelFlipping(features_in_step=step, perturb_baseline=0.0, normalise=False, disable_warnings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = metric(model, x.numpy(), np.array(TARGET), maps.numpy(), channel_first=True, softmax=probability, device="cpu")
    ours = perturbation_curve(model, x, maps, TARGET, None, "deletion", p // step, "value", "auto" if probability else "raw").scores
    assert np.allclose(ours[:, 1:], theirs, atol=1e-5)   # Quantus leaves the untouched image out


def test_curves_equal_quantus_by_position(case, quantus):
    "With one channel, a feature is a position."
    model, x, maps = case
    grey, one = nn.Sequential(nn.Conv2d(1, C, 1), model).eval(), (x[:, :1], maps[:, :1])
    metric = quantus.PixelFlipping(features_in_step=8, perturb_baseline=0.0, normalise=False, disable_warnings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = np.array(metric(grey, one[0].numpy(), np.array(TARGET), one[1].numpy(), channel_first=True, softmax=True, device="cpu"))
    ours = perturbation_curve(grey, *one, TARGET, steps=SIZE * SIZE // 8)
    assert np.allclose(ours.scores[:, 1:], theirs, atol=1e-5)
    with torch.no_grad(): first = grey(one[0]).softmax(1).gather(1, torch.tensor(TARGET)[:, None]).numpy()
    assert np.allclose(ours.auc(), np.trapezoid(np.hstack([first, theirs]), axis=1) * 8 / SIZE**2, atol=1e-6)


def test_faithfulness_correlation_equals_quantus(case, quantus, monkeypatch):
    "The same random sets on both sides: what Quantus draws from numpy's global generator is drawn again for ours."
    model, x, maps = case
    p, runs, size = C * SIZE * SIZE, 25, 60
    metric = quantus.FaithfulnessCorrelation(nr_runs=runs, subset_size=size, perturb_baseline=0.0, normalise=False, return_aggregate=False, disable_warnings=True)
    for i in range(N):
        np.random.seed(5)  # noqa: NPY002 (Quantus draws from it)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = metric(model, x[i:i + 1].numpy(), np.array(TARGET[i:i + 1]), maps[i:i + 1].numpy(), channel_first=True, softmax=False, device="cpu")
        np.random.seed(5)  # noqa: NPY002
        drawn = np.zeros((runs, p), dtype=bool)
        for row in drawn: row[np.random.choice(p, size, replace=False)] = True  # noqa: NPY002
        monkeypatch.setattr(fidelity, "_random_sets", lambda p, size, which, seed, drawn=drawn: drawn[np.asarray(which)])
        ours = faithfulness_correlation(model, x[i:i + 1], maps[i:i + 1], TARGET[i], n_sets=runs, size=size, per="value")
        assert np.allclose(ours, theirs, atol=1e-4)


def test_ties_follow_the_seed_and_nothing_else():
    "A saturated map must not be ranked by where things lie."
    saturated = np.zeros((1, 1, 32, 32)); saturated[0, 0, 16:] = 1
    r = np.array([ranks(saturated, seed=s)[0].reshape(32, 32) for s in range(50)])
    assert r[:, 16:].max() < r[:, :16].min()
    assert abs(np.corrcoef(r[:, :16].mean(0).ravel(), np.arange(512))[0, 1]) < 0.15
    assert (ranks(saturated, seed=1) == ranks(np.repeat(saturated, 3, 0), seed=1)[2]).all()


@pytest.mark.parametrize("name", FIDELITY)
def test_the_batch_does_not_matter(case, name):
    model, x, maps = case
    f = FIDELITY[name].func
    whole = f(model, x, maps, TARGET)
    assert whole.shape == (N,) and np.isfinite(whole).all()
    for size in (1, 7, 500): assert np.allclose(f(model, x, maps, TARGET, batch_size=size), whole, atol=1e-5)
    assert np.allclose(np.concatenate([f(model, x[i:i + 1], maps[i:i + 1], TARGET[i]) for i in range(N)]), whole, atol=1e-5)


@pytest.mark.parametrize("name", FIDELITY)
def test_a_faithful_map_wins(case, name):
    "For a linear classifier the contributions are known: no other map may come out ahead of them on average."
    torch.manual_seed(1)
    x = torch.rand(4, C, SIZE, SIZE)
    weight = torch.randn(2, C * SIZE * SIZE) * 0.05
    linear = nn.Sequential(nn.Flatten(), nn.Linear(C * SIZE * SIZE, 2, bias=False)); linear[1].weight.data = weight
    w = (weight[1] - weight[0]).view(C, SIZE, SIZE) if name in ("deletion", "insertion") else weight[1].view(C, SIZE, SIZE)   # probabilities ask for the difference
    base = make_baseline("mean", x)
    true, measure = w * (x - base), FIDELITY[name]
    best = measure.func(linear, x, true, 1, base, per="value").mean()
    for k in range(5):
        other = true + (0.2 + k) * true.std() * torch.randn(true.shape)
        value = measure.func(linear, x, other, 1, base, per="value").mean()
        assert value < best if measure.higher else value > best


def test_memory_does_not_grow_with_steps(case):
    "No more than `batch_size` images are ever classified at once."
    model, x, maps = case
    seen = []
    def forward(v): seen.append(len(v)); return model(v)
    for m in FIDELITY.values(): m.func(forward, x, maps, TARGET, batch_size=11)
    assert max(seen) == 11


def test_a_module_is_left_as_it_was(case):
    model, x, maps = case
    model.train()
    try:
        for m in FIDELITY.values(): m.func(model, x, maps, TARGET)
        assert all(m.training for m in model.modules())
    finally: model.eval()


def test_every_method_can_be_judged(case):
    model, x, _ = case
    for name in ("Saliency", "IntegratedGradients", "GradCAM", "Residual", "Random"):
        assert name in METHODS
        a = make(name, model).attribute(x, TARGET)
        for m in FIDELITY.values(): assert m.func(model, x, a, TARGET).shape == (N,)
