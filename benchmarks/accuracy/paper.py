"""What the paper reports (arXiv 2010.07160), errors in percent. Its networks and data are not ours, so only the
order and the rough size of differences can be compared."""

# CIFAR-100, read off a plot: by norm, at each batch size.
BATCHES = (64, 8, 4, 2)
BATCH_SWEEP = {
    "VGG16": {"BN": (28, 29, 33, 98), "WA": (27, 27, 28, 28)},
    "ResNet-18": {"BN": (24.6, 23.5, 23.8, 29.0), "WA": (24.9, 25.0, 26.8, 25.6)},
}
# ResNet-50, batch 64: without and with alignment. Without a norm the network is Fixup's.
NORMS = {
    "CIFAR-100": {
        "none": (28.43, 24.92), "bn": (23.02, 22.39), "gn": (25.46, 23.64), "ln": (26.78, 24.01), "in": (25.58, 24.63)
    },
    "CIFAR-10": {
        "none": (6.46, 6.21), "bn": (4.30, 4.29), "gn": (4.96, 4.60), "ln": (5.02, 5.12), "in": (6.49, 6.42)
    },
}  # fmt: skip
# CIFAR-100; None: does not train.
ABLATION: dict[str, dict[str, float | None]] = {
    "VGG16": {"none": None, "centre": 35.74, "scale": None, "wa": 27.85},
    "ResNet-18": {"none": 28.23, "centre": 27.97, "scale": 28.03, "wa": 24.92},
}
SCALES = {"half": "slightly worse", "double": "slightly worse", "four": "does not train"}
# Office-31, mean accuracy.
SHIFT = {"WA": 56.89, "BN": 58.48, "LN+WA": 60.68}
