"""What a method declares about a figure it logs, so that log, report and dashboard can show it without knowing it."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """A figure of a method's own."""

    name: str  # its key in the log, "pseudo/mixing"
    unit: str  # "share" (0..1), "percent", "" (a number), or "distribution" (one value a class)
    meaning: str  # a sentence for people


USED = Figure("pseudo/used", "share", "Share of the unlabeled images whose pseudo-label is used.")
CONFIDENCE = Figure("pseudo/confidence", "share", "Mean confidence of the pseudo-labels, used or not.")
BALANCED_USED = Figure("pseudo/balanced_used", "share", "Share of the unlabeled images the balanced head learns from.")
MIXING = Figure("pseudo/mixing", "share", "Mean weight of the semantic pseudo-label in the mixed one.")
