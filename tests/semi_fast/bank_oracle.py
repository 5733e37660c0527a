"""The memory bank as a plain loop over candidates, following its rules word for word: what the kernels are held to."""

from __future__ import annotations

import numpy as np


class OracleBank:
    """Embeddings (K, S, d), confidences (K, S), rows (K, S), counts (K,), and the float32 prototype sums (K, d)."""

    def __init__(self, num_classes, width, *, size, beta, decay_every, rule, resum_every):
        self.embeddings = np.zeros((num_classes, size, width), np.float32)
        self.confidences = np.zeros((num_classes, size), np.float32)
        self.rows = np.full((num_classes, size), -1)
        self.counts = [0] * num_classes
        self.sums = np.zeros((num_classes, width), np.float32)
        self.oldest = [0] * num_classes  # fifo: the slot that goes next once the class is full
        self.taken = [0] * num_classes
        self.steps = 0
        self.size, self.beta, self.decay_every, self.rule = size, np.float32(beta), decay_every, rule
        self.resum_every = resum_every

    def push(self, candidates, classes, confidences, mask, rows):
        taken_before = list(self.taken)
        for embedding, k, confidence, on, row in zip(candidates, classes, confidences, mask, rows, strict=True):
            if on:
                self.offer(embedding, int(k), confidence, row)
        for k, (before, after) in enumerate(zip(taken_before, self.taken, strict=True)):
            if any(taken % self.resum_every == 0 for taken in range(before + 1, after + 1)):
                self.sum_anew(k)
        self.steps += 1
        if self.steps % self.decay_every == 0:
            for k, count in enumerate(self.counts):
                for slot in range(count):
                    self.confidences[k, slot] *= self.beta

    def offer(self, embedding, k, confidence, row):
        """Into class k: a free slot; else by the rule in place of another entry; else the candidate is dropped."""
        if self.counts[k] < self.size:
            slot = self.counts[k]
            self.counts[k] += 1
            self.sums[k] = self.sums[k] + embedding
        else:
            if self.rule == "fifo":
                slot = self.oldest[k]
                self.oldest[k] = (slot + 1) % self.size
            else:
                lowest = min(self.confidences[k])
                if not confidence > lowest:
                    return
                slot = list(self.confidences[k]).index(lowest)
            self.sums[k] = (self.sums[k] - self.embeddings[k, slot]) + embedding
        self.embeddings[k, slot] = embedding
        self.confidences[k, slot] = abs(confidence)  # they are 0 or more: what changes is the sign of -0
        self.rows[k, slot] = row
        self.taken[k] += 1

    def sum_anew(self, k):
        total = np.zeros(self.sums.shape[1], np.float64)
        for slot in range(self.counts[k]):
            total += self.embeddings[k, slot]
        self.sums[k] = total.astype(np.float32)
