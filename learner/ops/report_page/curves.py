# Copied from clients/web/charts/curves.py by `make docs`: write there, not here.
"""Training curves of a round: a chart for each metric of its steps."""

from collections.abc import Mapping
from typing import Any

from learner.ops.report_page.chart import Chart, curve

# (metric of a step, title, unit)
FIGURES = (
    ("score", "Score and its uncertainty", "sd of reference answers"),
    ("kl", "KL to the reference", "nats per answer"),
    ("length", "Answer length", "tokens"),
    ("entropy", "Entropy", "nats per token"),
    ("clipfrac", "Clipped ratios", "share of tokens"),
    ("value_loss", "Value loss", "squared score"),
    ("mismatch_rms", "Trainer vs. engine", "rms of log-ratio"),
    ("kl_coef", "KL penalty weight", ""),
)
KL_LEVELS = (("kl_target", "target"), ("kl_budget", "budget"))


def step_curves(improvement: Mapping[str, Any], chosen: float | None) -> list[Chart]:
    """A chart for each metric that every step has, from a round's `improvement`; the step `chosen` is marked."""
    steps = improvement.get("steps", [])
    levels = [(level, words) for name, words in KL_LEVELS if (level := improvement.get(name))]
    return [
        curve(
            title,
            unit,
            [step["step"] for step in steps],
            [step[name] for step in steps],
            spread=[step.get("uncertainty", 0.0) for step in steps] if name == "score" else (),
            levels=levels if name == "kl" else (),
            # For all other metrics zero is meaningful, and including it keeps noise from looking like a trend.
            zero=name != "score",
            mark=chosen,
        )
        for name, title, unit in FIGURES
        if steps and all(step.get(name) is not None for step in steps)
    ]


def epoch_curves(sft: Mapping[str, Any]) -> list[Chart]:
    """The losses of a round that learned from demonstrations, by pass, from its `sft`; the chosen pass is marked."""
    epochs, chosen, unit = sft["epochs"], sft["chosen"], "nats per token"
    trained = [epoch for epoch in epochs if epoch.get("loss") is not None]
    held_out = [epoch["held_out"] for epoch in epochs]
    return [
        curve(
            "Loss on examples held out", unit, [epoch["number"] for epoch in epochs], held_out, zero=False, mark=chosen
        ),
        curve(
            "Loss of the pass",
            unit,
            [epoch["number"] for epoch in trained],
            [epoch["loss"] for epoch in trained],
            zero=False,
            mark=chosen,
        ),
    ]
