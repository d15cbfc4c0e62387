"""The report as Markdown and JSON, from whatever the steps have left so far."""

import json
import pathlib
from dataclasses import dataclass, field
from typing import Any

from .. import goals, machine, report
from ..report import Record
from ..tables import head, row
from . import sections
from .running import Outcome
from .steps import steps

HEADING = "# {machine}\n\nWritten by `make gpu-report`: ratios are a rival's time over ours, above 1 ours is faster."


@dataclass
class Report:
    folder: pathlib.Path
    facts: dict[str, Any]
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: pathlib.Path, facts: dict[str, Any], is_new: bool) -> "Report":
        """With the outcomes of an earlier report, unless it is new."""
        earlier = folder / "report.json"
        kept = json.loads(earlier.read_text())["steps"] if earlier.exists() and not is_new else {}
        return cls(folder, facts, {name: Outcome(**outcome) for name, outcome in kept.items()})

    def records(self, step: str) -> list[Record]:
        """As far as the step came: it may have been cut within a line."""
        files = sorted((self.folder / step).glob("*.jsonl")) if step in self.outcomes else []
        lines = [line for file in files for line in file.read_text().splitlines(keepends=True)]
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def timed(self) -> dict[str, list[Record]]:
        """The records of each step that were taken on hardware."""
        found = {name: self.records(name) for name in self.outcomes}
        return {name: [r for r in records if not machine.is_simulated(r)] for name, records in found.items()}

    @property
    def verdicts(self) -> list[goals.Verdict]:
        return goals.judge([record for records in self.timed().values() for record in records])

    @property
    def is_bad(self) -> bool:
        missed = any(verdict.misses_must for verdict in self.verdicts)
        return missed or any(outcome.is_bad for outcome in self.outcomes.values())

    @property
    def summary(self) -> str:
        judged = [verdict for verdict in self.verdicts if verdict.value is not None]
        missed = [verdict for verdict in judged if verdict.misses_must]
        bad = [f"{name} {outcome.state}" for name, outcome in self.outcomes.items() if outcome.is_bad]
        unmeasured = len(self.verdicts) - len(judged)
        text = f"{len(missed)} of {len(judged)} measured goals miss their must, {unmeasured} not measured"
        return f"{text}; {', '.join(bad)}" if bad else text

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        done = {name: outcome.to_json() for name, outcome in self.outcomes.items()}
        verdicts = [verdict.to_json() for verdict in self.verdicts]
        whole = {"machine": self.facts, "steps": done, "summary": self.summary, "goals": verdicts}
        (self.folder / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
        (self.folder / "report.md").write_text("\n".join(self.lines()) + "\n")

    def lines(self) -> list[str]:
        label = machine.label(self.facts)
        facts = {key: self.facts[key] for key in ("backend", "driver", "cuda", "triton", "git", "time")}
        found = [HEADING.format(machine=label), "", ", ".join(f"{key} {value}" for key, value in facts.items()), ""]
        if machine.is_simulated(self.facts):
            found += ["**A simulated device: its times mean nothing, and are left out.**", ""]
        found += [f"**{self.summary[0].upper()}{self.summary[1:]}.**", ""]
        for title, lines in self.parts().items():
            if lines:
                found += [f"## {title}", "", *lines, ""]
        return found[:-1]

    def parts(self) -> dict[str, list[str]]:
        """The lines of each section; none where nothing was measured."""
        timed = self.timed()
        ours = {name: [r for r in records if "ours" in r["provider"].split()] for name, records in timed.items()}
        plots = report.plots(timed.get("kernels", []), self.folder / "kernels")
        return {
            "Steps": self.step_lines(),
            "Goals": [*head("goal", "measured", *goals.LEVELS), *(row(*verdict.cells) for verdict in self.verdicts)],
            "Prediction beside measurement": sections.predictions(
                self.folder / "static", ours.get("model", []), self.facts["gpu"] or ""
            ),
            "All weights in one launch": sections.network([*ours.get("model", []), *ours.get("compile", [])]),
            "Each shape": [
                *sections.shapes(ours.get("kernels", [])),
                *(f"\n![Speedup of each shape]({plot.relative_to(self.folder)})" for plot in plots),
            ],
            "Whole layers": sections.layers(ours.get("layers", [])),
            "Training steps": sections.training(ours.get("step", []), "step", 1e3, "ms"),
            "Peak memory of a training step": sections.training(ours.get("step", []), "step memory", 1e-6, "MB"),
            "The host's part": sections.host(ours.get("host", [])),
            "The kernels in ncu": sections.profile(self.folder / "profile" / "kernels.json"),
        }

    def step_lines(self) -> list[str]:
        found = head("step", "", "s", "what it said last")
        for step in steps():
            outcome = self.outcomes.get(step.name, Outcome("not reached"))
            found.append(row(f"{step.name}: {step.about}", outcome.state, f"{outcome.seconds:.0f}", cell(outcome.note)))
        return found


def cell(text: str) -> str:
    """Text of a program, in a table."""
    return text.replace("|", "\\|")
