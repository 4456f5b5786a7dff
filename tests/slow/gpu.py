"""What a GPU will need, computed without one: memory, whole graphs, processes that stop together.

    python tests/slow/gpu.py                                       results/gpu_on_fakes.json

memory: a step of RN101 at 416 pixels with 32 objects on fake tensors, which have sizes and no
numbers, in half precision with CUDA's rule that LayerNorm and softmax compute in float32. Live
storages are added up, with the weights and Adam's moments: what torch would allocate, without a
GPU's workspaces.
graphs: torch.compile traces the loss of every system without a break.
damaged: two gloo processes that load in processes of their own; one meets a damaged image. Both
end, with its line. (TORCH_DISTRIBUTED_DEBUG=DETAIL would compare their exchanges, but in torch
2.14.1 DistributedDataParallel crashes under it on a CPU, in six lines without this project.)
The script fails where anything is not so.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch._dynamo.testing  # noqa: E402

from clip_model import CLIP, CLIP_CONFIGS  # noqa: E402
from conftest import record, write_folder  # noqa: E402
from data import epoch_batches  # noqa: E402
from etris import build_etris  # noqa: E402
from experiments.costs import GIB, LiveStorages, fake_step  # noqa: E402
from fast import recompute_decoder  # noqa: E402
from test_gpu import SYSTEMS, batch_of, fast_model, loss_of  # noqa: E402
from utils.common import git_commit  # noqa: E402


# ------------------------------------------------------------------------------------------- memory
def peak_memory(dtype=torch.bfloat16, **options) -> float:
    """GiB of one training step."""
    with torch.device("meta"):
        model = build_etris(CLIP(CLIP_CONFIGS["RN101"]).eval().requires_grad_(False))
    return fake_step(model, LiveStorages(), dtype, **options).peak / GIB


def memory() -> dict:
    found = {
        "plain, fp16": peak_memory(torch.float16, fast=False),
        "fast, bf16": peak_memory(),
        "fast, --recompute": peak_memory(recompute=True),
        "fast, --accumulate 4": peak_memory(accumulate=4),
    }
    assert found["fast, bf16"] <= 7, found
    assert found["fast, --recompute"] <= 0.5 * found["plain, fp16"], found
    return {name: round(value, 2) for name, value in found.items()}


# ------------------------------------------------------------------------------------------- graphs
def graphs() -> dict:
    """The number of graphs that torch.compile makes of a step's loss: one; and with --recompute."""
    found = {}
    for system in SYSTEMS:
        for recompute in (False, True):
            torch._dynamo.reset()
            model = fast_model(system).eval()
            if recompute:
                recompute_decoder(model)
            count = torch._dynamo.testing.CompileCounter()
            step = torch.compile(loss_of, backend=count, fullgraph=True)
            step(model, batch_of(model)).backward()
            found[f"{system}{', --recompute' if recompute else ''}"] = count.frame_count
    assert set(found.values()) == {1}, found
    return found


# ---------------------------------------------------------------------------------------- processes
def damaged() -> dict:
    """Seconds until both processes have ended after one of them met a damaged image."""
    with tempfile.TemporaryDirectory() as folder:
        own = write_folder(Path(folder, "own"), [record(i % 2, ref_id=i) for i in range(8)])
        second_step = epoch_batches(8, 2, 0, 0)[1]
        unlucky = second_step[1]  # rank 1 has every second object of a batch
        image = own / "images" / "damaged.png"
        image.write_bytes((own / "images" / "0.png").read_bytes()[:40])
        lines = (own / "refs.jsonl").read_text().splitlines()
        line = json.loads(lines[unlucky])
        lines[unlucky] = json.dumps({**line, "image": "images/damaged.png"})
        (own / "refs.jsonl").write_text("\n".join(lines))
        out = Path(folder, "run")
        options = f"--dataset {own} --out {out} --weights random --size 64 --width 16 --workers 1 "
        options += "--batch-size 2 --steps 4 --device cpu"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "train.py"), *options.split()],
            env=os.environ | more,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said_at = None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("error: ") and said_at is None:
                said_at = time.time()
        process.wait()
    errors = [line for line in said if line.startswith("error: ")]
    assert process.returncode != 0 and said_at, said
    assert "damaged.png" in errors[0], said
    seconds = time.time() - said_at
    assert seconds < 20, seconds
    return {"seconds until both have ended": round(seconds, 1), "line": errors[0].strip()[-60:]}


def main():
    commit = git_commit()
    found = {"commit": commit, "torch": torch.__version__}
    for part in (memory, graphs, damaged):
        found[part.__name__] = part()
        print(part.__name__, found[part.__name__], flush=True)
    path = ROOT / "results" / "gpu_on_fakes.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
