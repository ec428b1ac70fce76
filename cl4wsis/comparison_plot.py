"""The picture of a comparison: AP50 and forgetting of every preset, step by step.

matplotlib is imported when it runs.
"""

from collections.abc import Sequence
from pathlib import Path

from cl4wsis.comparison import Summary

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
"""Told apart with every kind of color vision (Okabe and Ito); yellow, too pale for lines, is replaced by olive."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLES = ("-", "--", "-.", ":")
_PANELS = (
    ("ap50_all", "AP50, all classes"),
    ("ap50_old", "AP50, old classes"),
    ("ap50_new", "AP50, new classes"),
    ("forgetting", "forgetting (AP50 points lost)"),
)
_DODGE = 0.05  # steps between neighbouring presets, so that equal values do not hide each other


def plot_comparison(summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Draw four panels over the steps, a line per preset with its standard deviation, and write them as PNG.

    Args:
        summaries: of all presets and steps.
        title: above the panels.
        path: of the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    presets = list(dict.fromkeys(summary.preset for summary in summaries))
    steps = sorted({summary.step for summary in summaries})
    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(3.6 * len(_PANELS), 3.9), layout="constrained")
    for axis, (name, label) in zip(axes, _PANELS, strict=True):
        for index, preset in enumerate(presets):
            shift = (index - (len(presets) - 1) / 2) * min(_DODGE, 0.5 / len(presets))
            _draw_line(axis, [s for s in summaries if s.preset == preset], name, index, shift)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
        axis.set_xticks([step for step in steps if step or name in ("ap50_all", "ap50_new")])
        axis.margins(x=0.12)
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if name == "forgetting":
            axis.axhline(0, color="0.5", linewidth=0.8)
        else:
            axis.set_ylim(bottom=0)
    axes[0].set_ylabel("percent")
    figure.suptitle(title, fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _draw_line(axis: object, summaries: Sequence[Summary], name: str, index: int, shift: float) -> None:
    """Draw one preset in one panel; steps without a value are left out."""
    known = sorted((s for s in summaries if s.mean[name] is not None), key=lambda s: s.step)
    axis.errorbar(  # type: ignore[attr-defined]
        [s.step + shift for s in known],
        [100 * (s.mean[name] or 0) for s in known],
        yerr=[100 * (s.std[name] or 0) for s in known],
        label=summaries[0].preset,
        color=_COLORS[index % len(_COLORS)],
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle=_STYLES[index // len(_COLORS) % len(_STYLES)],
        linewidth=1.6,
        markersize=5,
        capsize=2.5,
        elinewidth=1,
    )
