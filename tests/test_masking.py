"Masks, hybrids and DAC scores: against plain OpenCV, against loops, on planted truths and hostile input."
import numpy as np
import pytest
import torch
from torch import nn

from pcim_nb.counterfactual import DISCRIMINATIVE, Pairs, attribute_pairs
from pcim_nb.dac import area, dac, minimal_step
from pcim_nb.hybrids import Coherence, area_shares, compare_scenarios, map_similarity, share_test, smoothing_sweep
from pcim_nb.images import PcimError
from pcim_nb.mask_plots import mask_slider
from pcim_nb.masking import DIRECTIONS, NEED_CHANNELS, SCENARIOS, curves_of, grey_closing, normalise, rank_masks, series, soften, superpixels, thresholds

NAMES = ["DNA", "ER", "AGP"]


def net(k=4, seed=3):
    "An untrained classifier whose scores move."
    torch.manual_seed(seed)
    f = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, k)).eval()
    f[-1].weight.data *= 8
    return f


def random_pairs(f, n=3, h=32, w=32, seed=0, both=False):
    "Random images that count: their labels are what `f` says."
    g = torch.Generator().manual_seed(seed)
    x, o, a = (torch.rand(n, 3, h, w, generator=g) for _ in range(3))
    with torch.no_grad(): y, yo = (f(v).argmax(1).numpy() for v in (x, o))
    other = np.where(yo == y, -1, yo) if both else np.full(n, -1)
    return Pairs(range(n), x, o, y, other, "random"), a - .5


def plain(f, m, x, o, y, cuts, closing, blur):
    "One map, one mask after the other, with OpenCV: masks, sizes, hybrids, gains."
    cv2 = pytest.importorskip("cv2")
    p = lambda v: f(torch.tensor(v[None], dtype=torch.float32)).softmax(1)[0, y].item()
    rows = []
    with torch.no_grad():
        for cut in cuts:
            mask = cut(m).astype(np.uint8)
            if closing: mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (closing, closing)))
            soft = cv2.GaussianBlur(mask.astype(np.float32), (blur, blur), 0) if blur else mask.astype(np.float32)
            h = (1 - soft) * o + soft * x
            rows.append((soft, mask.mean(), h, p(h) - p(o)))
    return [np.array(v) for v in zip(*rows)]


def cuts_by_rank(m, steps):
    parts = [1 if k < .7 * steps else 5 for k in range(steps)]
    at = [int(v) for v in np.cumsum(np.array(parts) * m.size / sum(parts))]
    at[-1] = m.size - 1
    ranked = np.sort(m.ravel())[::-1]
    return [np.zeros_like] + [lambda a, r=r: a >= ranked[r] for r in at[1:]]


@pytest.mark.parametrize("closing,blur", [(10, 11), (9, 5), (0, 11), (10, 0), (0, 0), (15, 21)])
@pytest.mark.parametrize("h,w", [(32, 32), (24, 40)])
@pytest.mark.parametrize("ties", [False, True])
def test_aggregate_equals_plain_opencv_step_by_step(closing, blur, h, w, ties):
    f, steps = net(), 40
    pairs, a = random_pairs(f, 2, h, w)
    a = a.round(decimals=1) if ties else a
    maps = normalise(a.sum(1, keepdim=True))
    masks, sizes = rank_masks(maps, steps, closing, blur)
    r = dac(f, pairs, a, steps=steps, closing=closing, blur=blur)
    for i in range(2):
        x, o = pairs.images[i].numpy(), pairs.counterfactuals[i].numpy()
        soft, size, hybrids, score = plain(f, maps[i, 0].numpy(), x, o, pairs.labels[i], cuts_by_rank(maps[i, 0].numpy(), steps), closing, blur)
        ours = r.curves[r.curves.pair == i]
        assert np.ptp(score) > .003
        for p, q in ((masks[i, :, 0].numpy(), soft), (sizes[i].numpy(), size), (ours.mask_size, size), ((o + masks[i].numpy() * (x - o)), hybrids), (ours.score, score)): np.testing.assert_allclose(p, q, atol=1e-5)
        assert np.isclose(r.scores.dac[i], np.trapezoid(score, size), atol=1e-5)


def test_quac_optimal_threshold():
    f = net()
    pairs, a = random_pairs(f, 4)
    maps = normalise(a.abs().sum(1, keepdim=True), "minmax")
    r = dac(f, pairs, a, split="thresholds", normalisation="minmax", steps=50)
    for i in range(4):
        t = np.arange(-1, 1, 2 / 50)                                    # QuAC's own order, rising
        _, size, _, score = plain(f, maps[i, 0].numpy(), pairs.images[i].numpy(), pairs.counterfactuals[i].numpy(), pairs.labels[i], [lambda m, t=t_: m > t for t_ in t], 10, 11)
        best = int(np.argmin(size - score))
        ours = int(r.scores.optimal_step[i])
        if size[best] - score[best] < 0: assert np.isclose(r.curves[r.curves.pair == i].mask_size.iloc[ours], size[best]) and np.isclose(thresholds(50)[ours - 1], t[::-1][ours - 1])
        else: assert ours == 0                                          # nothing is a better bargain than no mask at all, which QuAC's list doesn't hold


@pytest.mark.parametrize("scenario", ["joint", "per_channel"])
def test_masks_by_channel_equal_a_loop(scenario):
    "Every channel's mask, closed and blurred by itself; hybrid and score from plain loops."
    cv2 = pytest.importorskip("cv2")
    f, steps = net(), 30
    pairs, a = random_pairs(f, 2, 24, 24)
    r = dac(f, pairs, a, scenario, NAMES, steps=steps)
    for i in range(2):
        m = (normalise(a[i:i + 1]) if scenario == "joint" else torch.cat([normalise(a[i:i + 1, c:c + 1]) for c in range(3)], 1))[0].numpy()
        cuts = [cuts_by_rank(m if scenario == "joint" else m[c], steps) for c in range(3)]
        for t in range(steps):
            hard = [cv2.morphologyEx(cuts[c][t](m[c]).astype(np.uint8), cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (10, 10))) for c in range(3)]
            soft = np.stack([cv2.GaussianBlur(v.astype(np.float32), (11, 11), 0) for v in hard])
            x, o = pairs.images[i].numpy(), pairs.counterfactuals[i].numpy()
            with torch.no_grad(): p, p0 = (f(torch.tensor(v[None])).softmax(1)[0, pairs.labels[i]].item() for v in ((1 - soft) * o + soft * x, o))
            ours = r.curves[(r.curves.pair == i) & (r.curves.step == t)].iloc[0]
            assert abs(ours.mask_size - np.mean(hard)) < 1e-6 and abs(ours.score - (p - p0)) < 1e-5


def test_closing_the_ranks_equals_closing_each_mask():
    g = torch.Generator().manual_seed(1)
    a = torch.rand(1, 1, 30, 26, generator=g).round(decimals=2)
    for size in (2, 3, 6, 10, 15):
        closed = grey_closing(a, size)
        for level in (.2, .5, .9, .97): assert torch.equal(closed >= level, grey_closing((a >= level).float(), size) > 0)
    assert torch.allclose(soften(torch.ones(1, 1, 9, 9), 21), torch.ones(1, 1, 9, 9), atol=1e-6)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_series_are_nested_and_their_sizes_true(scenario):
    pairs, a = random_pairs(net(), 3, 28, 20, seed=5)
    for curve in curves_of(scenario, a, NAMES, pairs=pairs):
        s = series(curve, 40, 5, 5)
        for i in range(3):
            hard = s.hard([i] * 40, np.arange(40))
            assert (hard[1:] >= hard[:-1]).all() and not hard[0].any() and hard[-1].all()
            np.testing.assert_allclose(hard.float().mean((2, 3)).T, s.sizes[i], atol=1e-6)
            same = s.same_as()[i]
            for t in range(40): assert torch.equal(hard[t], hard[same[t]]) and (same[t] == t or torch.equal(hard[t], hard[t - 1]))
        ends = s.hybrids(pairs.counterfactuals, pairs.images, [2, 2], [0, 39])
        swapped = torch.as_tensor(curve.swapped).view(-1, 1, 1)
        assert torch.allclose(ends[0], pairs.counterfactuals[2], atol=1e-6) and torch.allclose(ends[1], torch.where(swapped, pairs.images[2], pairs.counterfactuals[2]), atol=1e-6)


def test_coherent_never_tears_a_region():
    pairs, a = random_pairs(net(), 2)
    regions = superpixels(pairs, 30)
    s = series(curves_of("coherent", a, NAMES, regions=regions)[0], 60)
    for i in range(2):
        for m in s.hard([i] * 60, np.arange(60))[:, 0].numpy():
            for k in np.unique(regions[i]): assert len(np.unique(m[regions[i] == k])) == 1


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_adaptive_agrees_with_exact(scenario, direction):
    f = net()
    pairs, a = random_pairs(f, 6, seed=7, both=True)
    kw = dict(scenario=scenario, channels=NAMES, direction=direction, steps=200)
    e, q = dac(f, pairs, a, **kw), dac(f, pairs, a, mode="adaptive", **kw)
    np.testing.assert_allclose(q.scores.dac, e.scores.dac, atol=.005)
    assert (q.scores.error <= .005).all() and (e.scores.error == 0).all() and q.scores.passes.sum() <= e.scores.passes.sum()
    seen = q.curves.evaluated.to_numpy(bool)
    np.testing.assert_allclose(q.curves.score[seen], e.curves.score[seen], atol=1e-5)          # what it looked at is what the exact mode saw
    np.testing.assert_array_equal(q.curves.mask_size, e.curves.mask_size)
    np.testing.assert_allclose(e.scores.dac, [area(d.mask_size.to_numpy(), d.score.to_numpy()) for _, d in e.curves.groupby(["channel", "pair"], sort=False)], atol=1e-9)


def test_results_do_not_depend_on_batches():
    f = net()
    pairs, a = random_pairs(f, 5, seed=2)
    r = dac(f, pairs, a, steps=50)
    for b in (1, 7, 64): np.testing.assert_allclose(dac(f, pairs, a, steps=50, micro_batch=b).curves.score, r.curves.score, atol=1e-5)
    one = dac(f, pairs.subset([3]), a[3:4], steps=50)
    np.testing.assert_allclose(one.curves.score, r.curves[r.curves.pair == 3].score, atol=1e-5)
    assert dac(f, pairs, a, steps=50).curves.equals(r.curves)                                   # same call, same result


def test_directions_are_mirror_images():
    "The end of one is the start of the other, and each score is the gain in its own class."
    f = net()
    pairs, a = random_pairs(f, 6, seed=11, both=True)
    there, back = (dac(f, pairs, a, direction=d, steps=30) for d in DIRECTIONS)
    with torch.no_grad(): p, q = f(pairs.images).softmax(1).numpy(), f(pairs.counterfactuals).softmax(1).numpy()
    for r in there.scores.itertuples(): assert np.isclose(r.full_score, p[r.pair, r.label] - q[r.pair, r.label], atol=1e-5)
    for r in back.scores.itertuples():
        k = r.counterfactual_label
        assert np.isclose(r.full_score, q[r.pair, k] - p[r.pair, k] if k >= 0 else p[r.pair, r.label] - q[r.pair, r.label], atol=1e-5)


def test_minimal_step_is_the_last_change():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.integers(0, 3, 12)
        k = minimal_step(p, 1)
        if p[-1] != 1: assert k == -1
        else: assert (p[k:] == 1).all() and (k == 0 or p[k - 1] != 1)


class OneStain(nn.Module):
    "Sees nothing but the brightness of stain 1."
    def forward(self, x): return torch.stack([-x[:, 1].mean((1, 2)), x[:, 1].mean((1, 2))], 1) * 40


def planted(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 24, 24, generator=g) * .2 + .3
    o = torch.rand(n, 3, 24, 24, generator=g) * .2 + .3
    y = np.arange(n) % 2
    for i in range(n): x[i, 1] += .15 * (2 * y[i] - 1); o[i, 1] -= .15 * (2 * y[i] - 1)
    x, o = x - .4, o - .4
    return Pairs(range(n), x, o, y, 1 - y, "two cells that differ in every stain")


@pytest.mark.parametrize("method", [m for m in DISCRIMINATIVE if m not in ("DGradCAM", "DGuidedGradCAM", "DeepLift", "Random")])
def test_single_channel_names_the_stain_that_is_used(method):
    pairs, f = planted(), OneStain()
    r = dac(f, pairs, attribute_pairs(method, f, pairs), "single_channel", NAMES, steps=40, closing=3, blur=3)
    s = r.scores.pivot(index="pair", columns="channel", values="dac")
    assert len(s) == 12 and (s.idxmax(axis=1) == "ER").all() and s[["DNA", "AGP"]].abs().max().max() < 1e-6


def test_separate_masks_leave_out_the_stains_that_do_not_matter():
    pairs, f = planted(), OneStain()
    a = attribute_pairs("InputXGradient", f, pairs, by_channel=True)
    joint, together = (dac(f, pairs, a, s, NAMES, steps=60, closing=0, blur=0).scores for s in ("joint", "aggregate"))
    assert (joint.minimal_mask < together.minimal_mask).all() and (joint.dac > together.dac).all()


def test_intervals_draw_whole_wells():
    pairs, f = planted(24), OneStain()
    r = dac(f, pairs, attribute_pairs("InputXGradient", f, pairs), steps=30)
    wells = np.arange(24) // 6
    m = r.means(wells).iloc[0]
    assert (m.units, m.n) == (4, 24) and m.low <= m.dac <= m.high and np.isclose(m.dac, r.scores.dac.mean())
    assert r.means(np.zeros(24)).low.isna().all()                       # one well: no interval
    assert set(r.means(wells, by=("label",)).label) == {0, 1}


def test_only_pairs_right_on_both_sides_count():
    pairs, f = planted(), OneStain()
    pairs.labels[:3], pairs.counterfactual_labels[:3] = 1 - pairs.labels[:3], 1 - pairs.counterfactual_labels[:3]
    a = attribute_pairs("InputXGradient", f, planted())
    r = dac(f, pairs, a, steps=20)
    assert sorted(r.scores.pair) == list(range(3, 12)) and r.transitions.kept.sum() == 9 and r.transitions.pairs.sum() == 12
    none = dac(f, pairs.subset(range(3)), a[:3], steps=20)
    assert len(none.curves) == len(none.scores) == len(none.means()) == 0 and "None of 3 pairs" in none.summary()
    assert dac(f, pairs.subset(range(3)), a[:3], steps=20, only_right=False).kept.all()


def says(contains, f):
    with pytest.raises(PcimError) as e: f()
    assert contains in str(e.value) and "\n" not in str(e.value), str(e.value)


@pytest.mark.parametrize("change,contains", [
    (dict(attributions=torch.rand(12, 3, 24, 23)), "attributions: found shape (12, 3, 24, 23), expected (12, 3, 24, 24)"),
    (dict(attributions=torch.full((12, 3, 24, 24), float("nan"))), "pair 0 holds NaN"),
    (dict(attributions=torch.zeros(12, 3, 24, 24)), "12 of 12 pairs are zero everywhere"),
    (dict(steps=577), "steps: found 577, expected at most 576"),
    (dict(steps=1), "steps: found 1"),
    (dict(blur=4), "blur: found a kernel of 4"),
    (dict(scenario="all"), "scenario: 'all' is not known"),
    (dict(split="quantiles"), "split: 'quantiles' is not known"),
    (dict(normalisation="z"), "normalisation: 'z' is not known"),
    (dict(direction="both"), "direction: 'both' is not known"),
    (dict(mode="quick"), "mode: 'quick' is not known"),
    (dict(tolerance=float("nan")), "tolerance: found nan"),
    (dict(micro_batch=0), "micro_batch: found 0"),
    (dict(channels=["a"]), "channels: 1 names for 3 channels"),
    (dict(scenario="coherent", regions=np.zeros((12, 3, 3), int)), "regions: found shape"),
    (dict(forward_func=lambda x: x.mean((1, 2, 3))), "forward_func: returned shape (12,)"),
])
def test_bad_input_is_one_sentence(change, contains):
    pairs, f = planted(), OneStain()
    given = dict(forward_func=f, pairs=pairs, attributions=attribute_pairs("InputXGradient", f, pairs), channels=NAMES) | change
    says(contains, lambda: dac(**given))


def test_classes_that_the_classifier_lacks_and_pairs_of_different_shape():
    p, f = planted(4), OneStain()
    a = torch.rand(4, 3, 24, 24)
    says("class 5, expected 0 to 1", lambda: dac(f, Pairs(range(4), p.images, p.counterfactuals, [5] * 4, [0] * 4, "x"), a))
    says("class 7, expected 0 to 1", lambda: dac(f, Pairs(range(4), p.images, p.counterfactuals, [0] * 4, [7] * 4, "x"), a))
    says("expected the same N×C×H×W", lambda: Pairs(range(4), p.images, p.counterfactuals[..., :20], [0] * 4, [1] * 4, "x"))


@pytest.mark.parametrize("scenario", NEED_CHANNELS)
def test_maps_that_cannot_tell_channels_apart_are_refused(scenario):
    f = net(2)
    pairs, _ = random_pairs(f, 3)
    a = attribute_pairs("DGradCAM", f, pairs)
    says("the same in every channel", lambda: dac(f, pairs, a, scenario, NAMES))
    says("tells channels apart", lambda: attribute_pairs("DGradCAM", f, pairs, by_channel=True))
    assert len(dac(f, pairs, a, "aggregate", NAMES, steps=20).scores) == 3


def test_coherence_knows_real_from_strange():
    g = torch.Generator().manual_seed(0)
    yy, xx = torch.meshgrid(torch.arange(32.), torch.arange(32.), indexing="ij")
    def cells(n):
        cy, cx, r = (torch.rand(n, 1, 1, generator=g) * s + o for s, o in ((8, 12), (8, 12), (4, 5)))
        blob = torch.exp(-(((yy - cy)**2 + (xx - cx)**2) / r**2))
        return torch.stack([blob, blob**2, 1 - blob], 1) * .6 + .2 + .02 * torch.randn(n, 3, 32, 32, generator=g)
    c = Coherence(cells(150))
    real, x = c.score(cells(80)), cells(30)
    assert .3 < real.coherence.mean() < .7 and .8 < real.ratio.median() < 1.25
    board = ((yy // 2 + xx // 2) % 2)
    for strange in (x.flatten(2)[..., torch.randperm(1024, generator=g)].view_as(x), board * x + (1 - board) * x.roll(1, 0), torch.stack([x[:, 0], x.roll(1, 0)[:, 1], x.roll(2, 0)[:, 2]], 1)): assert c.score(strange).coherence.mean() < .1
    mixed = [c.score((1 - t) * x + t * x.roll(1, 0)).ratio.mean() for t in (0, .15, .5)]
    assert mixed[0] < mixed[2] and mixed[1] < mixed[2]
    says("found 3 real images", lambda: Coherence(x[:3]))


def test_comparison_counts_only_pairs_that_count():
    pairs, f = planted(24), OneStain()
    pairs.labels[:4], pairs.counterfactual_labels[:4] = 1 - pairs.labels[:4], 1 - pairs.counterfactual_labels[:4]
    a = attribute_pairs("InputXGradient", f, planted(24))
    c = compare_scenarios(f, pairs, a, Coherence(planted(60, 1).images), channels=NAMES, units=np.arange(24) // 4, steps=40, closing=3, blur=3)
    assert (c.table.pairs == 20).all() and (c.table.units == 5).all() and list(c.table.scenario) == ["aggregate", "joint", "per_channel", "coherent"] and set(c.along.pair) == set(range(4, 24))
    assert np.isclose(c.table.dac_gain[1], c.table.dac[1] - c.table.dac[0]) and c.table.coherence.between(0, 1).all()


def test_similarity_share_and_area_say_what_was_put_in():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20, 3, 20, 20, generator=g)
    a[:, 2] = 3 * a[:, 0]
    s = map_similarity(a, NAMES, n_permutations=200).set_index(["channel", "other"])
    assert np.isclose(s.rho["DNA", "AGP"], 1) and np.isclose(s.overlap["DNA", "AGP"], 1) and s.p_rho["DNA", "AGP"] < .01 and abs(s.rho["DNA", "ER"]) < .05 and s.p_rho["DNA", "ER"] > .01
    shares, p = share_test(a, NAMES)
    np.testing.assert_allclose(shares.share, [.2, .2, .6], atol=.02)
    assert p < .01
    areas = area_shares(a, NAMES, (.05, 1.), closing=0).pivot(index="size", columns="channel", values="share")
    assert areas.loc[.05, "AGP"] > .8 and np.allclose(areas.loc[1.], 1 / 3)


def test_sweep_measures_masks_against_the_truth():
    pairs, f = planted(8), OneStain()
    a = torch.zeros_like(pairs.images)
    a[:, 1, :16] = torch.rand(8, 16, 24) + .1
    truth = torch.zeros(8, 1, 24, 24, dtype=torch.bool)
    truth[:, :, :16] = True
    s = smoothing_sweep(f, pairs, a, truth, (0, 3), (0, 5), channels=NAMES, mode="exact").set_index(["closing", "blur"])
    assert len(s) == 4 and (s.pairs == 8).all() and s.precision[0, 0] > .95 and s.minimal_mask[0, 5] >= s.minimal_mask[0, 0] - 1e-9
    says("truth: found shape", lambda: smoothing_sweep(f, pairs, a, truth[:4]))


def test_slider_is_small_and_ends_in_the_image():
    pairs, f = planted(2), OneStain()
    fig = mask_slider(pairs, attribute_pairs("InputXGradient", f, pairs), 1, NAMES, f, n=8, classes=["<b>a</b>", "b & c"])
    assert len(fig.to_json()) < 1e6 and {t.name for t in fig.data} == {"counterfactual", "hybrid", "image", "mask", "residual"}
    assert "b &amp; c" in fig.layout.title.text and fig.layout.sliders[0].steps[-1].args[1]["title.text"].startswith("100.0%")
