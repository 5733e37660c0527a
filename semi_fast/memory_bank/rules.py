"""The bank's rules for one candidate and one coordinate: plain Python, compiled for every target.

Each function works on scalars and says all there is to say about the outcome; the kernels only decide in which order
memory is walked. Arguments have one dtype (float32 or int64), so that no target widens what another does not.
"""

from __future__ import annotations


def slot_by_confidence(stored, size, confidence, lowest, lowest_slot):
    """Where a candidate goes under the rule "confidence", or -1 when it is dropped.

    Args:
        stored: entries of the class, 0..size. size: slots of a class, S.
        confidence: the candidate's.
        lowest: lowest stored confidence of the class; lowest_slot: its first slot. Read only when the class is full.
    """
    if stored < size:
        return stored
    if confidence > lowest:
        return lowest_slot
    return -1


def slot_by_age(pushed, size):
    """Where a candidate goes under the rule "fifo": the free slot, else the oldest. pushed: entries ever taken in."""
    return pushed % size


def goes_first(confidence, slot, other_confidence, other_slot):
    """Whether one entry of a full class is replaced before another: the lower confidence, then the lower slot."""
    return confidence < other_confidence or (confidence == other_confidence and slot < other_slot)


def taken_into(total, new):
    """A coordinate of the prototype sum after an entry took a free slot."""
    return total + new


def exchanged_in(total, old, new):
    """A coordinate of the prototype sum after an entry replaced another; the order of the two roundings is fixed."""
    return (total - old) + new


def resum_due(before, after, every):
    """Whether a class must be summed anew, its entries ever taken in having gone from ``before`` to ``after``."""
    return before // every != after // every
