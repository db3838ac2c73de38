"""Text that is on every machine."""

from __future__ import annotations

from collections.abc import Sequence


def prose(topics: Sequence[str]) -> str:
    """The paragraphs of chapters of Python's language reference, as `pydoc` carries it, without code and headings."""
    from pydoc_data.topics import topics as chapters

    paragraphs = "\n\n".join(chapters[topic] for topic in topics).split("\n\n")
    kept = [text for text in paragraphs if text[:1].isalpha() and text.rstrip().endswith(".") and "\n " not in text]
    return "\n\n".join(" ".join(text.split()) for text in kept)
