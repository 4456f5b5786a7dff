"""What `lesson.check` compares with. Try first; worked solutions are in solutions.md.

One dict per notebook. An exercise has the right answer and typical wrong ones, each with the reason it is wrong. Where
a function is to be written, `right` is one, and `on` lists the arguments both are tried with.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    """right: a value or a function; wrong: pairs (answer, what is wrong with it); on: argument tuples of a function."""

    right: object
    wrong: tuple = ()
    on: tuple = ()


CLIP = {}
BRIDGER = {}
DECODER = {}
FIGURE_3 = {}
TRAINED = {}
TRAINING = {}
FAILURES = {}
BEYOND = {}

EXERCISES = CLIP | BRIDGER | DECODER | FIGURE_3 | TRAINED | TRAINING | FAILURES | BEYOND
