"""python -m benchmarks.demo: training without any activation normalisation, at batch size 2.

A small residual network on scikit-learn's 8x8 digits, three times: aligned (WAConv2d, no norm), plain (Conv2d, no norm)
and batch norm (Conv2d, BatchNorm2d after each). The same architecture, seeds, data order, and SGD with momentum 0.9 and
weight decay 5e-4, cosine schedule to 0. Each branch starts at zero because of its last convolution: gain 0 (aligned),
weights 0 (plain), norm weight 0 (batch norm). Each variant trains at each of RATES; the run with the best accuracy on
validation images is reported, and test images are used only for that report. One seed, 450 test images: differences of
a percent or two mean nothing.
Writes demo.png, the smoothed training loss.
"""

import argparse
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import weightalign_cuda as wa

VARIANTS = ("aligned", "plain", "batch norm")
RATES = (0.003, 0.01, 0.03, 0.1)
BATCH = 2
SEED = 0
Images = tuple[Tensor, Tensor]


class Block(nn.Module):
    """relu(x + branch(x)) with a branch of two convolutions that starts at zero."""

    def __init__(self, inside: int, outside: int, stride: int, variant: str) -> None:
        super().__init__()
        self.first, self.last = unit(inside, outside, 3, stride, variant), unit(outside, outside, 3, 1, variant)
        self.shortcut = nn.Identity() if inside == outside else unit(inside, outside, 1, stride, variant)
        start = {"aligned": lambda: self.last[0].gain, "plain": lambda: self.last[0].weight}
        nn.init.zeros_(start.get(variant, lambda: self.last[1].weight)())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.last(F.relu(self.first(x))))


def unit(inside: int, outside: int, size: int, stride: int, variant: str) -> nn.Sequential:
    """A convolution, with the variant's class and norm."""
    kind = wa.WAConv2d if variant == "aligned" else nn.Conv2d
    norm = variant == "batch norm"
    convolution = kind(inside, outside, size, stride, size // 2, bias=not norm)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, *([nn.BatchNorm2d(outside)] if norm else []))


def network(variant: str) -> nn.Sequential:
    """10 convolutions, 16 to 32 channels."""
    torch.manual_seed(SEED)
    blocks = [Block(*sizes, variant) for sizes in ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(unit(1, 16, 3, 1, variant), nn.ReLU(), *blocks, *head)


def data(device: str) -> tuple[Images, Images, Images]:
    """Training (60 %), validation (15 %) and test (25 %) images: a fixed stratified split."""
    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, labels, test_size=0.25, random_state=SEED, stratify=labels
    )
    train_x, valid_x, train_y, valid_y = train_test_split(
        train_x, train_y, test_size=0.2, random_state=SEED, stratify=train_y
    )

    def images(x: Tensor, y: Tensor) -> Images:
        pixels = torch.tensor(x, dtype=torch.float32, device=device)
        return (pixels.view(-1, 1, 8, 8) - 8) / 8, torch.tensor(y, device=device)

    return images(train_x, train_y), images(valid_x, valid_y), images(test_x, test_y)


def train(
    variant: str, rate: float, steps: int, images: Images, advance: Callable[[], None]
) -> tuple[nn.Module, list[float]]:
    """The trained network and its loss at each step; stops at a non-finite loss."""
    x, y = images
    model = network(variant).to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(queue) < BATCH:
            queue = torch.randperm(len(x), generator=order)
        batch, queue = queue[:BATCH], queue[BATCH:]
        loss = F.cross_entropy(model(x[batch]), y[batch])
        losses.append(float(loss.detach()))
        if not loss.isfinite():
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance()
    return model, losses


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    model.eval()
    x, y = images
    return float((model(x).argmax(1) == y).float().mean())


def smoothed(losses: list[float], width: int = 100) -> list[float]:
    """Mean of the last `width` losses at each step."""
    sums = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0)
    return [float(sums[i] - sums[max(i - width, 0)]) / min(i, width) for i in range(1, len(sums))]


def plot(curves: dict[str, list[float]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for label, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), smoothed(losses), label=label, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("step (batch size 2)")
    axes.set_ylabel("training loss, mean of 100 steps")
    axes.set_title("8x8 digits, residual network of 10 convolutions, batch size 2", fontsize=10)
    axes.grid(linewidth=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder (default: out)")
    parser.add_argument("--steps", type=int, default=1617, help="of each run (default: 3 epochs)")
    arguments = parser.parse_args()
    console = Console()
    training, validation, test = data(arguments.device)
    torch.set_num_threads(1)  # 8x8 images: more threads only wait for each other
    curves, lines = {}, []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(VARIANTS) * len(RATES) * arguments.steps)
        for variant in VARIANTS:
            runs = {}
            for rate in RATES:
                progress.update(task, description=f"{variant}, learning rate {rate:g}")
                model, losses = train(variant, rate, arguments.steps, training, lambda: progress.advance(task))
                runs[rate] = accuracy(model, validation), model, losses
            rate = max(RATES, key=lambda each: runs[each][0])
            _, model, losses = runs[rate]
            curves[f"{variant}, learning rate {rate:g}"] = losses
            tried = ", ".join(f"{each:g}: {100 * runs[each][0]:.1f} %" for each in RATES)
            lines.append(
                f"{variant:10}  test accuracy {100 * accuracy(model, test):5.1f} %  "
                f"last training loss {smoothed(losses)[-1]:.3f}  learning rate {rate:g} (validation: {tried})"
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(curves, arguments.out / "demo.png")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"wrote {arguments.out / 'demo.png'}", highlight=False)


if __name__ == "__main__":
    main()
