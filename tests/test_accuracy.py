"""The accuracy experiments train what they claim: images, networks, alignment; a resumption changes nothing."""

import math
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import resnet

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import weightalign_cuda as wa
from benchmarks.accuracy import alignment, data, experiments, logs, networks, shifts, sources, training
from benchmarks.accuracy.config import Run
from benchmarks.accuracy.variance import activation_variance

CPU = torch.device("cpu")
DIGITS = Run("test", "resnet8", dataset="digits", batch=16, train_images=100, test_images=50, epochs=2, augment=True)


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are small: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images(tmp_path):
    """A folder, and a zip file of it: 2 splits of 2 classes of 4 images. The pixels of an image are its number."""
    folder, number = tmp_path / "images", 0
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / split / name / f"{i}.png")
                number += 1
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(folder))
    return tmp_path


@pytest.mark.parametrize("name", ["images", "images.zip"])
def test_subsets_are_the_same_images_every_time(images, name):
    def first_pixels(*choice):
        found = data.folder(images / name, *choice, None)
        return found.pixels[:, 0, 0, 0].tolist(), found.labels.tolist()

    assert first_pixels("train", None, 0) == (list(range(8)), [0] * 4 + [1] * 4)
    assert first_pixels("train", 4, 0) == ([0, 1, 4, 5], [0, 0, 1, 1])
    assert first_pixels("train", 4, 4) == ([2, 3, 6, 7], [0, 0, 1, 1])
    assert first_pixels("test", 2, 0) == ([8, 12], [0, 1])
    with pytest.raises(ValueError, match=r"fewer than 4 \+ 6"):
        first_pixels("train", 6, 4)
    with pytest.raises(ValueError, match="no folder val"):
        first_pixels("val", None, 0)


def test_images_shrink_to_means_of_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    found = data.decoded([Image.fromarray(pixels)], 2)[0].permute(1, 2, 0).numpy()
    means = pixels.reshape(2, 2, 2, 2, 3).mean((1, 3))
    assert np.abs(found - means).max() < 1  # rounded twice, after rows and after columns


def test_validation_images_are_not_trained_on(images):
    run = Run("test", "resnet8", train_images=4, test_images=4, validate=True)
    source = sources.InMemory(run, images / "images", CPU)
    assert source.training.pixels[:, 0, 0, 0].tolist() == [0, 1, 4, 5]
    assert source.test.pixels[:, 0, 0, 0].tolist() == [2, 3, 6, 7]


def test_augmentation_is_a_flip_and_a_crop():
    pixels = torch.arange(2 * 3 * 5 * 5, dtype=torch.uint8).view(2, 3, 5, 5)
    found = data.augmented(pixels, torch.Generator().manual_seed(3), margin=2)
    assert (found == data.augmented(pixels, torch.Generator().manual_seed(3), margin=2)).all()
    for before, after in zip(pixels, found, strict=True):
        padded = [F.pad(image, [2] * 4) for image in (before, before.flip(2))]
        crops = [image[:, i : i + 5, j : j + 5] for image in padded for i in range(5) for j in range(5)]
        assert any((after == crop).all() for crop in crops)


def test_each_image_once_an_epoch_in_another_order():
    run = DIGITS.but(batch=10)
    first, second = (torch.cat(sources.order(run, 100, epoch)) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert first.tolist() != second.tolist()
    assert torch.cat(sources.order(run.but(seed=1), 100, 0)).tolist() != first.tolist()


def test_shifts():
    pixels = torch.tensor([[[[30]], [[60]], [[90]]]], dtype=torch.uint8)
    expected = {
        "none": [30, 60, 90],
        "grey": [60, 60, 60],
        "dark": [15, 30, 45],
        "flat": [95, 105, 115],
        "blurred": [30, 60, 90],
        "negative": [225, 195, 165],
    }
    assert {name: shifts.shifted(pixels, name).flatten().tolist() for name in shifts.SHIFTS} == expected
    row = torch.tensor([0.0, 90.0, 0.0]).view(1, 1, 1, 3)
    assert shifts.blurred(row).flatten().tolist() == [30, 30, 30]


def test_normalised_images_have_mean_0_and_deviation_1():
    pixels = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = data.Normalise(pixels)(pixels)
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)


class KilledError(Exception):
    pass


def place_in(folder):
    return training.Place(pathlib.Path(), folder, CPU)


def train_killed(run, place, steps):
    """Killed after some steps, the last of which no checkpoint has."""
    seen = []

    def advance(_):
        seen.append(None)
        if len(seen) > steps:  # the first call is that of what a checkpoint has
            raise KilledError

    with pytest.raises(KilledError):
        training.train(run, place, advance)


def last_state(run, place):
    state = torch.load(place.checkpoint(run))
    momenta = [each["momentum_buffer"] for each in state["optimizer"]["state"].values()]
    return [*state["model"].values(), *momenta]


@pytest.mark.parametrize(("norm", "align"), [("bn", "none"), ("none", "wa")])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, norm, align):
    run = DIGITS.but(norm=norm, align=align)
    whole, killed = place_in(tmp_path / "whole"), place_in(tmp_path / "killed")
    expected = training.train(run, whole)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    train_killed(run, killed, 4)  # in the first epoch
    train_killed(run, killed, 5)  # in the second
    assert training.train(run, killed) == expected
    assert all(map(torch.equal, last_state(run, whole), last_state(run, killed)))
    assert expected["steps"] == 12 and expected["epochs"][1]["loss"] < expected["epochs"][0]["loss"]


def test_killed_while_it_writes_a_checkpoint(tmp_path, monkeypatch):
    place, save = place_in(tmp_path), torch.save
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    train_killed(DIGITS, place, 3)

    def save_half(state, path):
        path.write_bytes(b"half")
        raise KilledError

    monkeypatch.setattr(torch, "save", save_half)
    train_killed(DIGITS, place, 10)
    monkeypatch.setattr(torch, "save", save)
    assert torch.load(place.checkpoint(DIGITS))["position"]["step"] == 2
    assert training.train(DIGITS, place)["steps"] == 12


def test_another_seed_and_batch_size_1(tmp_path):
    place, one = place_in(tmp_path), DIGITS.but(batch=1, train_images=20, epochs=1, norm="gn", align="wa", rate=0.001)
    found = [training.train(one.but(seed=seed), place)["epochs"][0]["loss"] for seed in (0, 1)]
    assert found[0] != found[1] and all(0 < loss < 5 for loss in found)


def test_mixed_precision(tmp_path):
    run = DIGITS.but(precision="bfloat16", align="wa")
    losses = [training.train(each, place_in(tmp_path))["epochs"][1]["loss"] for each in (run, DIGITS.but(align="wa"))]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_divergence_ends_a_run(tmp_path):
    result = training.train(DIGITS.but(align="four", rate=1e6), place_in(tmp_path))
    assert result["diverged_at"] < 12 and result["epochs"][-1]["error"] == pytest.approx(0.9, abs=0.05)


def test_fine_tuning_begins_with_the_trained_network(tmp_path):
    place, before = place_in(tmp_path), DIGITS.but(epochs=3)
    run = before.but(pretrained=before, align="wa", gain="preserve", epochs=1, rate=0.001)
    result = training.train(run, place)
    trained = networks.build("resnet8", "none", "none", 10)
    trained.load_state_dict(torch.load(place.checkpoint(before))["model"])
    with torch.no_grad():
        for layer in (module for module in trained.modules() if isinstance(module, nn.Conv2d)):
            layer.weight -= layer.weight.mean((1, 2, 3), keepdim=True)
    source, wrong = sources.source(run, place.data, CPU), 0
    for x, y in source.tests():
        wrong += int((trained.eval()(x).argmax(1) != y).sum())
    assert result["start_error"] == wrong / 50


def test_learning_rates():
    steps = Run("", "", rate=1.0, schedule="steps", drops=(0.3, 0.6, 0.9))
    assert [steps.at(t) for t in (0, 0.29, 0.3, 0.6, 0.95)] == pytest.approx([1, 1, 0.1, 0.01, 0.001])
    assert [Run("", "", rate=2.0).at(t) for t in (0, 0.5, 1)] == pytest.approx([2, 1, 0])


def test_tuned_rates_are_the_best_and_interpolated():
    def record(rate, batch, error):
        run = experiments.BASE.but(experiment="tuning", rate=rate, batch=batch, norm="bn")
        return {"run": run.to_json(), "epochs": [{"loss": 1.0, "error": error}]}

    tuned = experiments.tuned([record(0.1, 64, 0.3), record(0.3, 64, 0.4), record(0.01, 1, 0.5), record(0.001, 1, 0.4)])
    rates = {batch: tuned(Run("batch", "resnet8", "bn", batch=batch)).rate for batch in (64, 8, 1)}
    assert rates == {64: 0.1, 8: 0.01, 1: 0.001}


def test_runs_are_distinct_and_survive_their_record():
    tuning = experiments.tuning()
    records = [{"run": run.to_json(), "epochs": [{"loss": 1.0, "error": 0.5}]} for run in tuning]
    runs = [*tuning, *(run for each in experiments.EXPERIMENTS.values() for run in each(experiments.tuned(records)))]
    assert len(set(runs)) == len(runs)
    assert [Run.from_json(run.to_json()) for run in runs] == runs
    for experiment in experiments.EXPERIMENTS.values():
        settings = {run.but(seed=0): 0 for run in experiment(experiments.tuned(records)) if run.pretrained is None}
        seeds = [run.seed for run in experiment(experiments.tuned(records)) if run.pretrained is None]
        assert len(seeds) == 3 * len(settings)


def truth(weight, how):
    """In float64."""
    weight = weight.double()
    dims, n = (1, 2, 3), weight[0].numel()
    centred = weight - weight.mean(dims, keepdim=True)
    deviation = (n / 2 * centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
    halves = {"none": weight, "centre": centred, "scale": weight / deviation}
    factors = {"wa": 1, "half": 1 / 2, "double": 2, "four": 4, "corrected": math.sqrt(math.pi / (math.pi - 1))}
    return halves[how] if how in halves else factors[how] * centred / deviation


@pytest.mark.parametrize("how", experiments.ABLATION)
def test_ablation_against_float64(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU())
    weight, image = model[0].weight.detach() + 0.1, torch.randn(2, 3, 6, 6)
    model[0].weight.data.copy_(weight)
    gain = torch.linspace(0.5, 2, 5)
    alignment.align(model, how)
    if how != "none":
        (gains,) = (each for name, each in model.named_parameters() if name.endswith("gain"))
        assert (gains == 1).all()
        gains.data.copy_(gain)
    factor = 1 if how == "none" else gain.double().view(-1, 1, 1, 1)
    expected = F.relu(F.conv2d(image.double(), factor * truth(weight, how)))
    torch.testing.assert_close(model(image).double(), expected, rtol=1e-5, atol=1e-5)


def test_unknown_alignment():
    with pytest.raises(ValueError, match="got 'both'"):
        alignment.align(nn.Conv2d(3, 5, 3), "both")


@pytest.mark.parametrize(("network", "convolutions"), [("resnet8", 9), ("resnet14", 15), ("vgg16-8", 13),
                                                       ("resnet18", 20), ("chain50", 50)])  # fmt: skip
def test_all_convolutions_are_aligned(network, convolutions):
    for norm in ("none", "bn", "gn", "ln"):
        model = networks.build(network, norm, "wa", 10)
        assert len(wa.gain_parameters(model)) == convolutions
        assert not any(type(module) is nn.Conv2d for module in model.modules())
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("align", ["none", "wa", "centre", "scale"])
def test_fixup_branches_start_at_zero_and_grow_slowly(align):
    torch.manual_seed(0)
    model = networks.build("resnet8", "none", align, 10)
    image, blocks = torch.randn(4, 3, 16, 16), [each for each in model if isinstance(each, resnet.BasicBlock)]
    largest = []
    for block in blocks:
        block.bn2.register_forward_hook(lambda _, inputs, output: largest.append(float(output.detach().abs().max())))
    assert not model(image).any() and largest == [0, 0, 0]
    first = alignment.raw_weight(blocks[0].conv1)
    assert float(first.detach().std()) == pytest.approx(math.sqrt(2 / 144 / 3), rel=0.05)
    model[-1].weight.data.normal_()
    F.cross_entropy(model(image), torch.arange(4)).backward()
    largest.clear()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    model(image)
    assert all(0 < each < 0.05 for each in largest)


def test_variance_of_what_enters_each_relu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU())
    image = torch.randn(8, 3, 6, 6)
    with torch.no_grad():
        normal = F.batch_norm(model[0](image), None, None, training=True)
        expected = normal.var(), model[3](F.relu(normal)).var()
    assert activation_variance(model.eval(), image) == pytest.approx([float(each) for each in expected], rel=1e-3)
    assert not model.training and not model[1].running_mean.any()


KEPT = 1 - 1 / math.pi  # of the second moment after a ReLU, the share that is variance


@pytest.mark.parametrize(
    ("norm", "align", "forward", "backward"),
    [("none", "wa", KEPT, 1), ("none", "corrected", 1, 1 / KEPT), ("bn", "none", 1, 1 / KEPT)],
)
def test_variance_through_layers(norm, align, forward, backward):
    """The factor of each layer. An aligned filter sums to 0, so that the mean of its input cancels: alignment keeps the
    variance of the gradients, or by another scale that of the activations, as batch norm does."""
    torch.manual_seed(0)
    model = alignment.align(networks.chain(22, 64, "circular")(networks.NORMS[norm], 10), align)
    x = torch.randn(8, 3, 8, 8)
    found = activation_variance(model, x)
    activations = []
    for layer in model[:-3]:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            x.retain_grad()
            activations.append(x)
    x.backward(torch.randn_like(x))
    gradients = [float(each.grad.var()) for each in activations]
    assert (found[-1] / found[1]) ** (1 / 20) == pytest.approx(forward, rel=0.05)
    assert (gradients[1] / gradients[-2]) ** (1 / 19) == pytest.approx(backward, rel=0.05)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """By torchrun, on halves of each batch; images without augmentation, which differs by process."""
    settings = ["network=resnet8", "norm=gn", "dataset=digits", "batch=16", "epochs=2", "augment=false"]
    sizes = ["train_images=100", "test_images=50", "rate=0.1"]
    epochs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
                   "-m", "benchmarks.accuracy", "recipe", "folder", "--data", ".", "--device", "cpu",
                   "--out", str(folder), "--set", *settings, *sizes]  # fmt: skip
        done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (record,) = logs.read(folder / "logs", "recipe")
        epochs.append([epoch["loss"] for epoch in record["epochs"]])
    assert epochs[1] == pytest.approx(epochs[0], rel=1e-4)
