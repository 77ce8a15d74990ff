"PCIM's three solvers: against plain loops and other programs, with hostile input, and the memory that they need."
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import nn

from pcim_nb.amortised import AmortisedPCIM, MixingNetwork, distil, load_mixing, rank_votes, save_mixing, train_mixing
from pcim_nb.attribution import METHODS, all_methods, contrast, make
from pcim_nb.blackbox import BlackBoxPCIM
from pcim_nb.images import PcimError
from pcim_nb.fidelity import insertion_auc
from pcim_nb.pcim import PCIM, area_path, mix, pooled, project

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Spot(nn.Module):
    "Scores: brightness of the left half in channel 0, of the right half in channel 1, and their sum."
    def __init__(self): super().__init__(); self.gain = nn.Parameter(torch.tensor(4.0))
    def forward(self, x):
        h = x.shape[-1] // 2
        a, b = x[:, 0, :, :h].mean((1, 2)), x[:, 1, :, h:].mean((1, 2))
        return self.gain * torch.stack([a, b, a + b], 1)


def images(n=3, size=32, channels=2, seed=0): return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_mixture_is_the_sum_over_isolated_pixels(channels):
    x, b = images(1, 5, channels), images(1, 5, channels, 1)
    alpha = images(1, 5, channels, 2)
    total = b.clone()
    for c in range(channels):
        for i in range(5):
            for j in range(5):
                keep = torch.zeros_like(x)
                keep[0, c, i, j] = 1
                total = total + alpha[0, c, i, j] * (torch.where(keep > 0, x, b) - b)
    assert torch.allclose(mix(x, b, alpha), total, atol=1e-6)


def test_weights_keep_the_area_and_the_order():
    theta = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)) * 20
    for area in (0.9, 0.3, 0.004):
        w = project(theta, area)
        assert torch.allclose(w.mean((1, 2, 3)), torch.full((2,), area), rtol=1e-3)
        assert ((w.flatten(1)[:, 1:] >= w.flatten(1)[:, :-1]) | (theta.flatten(1)[:, 1:] < theta.flatten(1)[:, :-1])).all()


@pytest.mark.parametrize("solver", [lambda f: PCIM(f, "channel_pixel"), lambda f: BlackBoxPCIM(f, "channel_pixel", budget=800)])
def test_map_points_to_channel_and_half_of_the_target(solver):
    x = images() + 0.5
    for target, channel, left in ((0, 0, True), (1, 1, False)):
        a = solver(Spot()).attribute(x, target, 0.0).clamp(min=0)
        half = a[:, channel, :, :16] if left else a[:, channel, :, 16:]
        assert (half.sum((1, 2)) / a.sum((1, 2, 3)) > 0.9).all()


@pytest.mark.parametrize("solver", [lambda f: PCIM(f, "channel_pixel"), lambda f: BlackBoxPCIM(f, "channel_pixel", budget=800)])
def test_whole_stains_are_asked_put_in_and_taken_out(solver):
    def scores(z):       # one stain suffices; both are needed; the halves of the second cancel, so the first alone moves the score
        a, b = z[:, 0].mean((1, 2)), z[:, 1].mean((1, 2))
        left, right = z[:, 1, :, :16].mean((1, 2)), z[:, 1, :, 16:].mean((1, 2))
        return torch.stack([torch.maximum(a, b), torch.minimum(a, b), a + left - right], 1)
    x = torch.ones(2, 3, 32, 32)
    for target, due in ((0, [0.5, 0.5, 0]), (1, [0.5, 0.5, 0]), (2, [1, 0, 0])):
        method = solver(scores)
        a = method.attribute(x, target, 0.0)
        assert torch.allclose(method.last_run.stains, torch.tensor([due] * 2).float(), atol=1e-4)
        assert (a[:, :2].clamp(min=0).sum((1, 2, 3)) > 0.95 * a.clamp(min=0).sum((1, 2, 3))).all()
    assert (a[:, 1, :, :16].mean((1, 2)) > 0).all() and (a[:, 1, :, 16:].mean((1, 2)) < 0).all()            # faint, but what cancels is not lost


def test_whole_stains_are_asked_only_where_there_is_a_choice():
    for granularity, channels in (("pixel", 2), ("channel", 2), ("channel_pixel", 1)):
        method = PCIM(lambda z: z.mean((2, 3)), granularity)
        method.attribute(images(2, 16, channels), 0, 0.0)
        assert method.last_run.stains.shape == (2, channels) and method.last_run.stains.isnan().all()


def test_multi_label_target_is_the_mean_of_its_classes():
    x = images() + 0.5
    pair = PCIM(Spot(), "channel_pixel").attribute(x, (0, 1))
    total = PCIM(Spot(), "channel_pixel").attribute(x, 2)     # the same score, but twice as large
    assert torch.allclose(2 * pair, total, rtol=1e-3, atol=1e-5 * total.abs().max())
    assert torch.equal(PCIM(Spot(), "channel_pixel").attribute(x, [(0, 1), (1,), (0,)])[0], pair[0])
    assert torch.allclose(PCIM(Spot()).attribute(x, [(1,)] * 3), PCIM(Spot()).attribute(x, 1), atol=1e-6)


def test_weights_agree_with_the_order_of_a_linear_classifier():
    w = torch.randn(1, 2, 10, 10, generator=torch.Generator().manual_seed(3))
    f = lambda z: (z * w).sum((1, 2, 3))[:, None]
    x, b = images(4, 10), images(4, 10, seed=5)
    method = PCIM(f, "channel_pixel", scales=(1,))
    method.attribute(x, 0, b)
    for i in range(4): assert spearmanr(method.last_run.weights[i].flatten(), (w[0] * (x - b)[i]).flatten())[0] > 0.99


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_unit_of_the_scores_does_not_matter(scale):
    x, net = images() + 0.5, Spot()
    ref = PCIM(net).attribute(x, 0, 0.0)
    a = PCIM(lambda z: scale * net(z)).attribute(x, 0, 0.0)
    assert torch.allclose(a / scale, ref, rtol=1e-2, atol=1e-4 * ref.abs().max())


def test_pooled_votes_are_those_of_scipy():
    votes, amount = images(2, 24, 3) - 0.5, images(2, 24, 3, 1)
    blur = lambda v: gaussian_filter(v.double().numpy(), 2, axes=(-2, -1), mode="mirror")
    assert np.allclose(pooled(votes, amount, 2), blur(votes * amount) / blur(amount) * amount.numpy(), atol=1e-4)
    place, total = votes[:, :1], amount.sum(1, keepdim=True)
    assert np.allclose(pooled(place, amount, 2), blur(place * total) / blur(total) * amount.numpy(), atol=1e-4)
    assert torch.equal(pooled(votes, amount, 0), votes * amount)


def test_a_classifier_that_minds_patchwork_gets_a_broader_map():
    x, b = images(4, 48) + 0.5, torch.zeros(4, 2, 48, 48)
    w = torch.randn(1, 2, 48, 48, generator=torch.Generator().manual_seed(3))
    single = PCIM(lambda z: (z * w).sum((1, 2, 3))[:, None], "channel_pixel", scales=(1,))
    single.attribute(x, 0, b)
    assert not single.last_run.blur[single.last_run.converged].any()                    # each pixel has a worth of its own

    def whole(z):      # brightness of a quarter; what changes from pixel to pixel counts against it
        return torch.stack([8 * z[:, :, :24, :24].mean((1, 2, 3)) - 12 * (z[..., 1:] - z[..., :-1]).abs().mean((1, 2, 3)), torch.zeros(len(z))], 1)
    spread = torch.rand(1, 1, 48, 48, generator=torch.Generator().manual_seed(0)).expand(4, 1, 48, 48)
    place = torch.zeros(4, 1, 48, 48); place[:, :, :24, :24] = 1
    votes, amount, ones = place + 2 * spread, torch.ones(4, 1, 48, 48), torch.ones(4, 1, 48, 48)
    method = PCIM(whole)
    scores = lambda weights: torch.stack([whole(w * ones)[:, 0] for w in weights])
    ends = (whole(0 * ones)[:, 0], whole(ones)[:, 0])
    chosen, blur = method._as_fine_as_it_serves(votes, amount, ends, scores, 0.0)
    assert (blur > 0).all()
    assert (insertion_auc(whole, ones, chosen, 0, 0.0) > insertion_auc(whole, ones, votes, 0, 0.0) + 0.05).all()


def test_contrast_and_odd_shapes():
    x = images(2, 32)[:, :, :19, :]
    for g in ("pixel", "channel_pixel", "channel"):
        a = make("PCIM", contrast(Spot(), 1), granularity=g, steps=12).attribute(x, 0, 0.5)
        assert a.shape == x.shape and torch.isfinite(a).all()
    assert PCIM(Spot(), steps=8).attribute(images(1, 2), 0).shape == (1, 2, 2, 2)        # smaller than every block


def test_image_that_equals_its_baseline_has_no_map():
    x = images()
    method = PCIM(Spot())
    assert not method.attribute(x, 0, x).any() and not method.last_run.converged.any()


def test_a_model_in_training_mode_comes_back_so():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for method in (PCIM(net, steps=8), BlackBoxPCIM(net, budget=100)):
        a = method.attribute(images(), 1, 0.0)
        assert torch.equal(a, method.attribute(images(), 1, 0.0))
    assert net.training and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items()) and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("granularity", ["pixel", "channel_pixel"])
@pytest.mark.parametrize("budget", [100, 333, 1000])
def test_budget_is_never_exceeded(budget, granularity):
    asked = []
    def f(a):
        asked.append(len(a))
        return np.asarray(a).mean((2, 3)).astype(np.float32)
    method = BlackBoxPCIM(f, granularity, budget=budget, as_numpy=True)
    method.attribute(images(1), 0, 0.0)
    assert sum(asked) == method.last_run.passes <= budget and sum(asked) > 0.5 * budget


def test_registry_names_the_solvers():
    assert {"PCIM", "BlackBoxPCIM"} <= set(all_methods()) and all_methods() is METHODS
    with pytest.raises(PcimError, match="Did you mean 'PCIM'"): make("pcim2", Spot())


@pytest.mark.parametrize(("text", "call"), [
    ("target: is missing", lambda: PCIM(Spot()).attribute(images())),
    ("target: found class 3", lambda: PCIM(Spot()).attribute(images(), (0, 3))),
    ("inputs: image 0 holds NaN", lambda: PCIM(Spot()).attribute(images() * float("nan"), 0)),
    ("baselines: found shape", lambda: PCIM(Spot()).attribute(images(), 0, images(3, 16))),
    ("expected a callable", lambda: PCIM(None)),
    ("returned tuple", lambda: PCIM(lambda z: (z, z)).attribute(images(), 0)),
    ("gives no gradient", lambda: PCIM(lambda z: z.detach().mean((2, 3))).attribute(images(), 0)),
    ("returned NaN", lambda: BlackBoxPCIM(lambda z: z.mean((2, 3)) * float("nan"), budget=100).attribute(images(), 0)),
    ("budget: found -5", lambda: BlackBoxPCIM(Spot(), budget=-5)),
    ("budget: found 2000.5", lambda: BlackBoxPCIM(Spot(), budget=2000.5)),
    ("expected a MixingNetwork", lambda: AmortisedPCIM(Spot())),
    ("found 2 channels, expected 3", lambda: AmortisedPCIM(MixingNetwork(3, 2)).attribute(images(), 0)),
    ("found class 2, expected 0 to 1", lambda: AmortisedPCIM(MixingNetwork(2, 2)).attribute(images(), 2)),
    ("blurs: found (0.5,)", lambda: PCIM(Spot(), blurs=(0.5,))),
    ("gives: 'maps' is not known", lambda: MixingNetwork(2, 2, gives="maps")),
    ("solver: found Spot, expected a PCIM", lambda: distil(MixingNetwork(2, 3), Spot(), images(), [0, 1, 2], progress=False)),
    ("solver: has granularity 'pixel', expected 'channel'", lambda: distil(MixingNetwork(2, 3, "channel"), PCIM(Spot()), images(), [0, 1, 2], progress=False)),
    ("found no votes for any of 3 images", lambda: distil(MixingNetwork(2, 3), PCIM(Spot(), steps=8), images(), [0, 1, 2], lambda v: v, progress=False)),
    ("iterations 0", lambda: distil(MixingNetwork(2, 3), PCIM(Spot()), images(), [0, 1, 2], iterations=0, progress=False)),
    ("labels: found 3 labels from 0 to 2", lambda: train_mixing(MixingNetwork(2, 2), Spot(), images(), [0, 1, 2], progress=False)),
    ("weights: no file", lambda: load_mixing("nowhere.safetensors")),
])
def test_bad_input_is_one_clear_sentence(text, call):
    with pytest.raises(PcimError) as e: call()
    assert text in str(e.value) and "\n" not in str(e.value)


def test_rank_votes_are_those_of_the_0_1_masks():
    path = area_path(20, 0, (0.5, 0.01), 10**9)
    theta = torch.randn(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    votes = rank_votes(theta, path)
    rank = theta.flatten(1).argsort(1, descending=True).argsort(1)
    plain = sum((((rank + 0.5) / 1600 < a).float() - a) / (a * (1 - a)) ** 0.5 for a in path.tolist()) / 20
    assert (votes.flatten(1) - plain).abs().max() < 0.6 / 20 / (0.01 * 0.99) ** 0.5       # half a mask's step
    assert torch.equal(votes.flatten(1).argsort(1), theta.flatten(1).argsort(1)) and len(votes[0].unique()) == 1600


def test_mixing_network_learns_saves_and_is_the_same_again(tmp_path):
    x, y = images(16) * 0.2 + 0.5, np.arange(16) % 2
    nets = []
    for _ in range(2):
        net = MixingNetwork(2, 3, "channel_pixel", width=6, depth=2)
        train_mixing(net, Spot(), x, y, "zeros", iterations=60, seed=1, progress=False)
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values()))
    new = images(4, seed=9) * 0.2 + 0.5
    a = AmortisedPCIM(nets[0]).attribute(new, 0, 0.0).clamp(min=0)
    assert (a[:, 0].sum((1, 2)) / a.sum((1, 2, 3)) > 0.9).all()
    save_mixing(nets[0], tmp_path / "größe.safetensors")
    again = AmortisedPCIM(load_mixing(tmp_path / "größe.safetensors"))
    assert torch.equal(again.attribute(new, 0, 0.0).clamp(min=0), a)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(PcimError, match="bad.safetensors"): load_mixing(tmp_path / "bad.safetensors")


class Bright(nn.Module):
    "Scores: what is brighter than 0.6 in each of two channels."
    def __init__(self): super().__init__(); self.gain = nn.Parameter(torch.tensor(40.0))
    def forward(self, x): return self.gain * (x - 0.6).clamp(min=0).mean((2, 3))


def spots(n, seed=0):
    "Smooth images `n×2×32×32`, of 0 to 1."
    v = gaussian_filter(np.random.default_rng(seed).normal(size=(n, 2, 32, 32)), 2, axes=(2, 3))
    low, high = v.min((2, 3), keepdims=True), v.max((2, 3), keepdims=True)
    return torch.from_numpy(((v - low) / (high - low)).astype(np.float32))


@pytest.mark.parametrize("granularity", ["pixel", "channel_pixel", "channel"])
@pytest.mark.parametrize("solver", [PCIM, lambda f, g: BlackBoxPCIM(f, g, budget=400)])
def test_a_network_that_learnt_the_votes_gives_them_for_new_images(solver, granularity, tmp_path):
    x, y, new = spots(12), np.arange(12) % 2, spots(4, seed=9)
    nets = []
    for folder in (tmp_path, tmp_path, None):            # the second run finds what the first one kept
        net = MixingNetwork(2, 2, granularity, width=8, depth=2)
        history = distil(net, solver(Bright(), granularity), x, y, "zeros", iterations=80, folder=folder, seed=1, progress=False)
        nets.append(net)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*(n.state_dict().values() for n in nets)))
    assert len(list(tmp_path.iterdir())) == 12 and history.agreement[-10:].mean() > 0.5
    for k in (0, 1):
        a = AmortisedPCIM(nets[0]).attribute(new, k, 0.0).clamp(min=0)
        if granularity == "pixel": a = a.sum(1, keepdim=True).expand_as(a)
        else: assert (a[:, k].sum((1, 2)) > a[:, 1 - k].sum((1, 2)) + 1e-6).all()
        bright = new[:, k] > 0.6
        inside = [(v * bright).sum((1, 2)) / v.sum((1, 2)) for v in (a[:, k], new[:, k])]
        if granularity != "channel": assert (inside[0] > inside[1]).all()                # more than brightness itself says
    save_mixing(nets[0], tmp_path / "votes")
    assert load_mixing(tmp_path / "votes").gives == "votes" and torch.equal(*(AmortisedPCIM(n).attribute(new, 1, 0.0) for n in (load_mixing(tmp_path / "votes"), nets[0])))


def test_mixing_network_by_channel_finds_the_stain_that_counts():
    x, y = images(16) * 0.2 + 0.5, np.arange(16) % 2
    net = MixingNetwork(2, 3, "channel", width=6, depth=2)
    train_mixing(net, Spot(), x, y, "zeros", iterations=80, seed=1, progress=False)
    new = images(4, seed=9) * 0.2 + 0.5
    for target, channel in ((0, 0), (1, 1)):
        a = AmortisedPCIM(net).attribute(new, target, 0.0)
        assert torch.equal(a, a[..., :1, :1].expand_as(a)) and (a[:, channel, 0, 0] > a[:, 1 - channel, 0, 0] + 1e-6).all()
    assert not AmortisedPCIM(net).attribute(new, 0, new).any()


def test_an_onnx_session_gives_the_map_of_the_same_network_in_torch():
    pytest.importorskip("onnx", reason="onnx builds the session's model")
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime answers for the classifier")
    from onnx import TensorProto, helper, numpy_helper
    w = torch.randn(2 * 16, 3, generator=torch.Generator().manual_seed(3))
    graph = helper.make_graph(
        [helper.make_node("AveragePool", ["x"], ["p"], kernel_shape=[8, 8], strides=[8, 8]), helper.make_node("Flatten", ["p"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["scores"])],
        "pooled", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 32, 32])], [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])], [numpy_helper.from_array(w.numpy(), "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    asked = []

    def answer(x):
        asked.append(len(x))
        return session.run(["scores"], {"x": np.asarray(x, dtype=np.float32)})[0]

    x = images()
    a = BlackBoxPCIM(answer, "channel_pixel", budget=400).attribute(x, [0, 1, 2], 0.0)
    assert sum(asked) <= 400 * len(x) + 8
    same = BlackBoxPCIM(lambda z: torch.nn.functional.avg_pool2d(z, 8).flatten(1) @ w, "channel_pixel", budget=400).attribute(x, [0, 1, 2], 0.0)
    assert torch.allclose(a, same, atol=1e-4 * float(same.abs().max()))
    blocks, effect = torch.nn.functional.avg_pool2d(a, 8).flatten(1), torch.nn.functional.avg_pool2d(x, 8).flatten(1) * w.T
    for got, due in zip(blocks, effect): assert got[due.argsort()[-8:]].mean() > 0 > got[due.argsort()[:16]].mean()               # what raises the score is for the class, what lowers it against


MEMORY = """
import resource, torch, warnings
torch.set_num_threads(1); warnings.simplefilter('ignore')
from pcim_nb.pcim import PCIM
f = lambda z: z.mean((2, 3))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
x = torch.rand(1, 5, 1080, 1080)
PCIM(f, 'channel_pixel', steps=7).attribute(x[..., :100, :100], 0, 0.); start = peak()
PCIM(f, 'channel_pixel', steps=7).attribute(x, 0, 0.); print(peak() - start)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read from the resource module, which Windows lacks")
def test_memory_of_a_large_image():
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 2000 / (1 if sys.platform != "darwin" else 1 / 1024)
