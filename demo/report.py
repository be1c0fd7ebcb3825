"""The demo's table and its pictures."""

from __future__ import annotations

from pathlib import Path

from measure import Result

__all__ = ["print_table", "save_plot", "save_training_plot"]

MB = 1e6

HEADINGS = (
    ("", "format"),
    ("linear", "weights"),
    ("", "ratio"),
    ("checkpoint", "file"),
    ("", "ratio"),
    ("cosine to fp32", "mean"),
    ("cosine to fp32", "worst"),
    ("rank correlation", "to fp32"),
    ("rank correlation", "to grades"),
    ("sentences", "per second"),
)


def print_table(results: list[Result]) -> None:
    """One row a format; the first result is the reference of the ratios."""
    first = results[0]
    rows = [
        (
            r.name,
            f"{r.weight_bytes / MB:.2f} MB",
            f"{first.weight_bytes / r.weight_bytes:.2f}x",
            f"{r.file_bytes / MB:.2f} MB",
            f"{first.file_bytes / r.file_bytes:.2f}x",
            f"{r.mean_cosine:.5f}",
            f"{r.worst_cosine:.5f}",
            f"{r.rank_correlation:.4f}",
            f"{r.grade_correlation:.4f}",
            f"{r.sentences_per_second:.0f}",
        )
        for r in results
    ]
    columns = list(zip(*[[top for top, _ in HEADINGS], [low for _, low in HEADINGS], *rows], strict=True))
    widths = [max(map(len, column)) for column in columns]
    print()
    for index, cells in enumerate(zip(*columns, strict=True)):
        if index == 2:
            print("  ".join("-" * width for width in widths))
        first_cell, *others = cells
        line = [first_cell.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(line).rstrip())
    print()


def save_plot(results: list[Result], path: Path) -> None:
    """Left: how each pair's similarity moved. Right: size against what was lost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    reference, *quantized = results
    left.axline((0, 0), slope=1, color="0.8", linewidth=1)
    for index, r in enumerate(quantized):
        style = {"color": f"C{index}", "marker": "osDxv^"[index], "label": r.name, "alpha": 0.8}
        left.scatter(reference.similarities, r.similarities, s=14, **style)
        right.scatter(r.weight_bytes / MB, 1 - r.mean_cosine, s=60, **style)
    left.set(xlabel="similarity of the pair, fp32", ylabel="similarity, quantized", title="Sentence pairs")
    right.set(
        xlabel="linear weights, MB", ylabel="1 - mean cosine to fp32", title="Size and loss", yscale="log"
    )
    right.axvline(reference.weight_bytes / MB, color="0.6", linestyle="--", linewidth=1, label="size of fp32")
    right.set_xlim(left=0)
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save_training_plot(curves: dict[str, list[float]], path: Path) -> None:
    """Loss against step, one curve a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(losses) + 1), losses, style, label=name)
    axes.set(
        xlabel="step", ylabel="loss of the batch", title="Adapters on a frozen NF4 model", ylim=(0, None)
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
