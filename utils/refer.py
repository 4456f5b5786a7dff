"""Reading the RefCOCO family's annotations: refs(…).p, and gRefCOCO's grefs(unc).json.

A ref of RefCOCO has one object: its ann_id is a number. A ref of gRefCOCO has any number: a list of
them, or [-1] where its sentences fit nothing in the image.
"""

import json
import pickle
from pathlib import Path

from utils.common import READ_ERRORS

REFS_ERRORS = (*READ_ERRORS, pickle.UnpicklingError, AttributeError, MemoryError)
NO_TARGET = [-1]  # gRefCOCO's ann_id of a sentence that fits nothing


class SafeUnpickler(pickle.Unpickler):
    """Reads lists, dicts, text and numbers, and nothing that could run code."""

    def find_class(self, module, name):
        raise ValueError(f"asks for {module}.{name} and may run code; plain data needs no class")


def read_refs(path) -> list:
    """The refs of a file, JSON or a pickle by its ending. A damaged one raises REFS_ERRORS."""
    path = Path(path)
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with open(path, "rb") as file:
        # Python 2 wrote bytes; the tokenizer's ftfy repairs accents
        return SafeUnpickler(file, encoding="latin1").load()


def objects_of(ref, segmentations, crowds) -> tuple | None:
    """The segmentations of a ref's objects, from those of all; () where nothing is to be found.

    Of a list of objects, crowds are left out, as gRefCOCO's own reader does. None: all are crowds.
    """
    ids = ref["ann_id"]
    if ids == NO_TARGET:
        return ()
    if not isinstance(ids, list):
        return (segmentations[ids],)
    if not ids:
        raise ValueError(f"ref {ref['ref_id']} has no ann_id; {NO_TARGET} says no target")
    objects = [segmentations[number] for number in ids if number not in crowds]
    return tuple(objects) or None


def count_targets(dataset, scenes=1000) -> str:
    """A line: how many sentences fit nothing, one object, several.

    Of drawn scenes the first `scenes` are counted, for planning them all takes half a minute.
    """
    is_drawn = hasattr(dataset.samples, "plan")
    count = min(scenes, len(dataset)) if is_drawn else len(dataset)
    found = {"nothing": 0, "one object": 0, "several": 0}
    for i in range(count):
        if is_drawn:
            plan = dataset.samples.plan(i)
            targets = len(plan.targets)
        else:
            plan = dataset.samples[i]
            targets = len(plan.mask[0])
        found[list(found)[min(targets, 2)]] += len(plan.sentences)
    numbers = ", ".join(f"{number:,} {name}" for name, number in found.items())
    return f"of the sentences of {count:,} refs fit: {numbers}\n"
