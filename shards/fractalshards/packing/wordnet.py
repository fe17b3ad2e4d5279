"""WordNet's identifiers of synsets, such as n01440764, by which ImageNet names its classes."""

import re
from collections.abc import Iterable

_SYNSET = re.compile(r"n\d{8}", re.ASCII)


def are_synsets(names: Iterable[str]) -> bool:
    """Whether all names are identifiers of WordNet's nouns."""
    return all(_SYNSET.fullmatch(name) for name in names)
