"""What each arm of the question costs a training step: seconds and memory.

    python -m experiments.costs --json results/costs.json

Measured on the device there is: the tiny model, and RN101 at 416 pixels; the arms take turns, and
each is compared with ETRIS of the same turn. Computed for a GPU, without one: RN101, batches of 32
in bf16, on fake tensors, which have sizes and no numbers. Its seconds are a roofline: each kernel
takes the larger of its arithmetic and its memory traffic. That leaves out what a GPU waits for, so
trust the ratios more than the seconds. Its memory is what torch allocates, weights and Adam
included.
"""

import json
import statistics
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import train
from clip_model import MultiHeadAttention
from etris import text_to_pixel_loss
from experiments.benchmark import Bench, make_ladder
from experiments.tables import QUESTION, count_tuned, on_paper
from fast import recompute_decoder, set_fast
from utils.common import Parser, command, integer, pick_device, provenance, write_file

GPU = "A100"
FLOPS_PER_SECOND = 156e12  # what an A100 reaches in bf16, half of what its data sheet says
BYTES_PER_SECOND = 1.24e12  # what its memory reaches
GPU_BATCH = 32
GIB = 2**30
LAYER_NORM = F.layer_norm
SOFTMAX = torch.Tensor.softmax


# ----------------------------------------------------------------------------------------- measured
def measured(backbone, batch_size, device, rounds, rows=QUESTION) -> list[dict]:
    """Seconds (median over rounds), memory, and the median ratio to ETRIS, of each arm."""
    benches = {}
    options = {}
    for row in rows:
        run_args = train.arguments(
            ["--backbone", backbone, "--weights", "random", "--tuning", row.tuning]
        )
        bench = Bench(run_args, device, batch_size, **row.build)
        benches[row.name] = bench
        options[row.name] = make_ladder(bench.model, device)["fast"]
    seconds = {name: [] for name in benches}
    for turn in range(rounds + 1):
        for name, bench in benches.items():
            took = bench.step(options[name])
            if turn > 0:  # the first turn warms up
                seconds[name].append(took)
    found = []
    for name, bench in benches.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["ETRIS"], strict=True)]
        found.append(
            {
                "row": name,
                "how": "measured",
                "device": device.type,
                "backbone": backbone,
                "batch": batch_size,
                "rounds": rounds,
                "tuned_encoders": count_tuned(bench.model, encoders=True),
                "seconds": statistics.median(seconds[name]),
                "of_etris": statistics.median(ratios),
                "memory_mb": bench.memory(options[name]),
            }
        )
    return found


# ----------------------------------------------------------------------------------------- computed
class Roofline(TorchDispatchMode):
    """Adds up how long a GPU's kernels take at least, in seconds."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        makes_tensors = any(isinstance(x, torch.Tensor) for x in tree_leaves(out))
        if function.is_view or not makes_tensors:  # no kernel runs
            return out
        count = flop_registry.get(function.overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        traffic = sum(x.numel() * x.element_size() for x in tensors)
        self.seconds += max(flops / FLOPS_PER_SECOND, traffic / BYTES_PER_SECOND)
        return out


class LiveStorages(TorchDispatchMode):
    """Adds up the storages that are alive, and keeps the largest sum, in bytes."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.total = 0
        self.peak = 0

    def add(self, x):
        storage = x.untyped_storage()
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.total += storage.nbytes()
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.total -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.add(x)
        return out


def layer_norm_in_float32(x, *args, **more):
    """What CUDA's autocast does, and the CPU's does not."""
    return LAYER_NORM(x.float(), *args, **more)


def softmax_in_float32(x, dim):
    """The same."""
    return SOFTMAX(x.float(), dim)


def move_to_fakes(model, device):
    """Replace every parameter and buffer by a fake one on `device`; within FakeTensorMode."""
    for module in model.modules():
        for name, x in module._parameters.items():
            if x is not None:
                moved = torch.nn.Parameter(fake(x, device), requires_grad=x.requires_grad)
                module._parameters[name] = moved
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = fake(x, device)


def fake(x, device):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def fake_step(model, mode, dtype=torch.bfloat16, fast=True, recompute=False, accumulate=1):
    """One training step of RN101 (on meta) with GPU_BATCH objects, under `mode`, which watches."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.dropout = 0.0  # a CPU's kernel with dropout stores what a GPU's does not
    set_fast(model, fast).to(memory_format=torch.channels_last)
    if recompute:
        recompute_decoder(model)
    with (
        mock.patch.object(F, "layer_norm", layer_norm_in_float32),
        mock.patch.object(torch.Tensor, "softmax", softmax_in_float32),
        FakeTensorMode(allow_non_fake_inputs=True),
        mode,
    ):
        move_to_fakes(model, "cpu")
        learns = [p for p in model.parameters() if p.requires_grad]
        moments = [torch.empty_like(p) for p in learns + learns]
        images = torch.empty(GPU_BATCH, 3, 416, 416)
        images = images.contiguous(memory_format=torch.channels_last)
        tokens = torch.zeros(GPU_BATCH, 17, dtype=torch.long)
        masks = torch.empty(GPU_BATCH, 1, 416, 416)
        for i in range(accumulate):
            part = slice(i, None, accumulate)
            with torch.autocast("cpu", dtype):
                logits = model(images[part], tokens[part])
                loss = text_to_pixel_loss(logits, masks[part])
            loss.backward()
            del logits, loss
        assert len(moments) == 2 * len(learns)
    return mode


def computed(rows=QUESTION) -> list[dict]:
    """Each arm at full size on a GPU that is not here."""
    found = []
    for row in rows:
        seconds = fake_step(on_paper(row.tuning, **row.build), Roofline()).seconds
        peak = fake_step(on_paper(row.tuning, **row.build), LiveStorages()).peak
        facts = {"row": row.name, "how": "computed", "device": GPU, "backbone": "RN101"}
        found.append({**facts, "batch": GPU_BATCH, "seconds": seconds, "memory_mb": peak / 2**20})
    etris = next(row["seconds"] for row in found if row["row"] == "ETRIS")
    for row in found:
        row["of_etris"] = row["seconds"] / etris
    return found


# ------------------------------------------------------------------------------------- command line
def table(rows) -> str:
    """Rows of one device and backbone as markdown."""
    columns = ["arm", "s per step", "of ETRIS", "peak MiB", "of ETRIS"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    etris = next(row for row in rows if row["row"] == "ETRIS")
    for row in rows:
        memory = row["memory_mb"]
        cells = [row["row"], f"{row['seconds']:.3g}", f"{row['of_etris']:.2f}"]
        cells += [f"{memory:,.0f}", f"{memory / etris['memory_mb']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@command
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=integer(), default=5, help="turns of each arm (5)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (the best available)")
    parser.add_argument("--computed", action="store_true", help="only what needs no measuring")
    parser.add_argument("--json", metavar="FILE", help="write every row")
    args = parser.parse_args(argv)
    rows = [{"row": "machine", **provenance(0, {})}]
    parts = [computed()]
    if not args.computed:
        device, _ = pick_device(args.device)
        large_batch = 2 if device.type == "cpu" else GPU_BATCH
        parts.append(measured("tiny", 32, device, args.rounds))
        parts.append(measured("RN101", large_batch, device, args.rounds))
    for part in parts:
        first = part[0]
        print(f"\n{first['how']}, {first['device']}: {first['backbone']}, batch {first['batch']}")
        print(table(part))
        rows += part
    if args.json:
        write_file(args.json, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
