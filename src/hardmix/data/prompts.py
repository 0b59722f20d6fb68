"""Texts that stand for a class: its name in several sentences, whose embeddings are averaged."""

from __future__ import annotations

import re

#: as for CLIP, of which each class has the mean; the bare name counts like the others
TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "an icon of {}", "something of {}")


def prompts(class_name: str) -> list[str]:
    """The texts of one class; what joins words in names of files and groups becomes a space.

    >>> prompts("animals-nature")[:2]
    ['animals nature', 'a picture of animals nature']
    """
    words = re.sub(r"[-_\s]+", " ", class_name).strip()
    return [template.format(words) for template in TEMPLATES]
