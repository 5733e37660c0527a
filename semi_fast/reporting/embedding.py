"""Figure 4: the embeddings of the test images in the plane, by t-SNE."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from semi_fast.reporting.drawing import INK, MUTED, Figure, figure
from semi_fast.reporting.rundata import Predictions, RunData, sample

MOST = 1000  # embeddings drawn: scikit-learn needs some seconds for these
LABELED = 24  # classes whose names are written over their points
# Ten hues of a middling lightness, seen on white and on black; with names beside them, since ten cannot all differ.
HUES = ("#1f77b4", "#e0701a", "#2e9e62", "#c94f4f", "#8a6bbf", "#8c6a4f", "#d678b5", "#7f8894", "#a9a42c", "#2aa7b8")


def embedding_figures(
    run: RunData, test: Predictions, *, name: str = "tsne", title: str = "True class", heads: bool = True
) -> list[Figure]:
    """The map colored by the true class and by what each head predicts: before and after the choice of head.

    name: of the files, what each view is called behind it. title: of the first map. heads: whether to draw the others.
    """
    if len(test.rows) < 3:
        return []
    chosen = sample(np.arange(len(test.rows)), MOST)
    points = project(test.features[chosen])
    count = len(chosen)
    caption = f"{count:,} of the {test.total:,} test images." if count < test.total else f"All {count:,} test images."
    views = [("true", title, test.labels)]
    views += [(head, f"By the {head} head", test.classes[head]) for head in reversed(test.heads) if heads]
    return [
        _map(run, f"{name}_{view}", text, points, classes[chosen], test.labels[chosen], caption)
        for view, text, classes in views
    ]


def project(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """t-SNE of features (n, d), n >= 3 -> (n, 2), the same every time for the same features."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if not np.ptp(features, axis=0).any():  # a network that has learned nothing yet
        return np.zeros((len(features), 2))
    size = min(50, *features.shape)
    reduced = PCA(size, random_state=0).fit_transform(features.astype(np.float64))
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=0).fit_transform(reduced)


def _map(
    run: RunData,
    name: str,
    title: str,
    points: NDArray[np.float64],
    classes: NDArray[np.int64],
    truth: NDArray[np.int64],
    caption: str,
) -> Figure:
    order = run.order
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    many = len(order) > LABELED
    # Many classes cannot all have a hue of their own: theirs tells how many labels they have.
    hues = [HUES[3 * int(r) // len(order)] if many else HUES[int(r) % len(HUES)] for r in rank]

    def draw(axes: Any) -> None:
        axes.set_aspect("equal", adjustable="datalim")
        colors = [hues[k] if k >= 0 else MUTED for k in classes]
        axes.scatter(*points.T, s=9, c=colors, lw=0, alpha=0.75, rasterized=len(points) > 500)
        axes.set_axis_off()
        if not many:
            for k in order:
                members = points[classes == k]
                if len(members):  # at the point nearest to the median: inside the largest heap
                    middle = members[np.argmin(((members - np.median(members, 0)) ** 2).sum(1))]
                    axes.text(*middle, run.class_names[k], ha="center", va="center", color=INK, weight="bold")
        else:
            for hue, group in zip(HUES, ("many labels", "middling", "few labels"), strict=False):
                axes.plot([], [], "o", color=hue, label=group)

    names = [*(run.info.class_names if run.info else [""] * len(order)), ""]  # the last one: unknown
    table = [(*point, names[k], names[t]) for point, k, t in zip(points.tolist(), classes, truth, strict=True)]
    header = ("x", "y", "class", "true class")
    return figure(name, title, draw, header, table, caption=caption, height=340)
