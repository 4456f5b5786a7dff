"""What lies below the first bridge, computed once for each image.

The stem and the first stage of a frozen image encoder give the same numbers in every epoch, for
every sentence and at every strength of the Bridger. experiments/reproduce.py and
experiments/probe.py keep them.
"""

import contextlib

import torch

CACHE_BYTES = 2 * 2**30


class FrozenFeatureCache:
    """What lies below the first bridge, computed once for each image and shared by all runs.

    That is a frozen image encoder's stem and first stage. On a CPU only.
    """

    def __init__(self):
        self.features = {}  # (backbone's SHA-256, image's hash) → the first stage's output
        self.bytes = 0

    @contextlib.contextmanager
    def attached_to(self, model):
        """Within it the model looks up its stem and first stage here, if nothing there learns."""
        if not has_frozen_first_stage(model):
            yield
            return
        visual = model.backbone.visual
        sha256 = model.backbone.identity["sha256"]
        stem = visual.stem
        blocks = list(visual.stages[0])
        forwards = [block.forward for block in blocks]

        def first_stage(images):
            x = stem(images)
            for forward in forwards:
                x = forward(x)
            return x

        def cached_stem(images):
            return self.look_up(images, first_stage, sha256)

        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(visual, "stem", cached_stem))
            for block in blocks:
                stack.enter_context(replaced(block, "forward", pass_through))
            yield

    @torch.no_grad()
    def look_up(self, images, first_stage, sha256):
        """images (B, 3, S, S) → the first stage's output, computed for images not seen before."""
        keys = [(sha256, hash(image.numpy().tobytes())) for image in images]
        new = {}  # key → the first row that has it
        for i, key in enumerate(keys):
            if key not in self.features:
                new.setdefault(key, i)
        # at least one goes through: a ViT's stem notes the size of its grid
        outputs = first_stage(images[list(new.values()) or [0]])
        computed = {}
        for key, output in zip(new, outputs, strict=False):
            computed[key] = output.clone()
        found = [computed[key] if key in computed else self.features[key] for key in keys]
        features = torch.stack(found)
        if self.bytes < CACHE_BYTES:
            self.features.update(computed)
            self.bytes += sum(output.nbytes for output in computed.values())
        if features.ndim == 4:
            features = features.contiguous(memory_format=torch.channels_last)
        return features


def has_frozen_first_stage(model) -> bool:
    """Whether an ETRIS on a CPU learns nothing below its first bridge."""
    if model.system != "etris" or not hasattr(model, "backbone"):
        return False
    if "sha256" not in model.backbone.identity:  # a published checkpoint brings its own backbone
        return False
    visual = model.backbone.visual
    below = [*visual.conv1.parameters(), *visual.stages[0].parameters()]
    if hasattr(visual, "positional_embedding"):  # a ViT's; a ResNet has its own in the pool
        below.append(visual.positional_embedding)
    on_cpu = below[0].device.type == "cpu"
    return on_cpu and not any(parameter.requires_grad for parameter in below)


def pass_through(x):
    return x


@contextlib.contextmanager
def replaced(module, name, function):
    """Replace one method of one module, and put back what was there."""
    before = vars(module).get(name)  # fast.py may have put its own there
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)
