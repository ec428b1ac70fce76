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
_REFERENCES = {"joint": ("0.35", "--", "*"), "fine-tune": ("0.35", ":", "x")}
"""Color, line and marker of the supervised baselines, which frame the others."""
_DODGE = 0.05  # steps between neighbouring presets, so that equal values do not hide each other


def plot_comparison(summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Draw four panels over the steps, in each a line per preset with its standard deviation, and write them as PNG.

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
    looks = _looks_of(presets)
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7.2), layout="constrained")
    axes = list(grid.flat)
    for axis, (name, label) in zip(axes, _PANELS, strict=True):
        for index, preset in enumerate(presets):
            shift = (index - (len(presets) - 1) / 2) * min(_DODGE, 0.5 / len(presets))
            _draw_line(axis, [s for s in summaries if s.preset == preset], name, looks[preset], shift)
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
        axis.set_ylabel("percent")
    figure.suptitle(title, fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    ncols = -(-len(labels) // -(-len(labels) // 6))  # rows of at most six, as even as they can be
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _looks_of(presets: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Give each preset a color, a line style and a marker."""
    looks = {}
    others = [preset for preset in presets if preset not in _REFERENCES]
    for index, preset in enumerate(others):
        turn, position = divmod(index, len(_COLORS))
        looks[preset] = (_COLORS[position], _STYLES[turn % len(_STYLES)], _MARKERS[(position + turn) % len(_MARKERS)])
    return {**looks, **_REFERENCES}


def _draw_line(axis: object, summaries: Sequence[Summary], name: str, look: tuple[str, str, str], shift: float) -> None:
    """Draw one preset in one panel; steps without a value are left out."""
    color, linestyle, marker = look
    known = sorted((s for s in summaries if s.mean[name] is not None), key=lambda s: s.step)
    axis.errorbar(  # type: ignore[attr-defined]
        [s.step + shift for s in known],
        [100 * (s.mean[name] or 0) for s in known],
        yerr=[100 * (s.std[name] or 0) for s in known],
        label=summaries[0].preset,
        color=color,
        marker=marker,
        linestyle=linestyle,
        linewidth=1.6,
        markersize=6,
        capsize=2.5,
        elinewidth=1,
    )
