"""The paper's claims as differences between measured quantities."""

from collections.abc import Sequence
from dataclasses import dataclass

from . import experiments, paper
from .logs import Record
from .measured import Estimate, Table, error_shifted, estimate, less, paired

Records = dict[str, list[Record]]


@dataclass(frozen=True)
class Claim:
    """`difference` is in percentage points of error, and positive if the claim holds."""

    text: str
    paper: str
    difference: Estimate | None

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return "not run"
        return {1: "holds", 0: "open", -1: "contradicted"}[self.difference.sign]


def all_claims(records: Records) -> list[Claim]:
    return [
        *batch_claims(records["batch"]),
        *norm_claims(records["norms"]),
        *ablation_claims(records["ablation"]),
        *shift_claims(records["norms"]),
    ]


def batch_claims(records: Sequence[Record]) -> list[Claim]:
    """Batch norm loses more than alignment does when the batch shrinks."""
    table, claims = Table(records), []

    def growth(norm: str, align: str, size: int) -> dict[int, float]:
        """Of the error, from batch 64 to a smaller one."""
        small, large = (table.by_seed(norm=norm, align=align, batch=each) for each in (size, 64))
        return less(small, large)

    for size in (2, 1):
        said = [f"{name}: {by['BN'][-1] - by['BN'][0] - by['WA'][-1] + by['WA'][0]:.1f}" for name, by in SWEEP]
        difference = paired(growth("bn", "none", size), growth("none", "wa", size))
        text = f"error(batch {size}) - error(batch 64): larger for BN than for WA, by"
        claims.append(Claim(text, "; ".join(said) if size == 2 else "", difference))
    for size in experiments.BATCHES:
        difference = table.difference(
            {"norm": "gn", "align": "none", "batch": size}, {"norm": "gn", "align": "wa", "batch": size}
        )
        claims.append(Claim(f"GN+WA is better than GN at batch {size}, by", "", difference))
    return claims


SWEEP = list(paper.BATCH_SWEEP.items())


def norm_claims(records: Sequence[Record]) -> list[Claim]:
    """Alignment improves a network with each norm."""
    table, claims = Table(records), []
    for norm in dict.fromkeys(norm for norm, _ in experiments.EACH_NORM):
        said = (f"{data}: {by[norm][0] - by[norm][1]:.2f}" for data, by in paper.NORMS.items())
        difference = table.difference({"norm": norm, "align": "none"}, {"norm": norm, "align": "wa"})
        name = "no norm" if norm == "none" else norm.upper()
        claims.append(Claim(f"WA improves {name} at batch 64, by", "; ".join(said), difference))
    return claims


def ablation_claims(records: Sequence[Record]) -> list[Claim]:
    """The whole formula is better than each half and than other scales."""
    table, claims = Table(records), []
    for network in experiments.ABLATED:
        by = paper.ABLATION["VGG16" if "vgg" in network else "ResNet-18"]
        for align in (each for each in experiments.ABLATION if each not in ("wa", "corrected")):
            said = paper.SCALES.get(align, "")
            if align in by:
                value, whole = by[align], by["wa"]
                said = "does not train" if value is None or whole is None else f"{value - whole:.2f}"
            difference = table.difference({"network": network, "align": align}, {"network": network, "align": "wa"})
            claims.append(Claim(f"{network}: WA is better than {VARIANTS[align]}, by", said, difference))
        corrected = ({"network": network, "align": align} for align in ("wa", "corrected"))
        text = f"(not of the paper) {network}: {VARIANTS['corrected']} is better than WA, by"
        claims.append(Claim(text, "", table.difference(*corrected)))
    return claims


VARIANTS = {
    "none": "plain weights",
    "centre": "centring alone",
    "scale": "scaling alone",
    "wa": "WA",
    "half": "half the scale",
    "double": "twice the scale",
    "four": "four times the scale",
    "corrected": "1.21 times the scale",
}


def label_of(norm: str, align: str) -> str:
    parts = ([norm.upper()] if norm != "none" else []) + ([] if align == "none" else [VARIANTS[align]])
    return " + ".join(parts) or "plain, He's initialisation"


def shift_claims(records: Sequence[Record]) -> list[Claim]:
    """On other domains LN+WA is better than BN."""
    table, by = Table(records, error_shifted), paper.SHIFT
    bn = {"norm": "bn", "align": "none"}
    aligned = {"WA": {"norm": "none", "align": "wa"}, "LN+WA": {"norm": "ln", "align": "wa"}}
    return [
        Claim(
            f"tested on other domains, {label} is better than BN, by",
            f"Office-31: {by[label] - by['BN']:.2f}",
            table.difference(bn, fields),
        )
        for label, fields in aligned.items()
    ]


def variance_factor(record: Record, field: str = "start_variance", layer: int = 50) -> float:
    """From the first layer to that one."""
    return float(record[field][layer - 1] / record[field][0])


def variance_by_layer(records: Sequence[Record], field: str, layer: int) -> Estimate | None:
    """The factor by which the variance changes in one layer, on average."""
    found = [variance_factor(r, field, layer) for r in records if field in r]
    usable = [max(each, 1e-300) ** (1 / (layer - 1)) for each in found if each == each]
    return estimate(usable) if usable else None
