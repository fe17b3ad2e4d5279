"""A unit: what a kind renders in one go, and the identity that its random numbers come from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """The ``number``-th render of a class in a split.

    Attributes:
        seed: of the recipe.
        split: ``train`` or ``val``.
        label: class index; kinds whose images show several classes take it as part of the identity only.
        number: counts the renders of the class in the split from 0.
        before: renders of a class in the splits before this one, at most; for kinds that number renders on.
    """

    seed: int
    split: str
    label: int
    number: int
    before: int = 0

    def identity(self) -> tuple[str | int, ...]:
        """What ``rng.Stream.of`` takes after the name of the kind."""
        return self.seed, self.split, self.label, self.number
