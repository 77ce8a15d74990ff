"Statistics between classes of wells, the channel table, and the background check."
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pcim_nb.images import ImageSet, PcimError
from pcim_nb.linking import MIN_UNITS, NO_CHANNEL, PAIRS, agreement, background_check, background_features, background_mask, cell_differences, channel_table, differences, dose_scores, trends
from pcim_nb.simulate import simulate

def table(seed=0, n=24, p=12, classes="AB", plates=3):
    rng = np.random.default_rng(seed)
    y, plate = np.resize(list(classes), n), np.repeat([f"P{i}" for i in range(plates)], n // plates)
    x = rng.normal(size=(n, p)) + 4 * rng.normal(size=(plates, p))[np.repeat(np.arange(plates), n // plates)]
    cols = [f"Cells_Intensity_F{i}_{'DNA' if i % 2 else 'ER'}" for i in range(p - 2)] + ["Cells_AreaShape_Area", "Cells_Correlation_K_DNA_ER"]
    return pd.concat([pd.DataFrame({"Metadata_Class": y, "Metadata_Plate": plate}), pd.DataFrame(x, columns=cols)], axis=1)

NUMBERS = ["difference", "g", "g_low", "g_high", "t", "df", "p", "q"]

@pytest.mark.parametrize("plates", [None, "Metadata_Plate"])
def test_rows_units_and_sides_may_be_exchanged(plates):
    t = table()
    d = differences(t, plates=plates)
    shuffled = differences(t.sample(frac=1, random_state=0), plates=plates)
    np.testing.assert_allclose(d[NUMBERS], shuffled[NUMBERS])
    swapped = differences(t, plates=plates, control="B")
    np.testing.assert_allclose(swapped[["difference", "g", "t"]], -d[["difference", "g", "t"]])
    np.testing.assert_allclose(swapped[["p", "q", "df"]], d[["p", "q", "df"]])
    np.testing.assert_allclose(swapped.g_low, -d.g_high)
    scaled = t.copy()
    scaled.iloc[:, 2:] = 1000 * t.iloc[:, 2:] + 5
    np.testing.assert_allclose(differences(scaled, plates=plates)[["g", "p", "q"]], d[["g", "p", "q"]])

def test_moving_a_plate_changes_nothing_within_plates():
    t = table()
    moved = t.copy()
    moved.iloc[:, 2:] += 100 * (t.Metadata_Plate == "P1").to_numpy()[:, None]
    np.testing.assert_allclose(differences(moved, plates="Metadata_Plate")[NUMBERS], differences(t, plates="Metadata_Plate")[NUMBERS], rtol=1e-6)
    assert not np.allclose(differences(moved)["p"], differences(t)["p"])

@pytest.mark.parametrize("plates", [None, "Metadata_Plate"])
def test_missing_units_count_feature_by_feature(plates):
    t = table()
    t.loc[[0, 5, 7], "Cells_AreaShape_Area"] = np.nan
    t.loc[3, "Cells_Intensity_F0_ER"] = np.inf
    d = differences(t, plates=plates).set_index("feature")
    alone = differences(t.drop(index=[0, 5, 7]), plates=plates).set_index("feature")
    np.testing.assert_allclose(d.loc["Cells_AreaShape_Area", NUMBERS[:-1]].astype(float), alone.loc["Cells_AreaShape_Area", NUMBERS[:-1]].astype(float))
    assert d.loc["Cells_AreaShape_Area", ["n", "n_reference"]].sum() == 21 and d.loc["Cells_Intensity_F0_ER", ["n", "n_reference"]].sum() == 23

def test_several_classes_against_a_control_are_its_pairs():
    t = table(classes="ABC", n=27)
    d = differences(t, control="A", plates="Metadata_Plate")
    assert d.contrast.unique().tolist() == ["B vs A", "C vs A"] and d.attrs["n_tests"] == 24
    pair = differences(t[t.Metadata_Class != "C"], control="A", plates="Metadata_Plate")
    np.testing.assert_allclose(d[d.contrast == "B vs A"][NUMBERS[:-1]], pair[NUMBERS[:-1]])
    np.testing.assert_allclose(d.q, stats.false_discovery_control(d.p))  # corrected over all 24, not each 12

def test_constant_features_and_never_measured_ones_have_no_p():
    t = table().assign(Cells_Intensity_Flat_DNA=7.0, Cells_Intensity_Step_DNA=lambda t: (t.Metadata_Class == "A") * 1.0, Cells_Intensity_Never_DNA=np.nan)
    for plates in (None, "Metadata_Plate"):
        d = differences(t, plates=plates).set_index("feature")
        lost = ["Cells_Intensity_Flat_DNA", "Cells_Intensity_Step_DNA", "Cells_Intensity_Never_DNA"]
        assert d.loc[lost, ["g", "p", "q"]].isna().all().all() and d.attrs["n_tests"] == 12
        assert d.note["Cells_Intensity_Never_DNA"]

def test_few_units_get_effects_only():
    t = table(n=24)
    for n in (2, MIN_UNITS):
        d = differences(t.groupby("Metadata_Class").head(n))
        assert d.g.notna().all() and d.p.notna().all() == (n >= MIN_UNITS) and (d.attrs["notes"] == []) == (n >= MIN_UNITS)
    with pytest.raises(PcimError, match="one unit in each class"): differences(t.groupby("Metadata_Class").head(1))

@pytest.mark.parametrize("call, message", [
    (lambda t: differences(t, "Metadata_Dose"), "Metadata_Dose"), (lambda t: differences(t, ["A"] * 3), "3 values for 24"), (lambda t: differences(t, control="Z"), "'Z'"),
    (lambda t: differences(t[["Metadata_Class"]]), "no features"), (lambda t: differences(t, plates="Metadata_Batch"), "Metadata_Batch")])
def test_bad_tables_are_refused(call, message):
    with pytest.raises(PcimError, match=message): call(table())

def test_false_discoveries_and_intervals_hold_with_plate_effects():
    "300 experiments with 3 wells a class on each of 3 plates, unbalanced in one; 5 of 50 features differ by 3 SD."
    wrong, null, covered = [], [], []
    plate = np.repeat([0, 1, 2], 6)
    y = np.array(list("AAABBB" "AABBBB" "AAABBB"))
    for seed in range(300):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(18, 50)) + 5 * rng.normal(size=(3, 50))[plate]
        x[y == "B", :5] += 3
        d = differences(pd.DataFrame(x, columns=[f"Cells_Intensity_F{i}_DNA" for i in range(50)]), y, plate)
        hit = (d.q < .05).to_numpy()
        wrong.append(hit[5:].sum() / max(hit.sum(), 1)); null.append(d.p[5:]); covered.append(((d.g_low <= 3) & (3 <= d.g_high))[:5].mean())
    null = np.concatenate(null)
    assert np.mean(wrong) < 0.06 and 0.93 < np.mean(covered) < 0.97
    assert stats.kstest(null, "uniform").statistic < 0.02

def test_channel_table_counts_every_feature_once():
    t = table(n=24)
    t.loc[t.Metadata_Class == "B", [c for c in t if c.endswith("_ER") and "Intensity" in c]] += 6
    d = differences(t, plates="Metadata_Plate", control="A")
    shares = np.tile([0.2, 0.8], (24, 1)) + np.random.default_rng(0).normal(0, .05, (24, 1)) * [1, -1]
    c = channel_table(shares, d, ["DNA", "ER"], units=np.repeat(np.arange(8), 3))
    assert c.channel.tolist() == ["DNA", "ER", PAIRS, NO_CHANNEL] and c.features.tolist() == [5, 5, 1, 1] and c.attrs["n_units"] == 8
    assert c.differ[1] == 5 and c.fraction[1] == 1 and c.top_feature[1].endswith("_ER")
    assert (c.share_low[:2] < c.share[:2]).all() and (c.share[:2] < c.share_high[:2]).all() and c.share[2:].isna().all()
    # unequal numbers of images a unit: units weigh the same
    s = np.array([[1, 0]] * 9 + [[0, 1]])
    assert channel_table(s, d, ["DNA", "ER"], units=[0] * 9 + [1]).share[0] == pytest.approx(0.5)
    untested = channel_table(shares, differences(t.groupby("Metadata_Class").head(2)), ["DNA", "ER"])
    assert untested.differ.isna().all() and untested.median_g.notna().all()
    with pytest.raises(PcimError, match="contrast"): channel_table(shares, d, ["DNA", "ER"], contrast="C vs A")
    one = channel_table(np.ones((4, 1)), d, ["ER"])
    assert "One channel" in agreement(one).sentence

def test_agreement_is_uniform_by_chance_and_finds_order():
    rng = np.random.default_rng(0)
    ps = [agreement(pd.DataFrame({"channel": list("abcde"), "share": rng.random(5), "fraction": rng.random(5), "differ": 1})).p for _ in range(400)]
    assert np.mean(np.array(ps) <= .05) < .08 and .45 < np.mean(ps) < .58
    many = pd.DataFrame({"channel": list("abcdefghij"), "share": np.arange(10.), "fraction": np.arange(10.) ** 2, "differ": 1})
    assert agreement(many).rho == pytest.approx(1) and agreement(many).p < .001 and agreement(many) == agreement(many)
    with pytest.raises(PcimError, match="evidence"): agreement(many, "p")

def fields(seed=0, n=40, bright=0.0, groups=8, size=32):
    "Fields with one object in the middle; class 1 is brighter by `bright` outside it."
    rng = np.random.default_rng(seed)
    y = np.tile([0, 1], n // 2)
    obj = np.zeros((n, size, size), np.int32)
    obj[:, 10:22, 10:22] = 1
    x = 0.3 + 0.02 * rng.standard_normal((n, 2, size, size)) + 0.02 * rng.standard_normal((n, 2, 1, 1))
    x[:, 1] += bright * y[:, None, None] * (obj == 0)
    x += 0.4 * (y[:, None, None] * obj)[:, None]  # the object itself tells the class
    g = np.repeat(np.arange(groups), n // groups)
    return ImageSet(np.clip(x, 0, 1).astype(np.float32), ["DNA", "ER"], y, ["control", "treated"], pd.DataFrame({"Metadata_Plate": g, "Metadata_Well": np.arange(n)}), "Metadata_Plate", "Metadata_Well",
                    objects={"Cells": obj})

def test_background_ignores_what_objects_say():
    honest, cheat = background_check(fields()), background_check(fields(bright=0.1))
    assert not honest.predicts and "No sign" in honest.verdict
    assert cheat.predicts and cheat.auc > .95 and cheat.table.loc[cheat.table.auc.idxmax(), "channel"] == "ER" and "of ER" in cheat.verdict
    s = fields(bright=0.1)
    inside = ~np.stack([background_mask(s, i) for i in range(len(s))])
    s.images = np.where(inside[:, None], np.random.default_rng(0).random(s.images.shape), s.images).astype(np.float32)
    np.testing.assert_array_equal(background_check(s).scores, cheat.scores)
    assert background_check(s).p == cheat.p  # seeded

def test_background_mask_keeps_its_distance():
    s = fields()
    for d in (0, 3, 7):
        m = background_mask(s, 0, d)
        y, x = np.nonzero(m)
        assert np.hypot(np.maximum(np.maximum(10 - y, y - 21), 0), np.maximum(np.maximum(10 - x, x - 21), 0)).min() > d
    assert background_mask(s, 0, 0).sum() == 32 * 32 - 144
    f = background_features(np.full((2, 32, 32), 0.25), background_mask(s, 0))
    np.testing.assert_allclose(f[:, [0, 2, 6, 8]], 0.25); np.testing.assert_allclose(f[:, 1], 0, atol=1e-9); np.testing.assert_allclose(f[:, -16:], 1)
    assert np.isnan(background_features(np.zeros((2, 8, 8)), np.zeros((8, 8), bool))).all()

def test_background_falls_back_to_units_and_leaves_out_covered_images():
    s = fields(bright=0.1, groups=1)
    c = background_check(s, n_permutations=50)
    assert c.split_by == "Metadata_Well" and c.predicts
    s.objects["Cells"][:3] = 1
    part = background_check(s, n_permutations=50)
    assert part.n_images == 37 and np.isnan(part.scores[:3]).all() and np.isfinite(part.scores[3:]).all()
    s.objects["Cells"][:] = 1
    with pytest.raises(PcimError, match="0 of 40 images"): background_check(s)
    with pytest.raises(PcimError, match="one class only"): background_check(fields(), idx=np.arange(0, 40, 2))
    with pytest.raises(PcimError, match="has one Metadata_Well only"): background_check(fields(), idx=[0, 1, 2, 4, 6])

def test_simulated_shortcuts_are_seen():
    kw = dict(n_plates=3, wells_per_class=3, cells_per_well=3, seed=3)
    assert background_check(simulate(["mito_texture", "agp_granules"], shortcut="corner", **kw), n_permutations=60).predicts
    assert not background_check(simulate(["mito_texture", "agp_granules"], **kw), n_permutations=60).predicts

def cells_of_wells(seed, n_wells=12, m=20, icc=0.3, p=40):
    rng = np.random.default_rng(seed)
    x = np.repeat(np.sqrt(icc) * rng.normal(size=(n_wells, p)), m, 0) + np.sqrt(1 - icc) * rng.normal(size=(n_wells * m, p))
    return pd.DataFrame(x, columns=[f"Cells_Intensity_F{i}_DNA" for i in range(p)]).assign(Metadata_Unit=np.repeat(np.arange(n_wells), m).astype(str), Metadata_Class=np.repeat(np.tile(["A", "B"], n_wells // 2), m))

def test_counting_cells_says_what_it_ignores():
    runs = [cell_differences(cells_of_wells(k)) for k in range(20)]
    icc, deff = np.mean([r.icc.mean() for r in runs]), np.mean([r.design_effect.mean() for r in runs])
    assert icc == pytest.approx(.3, abs=.05) and deff == pytest.approx(1 + 19 * .3, rel=.15)
    assert np.mean([(r.p < .05).mean() for r in runs]) > .2  # the reason for the warning: nothing differs here
    assert all("240 cells of 12 wells" in r.attrs["ignores"] and r.attrs["ignores"] in r.attrs["notes"] and r.note.eq("cells counted as independent observations").all() for r in runs)
    pd.testing.assert_frame_equal(runs[0][NUMBERS], differences(cells_of_wells(0))[NUMBERS])
    one = cell_differences(cells_of_wells(0)[lambda t: t.Metadata_Unit.isin(["0", "1"])])
    assert one.icc.isna().all() and "cannot be estimated" in one.attrs["ignores"]
    with pytest.raises(PcimError, match="no column 'Metadata_Unit'"): cell_differences(cells_of_wells(0).drop(columns="Metadata_Unit"))

def test_trends_are_those_of_a_plain_loop_and_hold_their_level():
    rng = np.random.default_rng(0)
    dose, plate = np.tile(np.repeat([0, 1, 10], 3), 3), np.repeat([0, 1, 2], 9)
    x = rng.normal(size=(27, 300)) + 5 * rng.normal(size=(3, 300))[plate]
    x[4, 7] = np.nan
    t = trends(pd.DataFrame(x, columns=[f"Cells_Intensity_F{i}_DNA" for i in range(300)]), dose, plate)
    for f in (0, 7):
        ok = np.isfinite(x[:, f])
        ranks = np.concatenate([stats.rankdata(x[ok & (plate == q), f]) for q in range(3)])
        steps, code = np.searchsorted([.5, 5], dose[ok]).astype(float), plate[ok]
        def within(v, code=code): return v - np.array([v[code == q].mean() for q in range(3)])[code]
        r = np.corrcoef(within(ranks), within(steps))[0, 1]
        assert t.r[f] == pytest.approx(r) and t.df[f] == ok.sum() - 4 and t.n[f] == ok.sum()
        assert t.p[f] == pytest.approx(2 * stats.t.sf(abs(r) * np.sqrt(t.df[f] / (1 - r * r)), t.df[f]))
    assert stats.kstest(t.p, "uniform").statistic < .09 and not (t.q < .05).any() and ((t.r_low <= t.r) & (t.r <= t.r_high)).all()
    y = rng.normal(size=(27, 1)) * .3 + np.searchsorted([.5, 5], dose)[:, None] * 2 + 100 * plate[:, None]
    up = trends(pd.DataFrame(y, columns=["Cells_Intensity_M_DNA"]), dose, plate)
    assert up.p[0] < 1e-6 and up.slope[0] == pytest.approx(2, abs=.2) and up.g[0] > 5
    assert trends(pd.DataFrame(-y, columns=["Cells_Intensity_M_DNA"]), dose, plate).r[0] == pytest.approx(-up.r[0])

def test_doses_that_are_no_trend_are_refused():
    t = table(n=24)
    assert dose_scores(["lo", "hi", "mid"], ["lo", "mid", "hi"]).tolist() == [0, 2, 1] and dose_scores([10, .1, 1, 10]).tolist() == [2, 0, 1, 2]
    for dose, kw, message in (([1, 2] * 12, {}, "at least 3"), (list("abc") * 8, {}, "not a number"), (list("abc") * 8, {"levels": ["a", "b"]}, "none of the levels"), ([1, 2, 3], {}, "3 values for 24"),
                              (np.repeat([1, 2, 3], 8), {"plates": np.repeat([1, 2, 3], 8)}, "cannot be told apart"), ("Metadata_Dose", {}, "Metadata_Dose")):
        with pytest.raises(PcimError, match=message): trends(t, dose, **kw)
    few = trends(t[:5], [1, 2, 3, 4, 5], np.array([0, 0, 0, 1, 1]))
    assert few.p.isna().all() and few.r.notna().all() and few.attrs["notes"]
    flat = trends(t.assign(Cells_Intensity_Flat_DNA=1., Cells_Intensity_Never_DNA=np.nan), np.tile([1, 2, 3], 8)).set_index("feature")
    assert flat.loc[["Cells_Intensity_Flat_DNA", "Cells_Intensity_Never_DNA"], ["r", "p"]].isna().all().all()
