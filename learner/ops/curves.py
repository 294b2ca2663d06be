"""A round's training in one picture: eight small panels over the steps, the chosen step marked."""

from pathlib import Path

from server.store.learning.round_metrics import Improvement

# (figure of a step, title, unit)
PANELS = (
    ("score", "Score, and its uncertainty", "sd of reference answers"),
    ("kl", "KL to the reference", "nats an answer"),
    ("length", "Answer length", "tokens"),
    ("entropy", "Entropy", "nats a token"),
    ("clipfrac", "Clipped ratios", "share of tokens"),
    ("value_loss", "Value loss", "squared score"),
    ("mismatch_rms", "Trainer against engine", "rms of log-ratio"),
    ("kl_coef", "KL penalty's weight", ""),
)
# Everywhere else zero means something, and an axis that shows it keeps noise from looking like a trend.
FREE = "score"
LINE, LIMIT, CHOSEN = "#1f5fa8", "#b04a3a", "#6b6b6b"


def draw_curves(improvement: Improvement, chosen: int | None, kl_target: float, kl_budget: float, path: Path) -> None:
    """Writes a PNG. `chosen` is the step that the gate chose; `kl_target` and `kl_budget` are the round's, in nats."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [vars(step) for step in improvement.steps]
    figure = Figure(figsize=(13, 6), layout="constrained")
    for axes, (name, title, unit) in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        numbers, values = [step["step"] for step in steps], [step[name] for step in steps]
        axes.plot(numbers, values, color=LINE, marker="o", markersize=3, linewidth=1.5)
        if name == "score":
            low = [step["score"] - step["uncertainty"] for step in steps]
            high = [step["score"] + step["uncertainty"] for step in steps]
            axes.fill_between(numbers, low, high, color=LINE, alpha=0.15, linewidth=0)
        if name == "kl":
            axes.axhline(kl_target, color=CHOSEN, linestyle=":", linewidth=1, label="target")
            axes.axhline(kl_budget, color=LIMIT, linestyle="--", linewidth=1, label="budget")
        if chosen is not None:
            # Step n's figures are of the weights after n updates, which is what candidate n is.
            axes.axvline(chosen, color=CHOSEN, linewidth=0.8, label="chosen")
        if name == "kl":
            axes.legend(fontsize=8, frameon=False)
        axes.margins(y=0.1)
        if name != FREE:
            axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel(unit, fontsize=8)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    figure.savefig(path, dpi=110)
