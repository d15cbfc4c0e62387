"""python -m benchmarks.gpu_report: builds, tests and measures on the GPU that is here, and reports how it did.

Ten minutes in all, in steps (steps.py) that run apart, each within its own limit. The report is written again after
each: a cut leaves what was done until then. Needs torch and numpy; without pytest, rich, scipy, matplotlib, timm,
torchvision, compute-sanitizer or ncu what they would add is left out, and the report says so.

Writes benchmarks/results/<machine>/report.md, report.json and a folder for each step, with its log, records and plots.
Exits with 1 if a goal's must is missed, or if a step failed or was cut.
"""
