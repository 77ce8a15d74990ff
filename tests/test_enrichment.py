"Enrichment, association, prediction and the agreement score: planted truths, invariants, calibration, refusals."
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pcim_nb.association import agreement_score, association, predict_score
from pcim_nb.enrichment import COUNTS, enrichment, feature_groups, shuffles, unit_z
from pcim_nb.images import PcimError
from pcim_nb.link_plots import channel_family_map, chance_plot, feature_cells, sankey, top_features
from pcim_nb.linking import NO_CHANNEL, PAIRS
from pcim_nb.profiles import feature_table

CH = ["DNA", "RNA", "ER", "AGP", "Mito"]

def wells(seed=0, shift=None, size=1.5, plates=3, k=3, per=24, plate_sd=3, shape=15, spread=1.0):
    """Wells of two classes. A channel's features share a factor; `shift`: the channels (or 'shape') whose features move by `size` standard deviations."""
    rng = np.random.default_rng(seed)
    n = plates * 2 * k
    y = np.tile(np.repeat(["control", "treated"], k), plates)
    plate = np.repeat([f"P{i}" for i in range(plates)], 2 * k)
    cols, x = [], []
    for c in [*CH, None]:
        f = shape if c is None else per
        block = .8 * rng.normal(size=(n, 1)) + rng.normal(size=(n, f)) + np.repeat(plate_sd * rng.normal(size=(plates, f)), 2 * k, 0)
        if (c or "shape") in (shift or []): block += size * (y == "treated")[:, None] * rng.choice([-1, 1], f) * spread
        x.append(block)
        cols += [f"Cells_AreaShape_F{i}" for i in range(f)] if c is None else [f"{('Cells', 'Nuclei')[i % 2]}_Intensity_F{i}_{c}" if i % 3 else f"Cells_Texture_Contrast_{c}_{i}_00_256" for i in range(f)]
    meta = pd.DataFrame({"Metadata_Class": y, "Metadata_Plate": plate, "Metadata_Unit": [f"{p}/{i}" for i, p in enumerate(plate)]})
    return pd.concat([meta, pd.DataFrame(np.hstack(x), columns=cols)], axis=1)

def test(t, **kw): return enrichment(t, CH, plates="Metadata_Plate", control="control", n_permutations=kw.pop("n_permutations", 300), **kw)
test.__test__ = False

@pytest.mark.parametrize("shift", [["ER"], ["Mito"], ["DNA", "RNA"], ["shape"]])
def test_planted_channels_are_found(shift):
    hits = 0
    for seed in range(8):
        e = test(wells(seed, shift, 2.5))
        hits += set(e.links) == {NO_CHANNEL if c == "shape" else c for c in shift}
        assert e.most in (NO_CHANNEL if "shape" in shift else shift)
    assert hits >= 6  # a further group may come along in 5 % of sets

def test_a_channel_no_stronger_than_shape_may_follow_from_it():
    e = test(wells(1, ["shape", "ER"], 2.5))
    t = e.table.set_index("group")
    assert NO_CHANNEL in e.links and (t.from_shape["ER"] or t.excess["ER"] > 1.2 * t.excess[NO_CHANNEL])
    weak = wells(1, ["shape"], 4)
    er = [c for c in weak if c.endswith("_ER") or "_ER_" in c]
    weak.loc[weak.Metadata_Class == "treated", er] += 2
    e = test(weak)
    assert e.table.set_index("group").from_shape["ER"] and "ER" not in e.links and "may follow from it" in e.verdict

def test_nothing_depends_on_order_units_or_plates():
    t = wells(3, ["ER"])
    e = test(t)
    moved = t.copy()
    cols = [c for c in t if not c.startswith("Metadata")]
    moved[cols] = 7 * t[cols] + 50 * (t.Metadata_Plate == "P1").to_numpy()[:, None]
    pd.testing.assert_frame_equal(test(moved).table, e.table)
    turned = t[[*[c for c in t if c.startswith("Metadata")], *cols[::-1]]]
    pd.testing.assert_frame_equal(test(turned).table[["group", "strength", "p_adjusted"]], e.table[["group", "strength", "p_adjusted"]])
    pd.testing.assert_frame_equal(test(t).table, e.table)
    swapped = enrichment(t, CH, plates="Metadata_Plate", treated="control", control="treated", n_permutations=300)
    np.testing.assert_allclose(swapped.table.strength, e.table.strength)
    np.testing.assert_allclose(swapped.features.z, -e.features.z)

def test_more_copies_of_a_feature_are_no_more_evidence():
    "A channel with one feature a hundred times over is not significant by their number: it is as significant as with ten."
    ps = []
    for seed in range(40):
        t = wells(seed, per=6, shape=6)
        one = t[next(c for c in t if c.endswith("_ER"))]
        few, many = (pd.concat([t, pd.DataFrame({f"Cells_Intensity_Copy{i}_ER": one for i in range(k)})], axis=1) for k in (10, 100))
        ps.append((test(few, n_permutations=99).table.set_index("group").p["ER"], test(many, n_permutations=99).table.set_index("group").p["ER"]))
    ps = np.array(ps)
    assert (ps < .05).mean(0).max() <= .15 and np.abs(np.diff(ps)).mean() < .15

def test_pvalues_are_uniform_and_links_rare_without_effect():
    runs = [test(wells(seed, per=12, shape=8), n_permutations=199, seed=seed) for seed in range(200)]
    p, best = np.array([r.table.p for r in runs]), np.array([r.table.p_adjusted.min() for r in runs])
    assert all(stats.kstest(c, "uniform").pvalue > .001 for c in p.T) and stats.kstest(best, "uniform").pvalue > .001
    assert np.mean([len(r.links) > 0 for r in runs]) <= .05
    scores = np.array([agreement_score(r, np.random.default_rng(k).dirichlet(np.ones(5), 4), max_jackknife=3).p for k, r in enumerate(runs)])
    assert stats.kstest(scores, "uniform").pvalue > .001

def test_shuffles_are_exact_where_few_and_bounded():
    y, plate = np.array([0, 0, 1, 1, 0, 1, 1]), np.array([0, 0, 0, 0, 1, 1, 1])
    s = shuffles(y, plate)
    assert s.exact and s.n_distinct == 18 == len({tuple(v) for v in s.labels}) and s.min_p == 1 / 18  # unequal: no mirror image
    assert (s.labels[:, :4].sum(1) == 2).all() and (s.labels[:, 4:].sum(1) == 2).all()
    assert shuffles(np.tile([0, 1], 4), np.repeat([0, 1], 4)).min_p == 2 / 36
    e = enrichment(wells(0, ["ER"], 4, plates=1, k=4), CH, control="control")
    assert e.exact and e.n_shuffles == 70 and e.table.p_adjusted.min() == pytest.approx(2 / 70) and "No p below" in e.verdict

@pytest.mark.parametrize("change, message", [
    (lambda t: t.groupby("Metadata_Class").head(1), "1 unit in treated"),
    (lambda t: t[t.Metadata_Plate == "P0"], "20 ways only"),
    (lambda t: t.assign(Metadata_Plate=t.Metadata_Class), "cannot be told apart"),
    (lambda t: t[t.Metadata_Class == "control"], "one class only"),
    (lambda t: t.assign(**{c: np.nan for c in t if not c.startswith("Metadata")}), "missing in some well"),
    (lambda t: t.assign(**{c: 1. for c in t if not c.startswith("Metadata")}), "no feature varies"),
    (lambda t: t[[c for c in t if c.startswith("Metadata") or "_ER" in c]], "two or more to compare"),
    (lambda t: t[[c for c in t if c.startswith("Metadata")]], "no features"),
    (lambda t: t.drop(columns="Metadata_Plate"), "Metadata_Plate")])
def test_tables_that_say_nothing_are_refused(change, message):
    with pytest.raises(PcimError, match=message) as e: test(change(wells()))
    assert "\n" not in str(e.value)

def test_incomplete_and_constant_features_are_left_out_and_counted():
    t = wells(0, ["ER"], 3)
    er = [c for c in t if c.endswith("_ER") or "_ER_" in c]
    t.loc[0, er[0]], t[er[1]] = np.nan, 5.
    e = test(t)
    assert {er[0], er[1]}.isdisjoint(e.features.feature) and e.table.set_index("group").features["ER"] == len(er) - 2 and len(e.notes) == 2 and e.most == "ER"
    lone = t.assign(Metadata_Plate=np.where(np.arange(len(t)) == 0, "P9", t.Metadata_Plate))
    assert any("one side only" in n for n in test(lone).notes)

def test_pairs_and_counts_stand_apart():
    about = feature_table(["Cells_Correlation_K_DNA_ER", "Cells_Children_Dots_Count", "Cells_AreaShape_Area", "Cells_Intensity_M_ER", "own_score"], CH)
    assert feature_groups(about, CH).tolist() == [PAIRS, COUNTS, NO_CHANNEL, "ER", NO_CHANNEL]
    assert feature_groups(about, CH, "channel and family")[3] == "ER · Intensity"
    t = wells(2).assign(**{f"Cells_Correlation_F{i}_DNA_ER": lambda d: (d.Metadata_Class == "treated") * 5. + np.random.default_rng(0).normal(size=len(d)) for i in range(6)})
    row = test(t).table.set_index("group").loc[PAIRS]
    assert not row.competes and np.isnan(row.p_adjusted) and not row.link

def test_a_z_is_that_of_a_linear_model():
    rng = np.random.default_rng(0)
    x, y, plate = rng.normal(size=(14, 4)), rng.permutation(np.repeat([0., 1], 7)), np.repeat([0, 1], 7)
    design = np.column_stack([plate == 0, plate == 1, y]).astype(float)
    for f in range(4):
        b, rss, *_ = np.linalg.lstsq(design, x[:, f], rcond=None)
        t = b[2] / np.sqrt(rss[0] / 11 * np.linalg.inv(design.T @ design)[2, 2])
        assert unit_z(x, y[None], plate)[0, f] == pytest.approx(stats.norm.isf(stats.t.sf(abs(t), 11)), rel=1e-9)

def test_dose_finds_the_channel_that_rises():
    t = wells(5, plates=2, k=4, plate_sd=3).drop(columns="Metadata_Class")
    dose = np.tile([0, .1, 1, 10], 4)
    er = [c for c in t if c.endswith("_ER") or "_ER_" in c]
    t[er] = t[er].add(np.searchsorted([.05, .5, 5], dose) ** 2, axis=0)
    e = enrichment(t, CH, dose=dose, plates="Metadata_Plate", n_permutations=300)
    assert e.links == ("ER",) and e.contrast == "trend over dose"
    with pytest.raises(PcimError, match="at least 3"): enrichment(t, CH, dose=np.tile([0, 1], 8), plates="Metadata_Plate")

def test_agreement_says_agree_and_disagree():
    t = wells(4, ["ER"], 3)
    e = test(t)
    u = t.Metadata_Unit[t.Metadata_Class == "treated"].to_numpy()
    rng = np.random.default_rng(0)
    def at(c, weight=.4): return rng.dirichlet(np.full(5, 20), len(u)) * (1 - weight) + weight * (np.array(CH) == c)
    right, wrong = agreement_score(e, at("ER"), u), agreement_score(e, at("DNA"), u)
    assert right.status == "agree" and right.low < right.score < right.high and right.p < .05 and right.score > .8
    assert wrong.status == "disagree" and wrong.score < 0 and wrong.sentence.startswith("Attribution and features disagree") and "DNA" in wrong.sentence and "ER" in wrong.sentence
    assert agreement_score(test(wells(8)), at("ER"), u).status in ("no evidence", "disagree", "undecided")
    assert agreement_score(test(wells(4, ["shape"], 3)), at("ER"), u).status == "shape"
    with pytest.raises(PcimError, match="no row is finite"): agreement_score(e, np.full((3, 5), np.nan))
    with pytest.raises(PcimError, match="units: 2 values"): agreement_score(e, at("ER"), ["a", "b"])

def cells(seed=0, n_wells=12, m=8, effect=1.5):
    "Cells with features by channel; the ER share goes with a factor of the ER features."
    rng = np.random.default_rng(seed)
    n, well = n_wells * m, np.repeat(np.arange(n_wells), m)
    factor = rng.normal(size=(n, 5))
    x = np.hstack([np.repeat(2 * rng.normal(size=(n_wells, 15)), m, 0) + factor[:, [c]] + .7 * rng.normal(size=(n, 15)) for c in range(5)])
    raw = np.exp(.3 * rng.normal(size=(n, 5)) + effect * .3 * factor * (np.arange(5) == 2))
    p = pd.DataFrame(x, columns=[f"Cells_Intensity_F{i}_{c}" for c in CH for i in range(15)]).assign(Metadata_Unit=well.astype(str), Metadata_Plate=(well % 3).astype(str))
    return p, raw / raw.sum(1, keepdims=True), factor

def test_association_finds_the_own_channel_and_holds_its_level():
    p, s, _ = cells()
    a = association(p, s, CH, n_permutations=200)
    assert a.channels.channel[a.channels.link].tolist() == ["ER"] and a.channels.own_features[2] >= 12
    turned = association(p.sample(frac=1, random_state=1), pd.DataFrame(s, columns=CH).sample(frac=1, random_state=1), CH, n_permutations=20).table
    np.testing.assert_allclose(turned.r, a.table.r, atol=1e-5)
    none = [association(*cells(k, effect=0)[:2], CH, n_permutations=99, seed=k) for k in range(60)]
    assert np.mean([(x.table.q < .05).any() for x in none]) <= .1 and np.mean([x.channels.link.any() for x in none]) <= .12

def test_wells_that_differ_in_sign_are_no_association():
    "The ER share rises with ER in half of the wells and falls in the other: many cells, no consistent association."
    p, s, factor = cells(3, n_wells=10, m=30, effect=0)
    sign = np.where(p.Metadata_Unit.astype(int) % 2, 1, -1)
    raw = np.exp(.2 * np.random.default_rng(0).normal(size=s.shape))
    raw[:, 2] *= np.exp(factor[:, 2] * sign)
    a = association(p, raw / raw.sum(1, keepdims=True), CH, n_permutations=20)
    assert not ((a.table.q < .05) & a.table.own & (a.table.channel == "ER")).any()

def test_prediction_generalises_or_says_no():
    p, s, factor = cells(1, m=12)
    score = 3 * p[[c for c in p if c.endswith("_ER")]].mean(axis=1).to_numpy() + np.random.default_rng(0).normal(0, .5, len(p))
    r = predict_score(p, score, CH, groups="Metadata_Plate", shares=s.mean(0), n_permutations=50)
    t = r.table.set_index("channel")
    assert t.r2.loc[CH].idxmax() == "ER" and t.r2["ER"] > .9 and t.p["ER"] < .05 and r.scores.shape == (len(p), 6) and r.n_splits == 3 and NO_CHANNEL not in t.index
    memory = np.random.default_rng(1).normal(size=12)[p.Metadata_Unit.astype(int)] * 3  # the well's own number: nothing to learn
    assert predict_score(p, memory, CH, n_permutations=50).table.r2.max() < .3

def test_pictures_hold_what_the_tables_say():
    t = wells(4, ["ER"], 3)
    e = test(t)
    a = agreement_score(e, np.tile([.1, .1, .6, .1, .1], (9, 1)) + np.random.default_rng(0).normal(0, .01, (9, 5)))
    s = sankey(e, a).data[0]
    labels = list(s.node.label)
    into = {labels[b]: v for x, b, v in zip(s.link.source, s.link.target, s.link.value) if labels[x] == "attribution"}
    assert max(into, key=into.get) == "ER" and abs(sum(into.values()) - 1) < .01
    fig = channel_family_map(e, a)
    assert any("ER ●" in x.get_text() for x in fig.axes[0].get_yticklabels())
    assert len(chance_plot(e, a).axes) == 2
    best = top_features(e, 3)
    assert all("_ER" in b for b in best)
    images = np.random.default_rng(0).random((len(t), 5, 20, 24)).astype(np.float32)
    fig = feature_cells(images, images - .5, t, best[:2], CH, n=2)
    assert len(fig.axes) == 16
