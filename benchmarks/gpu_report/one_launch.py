"""python -m benchmarks.gpu_report.one_launch: ResNet-50's weights forward and backward, twice, for ncu."""

import torch

from .. import layers
from ..providers import Provider, Setting, make_inputs, ours_foreach


def main() -> None:
    torch.manual_seed(0)
    setting = Setting("cuda", torch.float32, torch.bfloat16, torch.channels_last)
    inputs = make_inputs([shape for _, shape in layers.load("resnet50").layers], setting)
    call = Provider("ours", ours_foreach(setting)).call("both", inputs)
    for _ in range(2):  # the first loads the kernels
        call()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
