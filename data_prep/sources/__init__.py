"""Where images come from: one module a collection, each giving a `Source`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from data_prep.sources.images import Images


class Source(ABC):
    """A raw collection on disk.

    `class_names`: K names in the data set's own class order. `description`: what it is, for the manifest.
    `notes`: what the user should know of it, in one sentence each.
    Opening it checks it: a source that is missing, incomplete or of the wrong checksum raises UserError, which says
    what is missing and where to get it.
    """

    class_names: tuple[str, ...]
    description: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def open_split(self, split: str) -> Images:
        """The images of "train", "test", or, where the collection has one, "unlabeled", in the data set's order."""

    def unusable(self, split: str) -> dict[int, str]:
        """Images of a split that cannot be used whatever they hold: index -> reason."""
        return {}
