"""The full-size recipes, and those of docs/pages/recipes.md, run on a few generated images."""

import pathlib
import pickle
import re
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.ops import FrozenBatchNorm2d

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import weightalign_cuda as wa
from benchmarks.accuracy import networks, recipes, sources, training
from benchmarks.accuracy.__main__ import changed

CPU = torch.device("cpu")
SMALL = {"batch": 2, "epochs": 1, "precision": "float32"}  # bfloat16 is slow on many CPUs


def random_image(number, height=40, width=48):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def image_folder(folder, *splits):
    for split in splits:
        for number, name in enumerate(["cat", "cat", "dog", "dog"]):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(random_image(number)).save(folder / split / name / f"{number}.jpg")


def cifar_files(folder, root, batches, labels, classes):
    """In the format of torchvision's CIFAR datasets: 4 images in each file."""
    (folder / root).mkdir()
    rows = np.stack([random_image(number, 32, 32).transpose(2, 0, 1).reshape(-1) for number in range(4)])
    for name in batches:
        (folder / root / name).write_bytes(pickle.dumps({"data": rows, labels: [number % 2 for number in range(4)]}))
    names, key = [str(i) for i in range(classes)], "label_names" if classes == 10 else "fine_label_names"
    (folder / root / ("batches.meta" if classes == 10 else "meta")).write_bytes(pickle.dumps({key: names}))


def voc_files(folder):
    top = folder / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (top / name).mkdir(parents=True)
    for split in ("train", "val"):
        names = [f"{split}{i}" for i in range(2)]
        (top / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for number, name in enumerate(names):
            pixels = random_image(number, 50 + number)
            Image.fromarray(pixels).save(top / f"JPEGImages/{name}.jpg")
            mask = Image.fromarray(np.where(pixels[..., 0] < 20, 255, number).astype(np.uint8))
            mask.putpalette([channel for color in range(256) for channel in (color, 255 - color, color)])
            mask.save(top / f"SegmentationClass/{name}.png")


@pytest.fixture
def generated(tmp_path, monkeypatch):
    """The images that a recipe expects, and what else is to be changed, for the sake of time or of a download."""

    def make(name):
        if name.startswith("cifar"):
            monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
            monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: setattr(self, "classes", "ab"))
            if name == "cifar100":
                cifar_files(tmp_path, "cifar-100-python", ("train", "test"), "fine_labels", 100)
            else:
                batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
                cifar_files(tmp_path, "cifar-10-batches-py", batches, "labels", 10)
            return {"train_images": 4, "test_images": 2}
        if name == "voc":
            voc_files(tmp_path)
            return {"size": 33, "network": "deeplabv3-resnet50"}
        image_folder(tmp_path, *recipes.RECIPES[name].splits)
        return {"size": 32}

    return make


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipe(generated, tmp_path, name):
    recipe = recipes.RECIPES[name]
    run = recipe.but(**(SMALL | generated(name) | ({"batch": 1} if recipe.batch == 1 else {})))
    place = training.Place(tmp_path, tmp_path / "work", CPU)
    result = training.train(run, place)
    assert result["steps"] == (2 if name == "voc" else 4) // run.batch
    assert np.isfinite(result["epochs"][0]["loss"]) and 0 <= result["epochs"][0]["error"] <= 1
    state = torch.load(place.checkpoint(run))["model"]
    gains = [value for key, value in state.items() if key.endswith("gain")]
    assert len(gains) > 19 and any((gain != gain[0]).any() for gain in gains)


def test_files_are_augmented_alike_wherever_a_run_goes_on(generated, tmp_path):
    run = recipes.RECIPES["imagenet"].but(**SMALL, **generated("imagenet"))
    whole = list(sources.source(run, tmp_path, CPU).batches(0, 0))
    rest = list(sources.source(run, tmp_path, CPU).batches(0, 1))
    assert len(whole) == 2 and len(rest) == 1
    assert all(map(torch.equal, whole[1], rest[0]))
    images = sources.source(run, tmp_path, CPU).training
    first, again, later = (images[epoch, 0][0] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_mean_iou(generated, tmp_path, monkeypatch):
    """Of a network that calls everything class 1: of the two masks, the second is all 1 where it is known."""
    run = recipes.RECIPES["voc"].but(**SMALL, **generated("voc"))
    state = training.Training(run, training.Place(tmp_path, tmp_path, CPU))
    masks = [mask for _, mask in state.source.tests()]
    assert set(masks[0].flatten().tolist()) == {0, 255} and set(masks[1].flatten().tolist()) == {1, 255}
    scores = torch.nn.functional.one_hot(torch.tensor(1), 21).float().view(1, 21, 1, 1)
    state.model.forward = lambda image: {"out": scores.expand(1, 21, *image.shape[2:])}
    zeros, ones = (int((mask != 255).sum()) for mask in masks)
    assert state.error() == pytest.approx(1 - (0 + ones / (zeros + ones)) / 2)


def test_settings_on_the_command_line():
    run = changed(recipes.RECIPES["folder"], ["norm=gn", "batch=2", "rate=0.001", "augment=false", "size=null"])
    assert run == recipes.RECIPES["folder"].but(norm="gn", batch=2, rate=0.001, augment=False)


def test_norms_of_deeplab_are_replaced():
    model = networks.build("deeplabv3-resnet50", "gn", "wa", 3)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert [name for name, module in model.named_modules() if type(module) is torch.nn.Conv2d] == ["classifier.4"]


@pytest.fixture(scope="module")
def page():
    """The names that the code of docs/pages/recipes.md defines."""
    text = (pathlib.Path(__file__).parents[1] / "docs/pages/recipes.md").read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(block, names)
    return names


def test_frozen_norms_fuse_exactly(page):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    for module in model.modules():
        for buffer in module.buffers(recurse=False):
            buffer.uniform_(0.5, 1.5)
    image = torch.randn(2, 3, 64, 64)
    expected = model(image)
    fused = page["fuse_frozen_norms"](model)
    torch.testing.assert_close(fused(image), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in fused.modules())


def test_preserved_scale(page):
    """The aligned weights of a fused network are its weights, less the mean of each filter."""
    layer = page["tuned"].body.layer1[0].conv2
    assert isinstance(layer, wa.WAConv2d)
    aligned = wa.align(layer.weight, layer.gain)
    torch.testing.assert_close(aligned, layer.weight - layer.weight.mean((1, 2, 3), keepdim=True), rtol=1e-4, atol=1e-6)


def trained(model, loss_of, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)  # a detector samples its boxes at random
        loss = loss_of(model.train())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_detector_trains(page):
    detector = page["detector"]
    left = [name for name, module in detector.named_modules() if type(module) is torch.nn.Conv2d]
    assert left == ["rpn.head.cls_logits", "rpn.head.bbox_pred"] and len(wa.gain_parameters(detector)) > 53
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    detector.roi_heads.fg_bg_sampler.batch_size_per_image = 16  # boxes: 512 take seconds
    losses = trained(detector, lambda model: sum(model([image], page["targets"]).values()))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_segmentation_trains(page):
    image = torch.rand(2, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    mask = (image.mean(1) > 0.5).long()
    losses = trained(page["deeplab"], lambda model: training.loss_of(model(image), mask))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
