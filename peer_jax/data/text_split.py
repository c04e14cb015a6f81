"""Divides a corpus so that validation has a given share of its *text*, whatever the sizes of its documents.

Documents are taken in the order of their keys, which are hashes of their texts, until the share is reached. A document
that is large compared with the share gives only its last part to validation, and trains with the rest. Copies of a text
have the same key and are divided in the same way.
"""

from collections.abc import Iterable
from typing import NamedTuple

PARTS = 8  # validation is of at least so many documents, if there are so many
LEAST_BYTES = 64  # shorter documents are not divided


class TextSplit(NamedTuple):
    """Which documents validation has, and how much of each.

    Attributes:
        part: documents with a smaller key than `last_key` give at most this many of their last bytes.
        last_key: the key of the document that reaches the share.
        last_part: the number of its last bytes that validation has; all if it is the document's size.
        is_of_one: all documents are copies of one, which is therefore divided whatever its size.
    """

    part: int
    last_key: int
    last_part: int
    is_of_one: bool = False

    def divide(self, text: str, key: int, size: int) -> tuple[str, str]:
        """The parts of a document that are for training and for validation; one may be empty.

        Args:
            text: the document.
            key: its key.
            size: its size in bytes.
        """
        wanted = self.part if key < self.last_key else self.last_part if key == self.last_key else 0
        if wanted >= size:
            return "", text
        if wanted == 0:
            return text, ""
        return _divide(text, max(1, round(wanted * len(text) / size)))


def plan(documents: Iterable[tuple[int, int]], share: float) -> TextSplit | None:
    """The split that comes nearest to a share of the text.

    Args:
        documents: the key (below 2**64) and the size in bytes of each document; copies have the same key.
        share: of validation, between 0 and 1.

    Returns:
        The split, or None if there are no documents. Neither side is empty, unless a lone document can't be divided.
    """
    import numpy as np  # imported here, so that naming a corpus stays cheap

    flat = np.fromiter((value for pair in documents for value in pair), np.uint64).reshape(-1, 2)
    if not len(flat):
        return None
    keys, first, copies = np.unique(flat[:, 0], return_index=True, return_counts=True)
    sizes = flat[first, 1].astype(np.int64)
    target = share * float(sizes @ copies)
    if len(keys) == 1:
        return TextSplit(0, int(keys[0]), max(1, int(target / copies[0])), is_of_one=True)
    part = max(LEAST_BYTES, int(target / PARTS))
    while np.minimum(sizes, part) @ copies < target:
        part *= 2
    given = np.minimum(sizes, part)
    reached = np.cumsum(given * copies)
    last = int(np.searchsorted(reached, target))
    size, missing = int(sizes[last]), (target - (reached[last - 1] if last else 0)) / int(copies[last])
    near = max(target / (2 * PARTS) / int(copies[last]), size / 2 if size <= LEAST_BYTES else 0)
    if missing <= near:  # rather not at all than a scrap
        missing = 0
    elif size <= part and size - missing <= near:  # rather whole
        missing = size
    if missing < 1 and last > 0:
        last, missing = last - 1, int(given[last - 1])
    if last == len(keys) - 1 and missing >= size and (given == sizes).all():  # nothing would be left to train on
        last, missing = last - 1, int(given[last - 1])
    least = min(LEAST_BYTES, int(given[last])) if last == 0 else 1
    return TextSplit(part, int(keys[last]), max(round(missing), least))


def _divide(text: str, chars: int) -> tuple[str, str]:
    """Divides a text before about its last `chars` characters, at the end of a line or else of a word nearby.

    Blanks at the end of the text are not counted. What would be blank is not divided from the rest.
    """
    at, slack = max(0, len(text.rstrip()) - chars), max(1, chars // 4)
    for separator in ("\n", " "):
        for found in (text.rfind(separator, max(0, at - slack), at), text.find(separator, at, at + slack)):
            if found >= 0 and text[: found + 1].strip() and text[found + 1 :].strip():
                return text[: found + 1], text[found + 1 :]
    head, tail = text[:at], text[at:]
    return (head, tail) if head.strip() and tail.strip() else (text, "")
