"""The paper's own experiments at full size, for machines that have the data and the time.

From the paper: SGD with momentum 0.9, weight decay 5e-4, gains included; CIFAR for 300 epochs, learning rate 0.01 at
batch 64, 0.001 at batch 1; ImageNet for 100 epochs, learning rate 0.1, a tenth of it after 30, 60 and 90. It does not
state the schedule for CIFAR (here cosine), nor the training for VOC and Office-31 (here usual values).
"""

from .config import Run

CIFAR = Run("recipe", "resnet50", "none", "wa", dataset="cifar10", rate=0.01, epochs=300, augment=True)
RECIPES = {
    # torchvision's CIFAR10 and CIFAR100 on disk
    "cifar10": CIFAR,
    "cifar10-batch-1": CIFAR.but(batch=1, rate=0.001),
    "cifar100": CIFAR.but(dataset="cifar100"),
    # images in train/CLASS and test/CLASS, in a folder or a zip file
    "folder": CIFAR.but(dataset="folder", network="resnet18"),
    # train/CLASS and val/CLASS
    "imagenet": CIFAR.but(
        dataset="imagenet", splits=("train", "val"), network="imagenet-resnet50", norm="bn", batch=256, rate=0.1,
        epochs=100, schedule="steps", drops=(0.3, 0.6, 0.9), precision="bfloat16",
    ),
    # torchvision's VOCSegmentation, 2012. The backbone begins with torchvision's weights for ImageNet.
    "voc": CIFAR.but(
        dataset="voc", splits=("train", "val"), network="deeplabv3-resnet50-imagenet", norm="bn", gain="preserve",
        batch=16, rate=0.007, epochs=50, precision="bfloat16",
    ),
    # DOMAIN/images/CLASS: trained on one domain, tested on another
    "office31": CIFAR.but(
        dataset="folder", splits=("amazon/images", "webcam/images"), network="imagenet-resnet50", norm="ln", size=224,
        batch=32, epochs=100,
    ),
}  # fmt: skip
