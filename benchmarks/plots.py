"""`python -m benchmarks plot`: heat maps of the speed-up, and rooflines, as PNG and SVG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from . import common, suite

WIDEST = 8.0  # a speed-up, or a slow-down, from which on the colour is the same
COLOURS = {"torch.nn": "tab:gray", "fusedrnn": "tab:red"}
MARKERS = {"LSTM": "o", "GRU": "s", "RNN": "^"}


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=120)
    return paths


def plot(content: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Two pictures for each dtype and number of threads of the CPU; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        if "failed" not in row and row["steps"] > 1:
            groups.setdefault((row["dtype"], row["threads"]), []).append(row)
    paths = []
    for (dtype, threads), rows in groups.items():
        where = f"{dtype}" + (f"-threads{threads}" if threads else "")
        for kind, draw in (("heatmap", heat_maps), ("roofline", rooflines)):
            if kind == "roofline" and not threads:
                continue  # the limits are the CPU's
            figure = draw(plt, content, rows, dtype, threads)
            paths += save(figure, folder, f"{stem}-{kind}-{where}")
            plt.close(figure)
    return paths


def subtitle(content: dict[str, Any], dtype: str, threads: int | None) -> str:
    machine = content["environment"]
    device = f"{machine['cpu']} ({machine['isa']}), threads: {threads}"
    noisy = any(noise["noisy"] for noise in content["noise"].values())
    text = f"{dtype}; {device if threads else machine['gpu']}; torch {machine['torch']}"
    return text + "; BUSY OR NOISY MACHINE" * noisy


def heat_maps(
    plt: Any, content: dict[str, Any], rows: list[dict[str, Any]], dtype: str, threads: int | None
) -> Any:
    """A panel for each cell and mode; of several lengths at one batch and size, the longest."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle

    longest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["steps"]):
        longest[row["cell"], row["mode"], row["batch"], row["size"]] = row
    batches = sorted({key[2] for key in longest})
    sizes = sorted({key[3] for key in longest})
    cells = [cell for cell in common.CELLS if any(key[0] == cell for key in longest)]
    modes = [mode for mode in suite.MODES if any(key[1] == mode for key in longest)]
    width, height = 1 + 0.62 * len(sizes), 1 + 0.42 * len(batches)  # inches a panel
    figure, axes = plt.subplots(
        len(modes),
        len(cells),
        figsize=(max(8, 1.6 + len(cells) * width), 1.4 + len(modes) * height),
        squeeze=False,
        layout="constrained",
    )
    widest = math.log2(WIDEST)
    norm = TwoSlopeNorm(0, -widest, widest)
    for mode, line in zip(modes, axes, strict=True):
        for cell, panel in zip(cells, line, strict=True):
            image = panel.imshow(
                [
                    [
                        math.log2(longest[cell, mode, batch, size]["peers"]["torch.nn"]["ratio"])
                        if (cell, mode, batch, size) in longest
                        else math.nan
                        for size in sizes
                    ]
                    for batch in batches
                ],
                cmap="RdBu",
                norm=norm,
                aspect="auto",
            )
            panel.set_facecolor("0.92")
            for y, batch in enumerate(batches):
                for x, size in enumerate(sizes):
                    if (cell, mode, batch, size) not in longest:
                        continue
                    value = longest[cell, mode, batch, size]["peers"]["torch.nn"]["ratio"]
                    dark = abs(math.log2(value)) > 0.65 * widest
                    panel.text(
                        x, y, f"{value:.1f}" if value >= 10 else f"{value:.2f}",
                        ha="center", va="center", fontsize=9,
                        color="white" if dark else "black",
                        weight="bold" if value < 1 else "normal",
                    )  # fmt: skip
                    if value < 1:
                        frame = Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False)
                        frame.set(edgecolor="darkred", linewidth=2.5)
                        panel.add_patch(frame)
            panel.set_title(f"{cell}, {mode}", fontsize=10)
            panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            panel.set_yticks(range(len(batches)), [str(batch) for batch in batches])
            panel.set_xlabel("hidden size H")
            panel.set_ylabel("batch B")
    ticks = range(-int(widest), int(widest) + 1)
    bar = figure.colorbar(image, ax=axes, ticks=list(ticks))
    bar.ax.set_yticklabels([f"{2.0**tick:g}" for tick in ticks])
    bar.set_label("times faster than torch.nn")
    steps = sorted({row["steps"] for row in longest.values()})
    length = f"T = {steps[0]}" if len(steps) == 1 else f"T = {steps[0]} to {steps[-1]}"
    figure.suptitle(
        f"Speed-up over torch.nn, one layer, {length}; framed: slower; gray: not measured\n"
        + subtitle(content, dtype, threads),
        fontsize=10,
    )
    return figure


def rooflines(
    plt: Any, content: dict[str, Any], rows: list[dict[str, Any]], dtype: str, threads: int | None
) -> Any:
    """GFLOP/s against operations a byte, both axes logarithmic, and the rates of limits.py."""
    limit = content["limits"][str(threads)]
    peak = limit["gemm"][dtype]
    modes = [mode for mode in suite.MODES if any(row["mode"] == mode for row in rows)]
    figure, axes = plt.subplots(
        1, len(modes), figsize=(1.5 + 5 * len(modes), 5), squeeze=False, layout="constrained",
        sharex=True, sharey=True,
    )  # fmt: skip
    intensities = [row["flop_per_byte"] for row in rows]
    low, high = min(intensities) / 2, max(*intensities, peak / limit["memory"]) * 2
    for mode, panel in zip(modes, axes[0], strict=True):
        for name, style in (("l2", "-"), ("memory", "--")):
            rate = limit[name]
            label = {"l2": "L2", "memory": "memory"}[name]
            corner = peak / rate
            xs = [low, min(max(corner, low), high), high]
            panel.plot(
                xs, [min(peak, x * rate) for x in xs], style, color="black", linewidth=1,
                label=f"{label}, {rate:.0f} GB/s; torch.mm, {peak:.0f} GFLOP/s",
            )  # fmt: skip
        for cell, marker in MARKERS.items():
            for name, key in (("torch.nn", "torch_gflops"), ("fusedrnn", "gflops")):
                points = [row for row in rows if (row["cell"], row["mode"]) == (cell, mode)]
                if points:
                    panel.scatter(
                        [row["flop_per_byte"] for row in points], [row[key] for row in points],
                        marker=marker, s=36, alpha=0.75, color=COLOURS[name],
                        linewidths=0.5, edgecolors="black", label=f"{cell}, {name}",
                    )  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xlim(low, high)
        panel.set_title(mode, fontsize=10)
        panel.set_xlabel("operations a byte (FLOP/byte)")
        panel.grid(which="both", alpha=0.2)
    axes[0][0].set_ylabel("GFLOP/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(
        "Roofline: rates of one layer; of torch.mm, L2 and memory in the same run\n"
        + subtitle(content, dtype, threads),
        fontsize=10,
    )
    return figure
