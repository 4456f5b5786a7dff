"""What a GPU needs, held without one: fake tensors, counted reads, layouts, names in the graph.

Fake CUDA tensors have shapes, dtypes and a device, but no numbers: a mix of devices raises, and so
does everything that would wait for a number. tests/slow/gpu.py has what takes minutes.
"""

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

import evaluate as evaluation
import train
from checkpoint import build_model, read_checkpoint
from clip_model import Attention, resize_positions
from conftest import record, write_folder
from data import TrainDataset, epoch_batches, open_dataset, to_device, train_loader
from etris import text_to_pixel_loss
from evaluate import EvalDataset, evaluate, predict_probabilities
from experiments.costs import fake, move_to_fakes
from fast import recompute_decoder, set_fast
from methods.peft import METHODS
from test_train import FAST, run, same, step_of
from utils import common
from utils.common import ROOT
from utils.tokenizer import tokenize

CPU = torch.device("cpu")
SYSTEMS = {
    "etris": {"backbone": "tiny", "size": 64},
    "etris, ViT": {"backbone": "tiny-vit", "size": 64},
    "barleria": {"backbone": "tiny-vit", "system": "barleria", "size": 96},
    "detris": {"backbone": "tiny-dino", "system": "detris", "size": 96},
}
ALONE = {"bridger", "frozen", "full"}  # no other method beside them, or not the Bridger
TUNINGS = [name if name in ALONE else f"{name}+bridger" for name in METHODS]
# torch.use_deterministic_algorithms raises on a GPU in the backward pass of these
NOT_DETERMINISTIC = (
    "Upsample",  # bilinear has another way there, which is slow
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "AvgPool3D",
    "MaxPool3D",
    "FractionalMaxPool",
    "MaxUnpool",
    "ReflectionPad",
    "ReplicationPad",
    "GridSampler",
    "EmbeddingBag",
    "NllLoss2D",
    "CtcLoss",
)
READS = ("item", "__int__", "__float__", "__bool__", "__index__", "tolist", "cpu", "numpy")


def fast_model(system="etris", **more):
    """A tiny model as train.py makes it: fast path, channels-last, in training mode."""
    torch.manual_seed(0)
    model = build_model(weights="random", max_tokens=8, **SYSTEMS[system], **more)
    return set_fast(model).to(memory_format=torch.channels_last)


def batch_of(model, count=4):
    """A batch on the CPU, as to_device returns it."""
    images = torch.randint(256, (count, 3, model.size, model.size), dtype=torch.uint8)
    texts = ["the red cat on the left", "dog", "ring", "two big stars"]
    tokens = tokenize([texts[i % 4] for i in range(count)], model.max_tokens)
    return to_device({"image": images, "tokens": tokens, "mask": images[:, :1]}, CPU)


def loss_of(model, batch):
    logits = model(batch["image"], batch["tokens"])
    return text_to_pixel_loss(logits, batch["mask"]) + model.auxiliary_loss()


def plain_adam(model):
    """What train.py's optimizer is, with fused kernels."""
    args = train.arguments([])
    return train.make_optimizer(model, args, CPU)


# -------------------------------------------------------------------------------- fake CUDA tensors
@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA's autocast where there is no GPU, and tensors that only claim to be there."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def forward_on_fake_cuda(request, model, predict=False):
    """Logits, loss and, if wanted, probabilities under CUDA's autocast."""
    batch = batch_of(model)
    request.getfixturevalue("fake_cuda")
    move_to_fakes(model, "cuda")
    batch = {name: fake(x, "cuda") for name, x in batch.items()}
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(batch["image"], batch["tokens"])
        loss = text_to_pixel_loss(logits, batch["mask"]) + model.auxiliary_loss()
        if not predict:
            return logits, loss
        set_fast(model)  # folds anew: whether a fake tensor has moved cannot be asked
        maps = predict_probabilities(model, batch["image"], batch["tokens"])
    return logits, loss, maps


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_system_mixes_devices_or_waits_in_its_forward_pass(system, request):
    """Logits are bf16, the loss and the probabilities float32, all of them on the GPU."""
    found = forward_on_fake_cuda(request, fast_model(system), predict=True)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert {x.device.type for x in found} == {"cuda"}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_no_tuning_mixes_devices_or_waits_in_its_forward_pass(tuning, request):
    logits, loss = forward_on_fake_cuda(request, fast_model(tuning=tuning))
    assert logits.device.type == "cuda" and loss.dtype is torch.float32


def test_old_gpus_that_emulate_bf16_take_fp16(monkeypatch):
    """T4 and V100: torch says that they support bf16, unless asked without emulation."""
    supported = {True: True, False: False}
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: supported[including_emulation],
    )
    dtype, reason = common.pick_dtype(torch.device("cuda"), "auto")
    assert dtype is torch.float16 and "no bf16" in reason
    dtype, reason = common.pick_dtype(torch.device("cuda"), "bf16")
    assert dtype is torch.bfloat16 and "it emulates it" in reason  # as asked, and said


def test_float32_on_a_gpu_multiplies_in_tf32_and_the_cpu_stays_exact(monkeypatch):
    precisions = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    common.pick_device("cpu")
    assert precisions == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.pick_device()[0].type == "cuda"
    assert precisions == ["high"]


def test_a_gpu_is_fed_by_up_to_eight_processes_from_pinned_memory(monkeypatch):
    """Also where a GPU is there but not used, nothing is pinned."""
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert common.default_workers(torch.device("cuda")) == 8
    assert common.default_workers(CPU) == 0
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert common.default_workers(torch.device("cuda")) == 2
    pinned = []

    class Stop(Exception):
        pass

    def loader(*args, **options):
        pinned.append(options["pin_memory"])
        raise Stop

    monkeypatch.setattr(evaluation, "DataLoader", loader)
    model = fast_model()
    dataset = open_dataset("scenes", "val", limit=1, side=64)
    for device in ("cuda", "cpu"):
        with pytest.raises(Stop):
            evaluate(model, dataset, device)
    assert pinned == [True, False]


# --------------------------------------------------------------------------- number formats on CPUs
def test_bf16_on_a_processor_without_it_is_said_before_the_first_step(
    monkeypatch, tmp_path, capsys
):
    info = tmp_path / "cpuinfo"
    info.write_text("flags : avx2 avx512f\n")
    assert not common.has_bf16_instructions(info)
    info.write_text("flags : avx2 avx512_bf16\n")
    assert common.has_bf16_instructions(info)
    assert common.has_bf16_instructions(tmp_path / "not on this system")
    for has, words in ((False, "no instructions for it"), (True, "--amp bf16")):
        monkeypatch.setattr(common, "has_bf16_instructions", lambda has=has: has)
        train.setup(train.arguments(["--device", "cpu", "--amp", "bf16"]))
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1 and words in said[0] and "bfloat16" in said[0]


def test_fp16_with_the_real_scaler_skips_steps_and_goes_on(monkeypatch, tmp_path):
    """A scale of 2⁴⁰ overflows: it is halved at every step, and nothing moves."""
    scaler = torch.amp.GradScaler
    for scale, moves in ((2.0**40, False), (2.0**4, True)):
        out = tmp_path / str(moves)
        monkeypatch.setattr(
            torch.amp, "GradScaler", lambda *args, scale=scale, **more: scaler(*args, scale, **more)
        )
        training = run(out, "--steps", 3, "--amp", "fp16")["training"]
        assert training["scaler"]["scale"] == (scale if moves else scale / 8)
        assert bool(training["optimizer"]["state"][0]["exp_avg"].any()) == moves
        assert json.loads((out / "result.json").read_text())["dtype"] == "float16"


def test_train_and_evaluate_give_one_number_for_one_checkpoint(tmp_path, capsys):
    """result.json of a run is what evaluate.py says of its best.pt, with how it was measured."""
    out = tmp_path / "run"
    train.main([*FAST, "--out", str(out), "--steps", "2", "--amp", "bf16"])
    check = tmp_path / "check.json"
    options = ["--split", "test", "--limit", "8", "--device", "cpu", "--amp", "bf16"]
    options += ["--batch-size", "8", "--json", str(check)]
    evaluation.main([str(out / "best.pt"), "--weights", "random", *options])
    ours, theirs = (json.loads(path.read_text()) for path in (out / "result.json", check))
    assert ours["dtype"] == theirs["dtype"] == "bfloat16"
    for name in theirs.keys() - {"checkpoint"}:
        assert ours[name] == theirs[name], name
    assert "numbers bfloat16: --amp bf16" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ waits counted
@pytest.fixture
def reads(monkeypatch):
    """Counts what reads a number of a tensor, and so would wait for a GPU."""
    counts = Counter()

    def counted(name):
        method = getattr(torch.Tensor, name)

        def read(self, *args, **more):
            counts[name] += 1
            return method(self, *args, **more)

        return read

    for name in (*READS, "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return counts


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_training_step_reads_one_number(system, accumulate, reads):
    """Its mean loss, whatever --accumulate."""
    model = fast_model(system)
    batch = batch_of(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = plain_adam(model)
    for _ in range(2):  # Adam's first step makes its moments
        reads.clear()
        train.train_step(model, batch, optimizer, scaler, torch.bfloat16, accumulate)
        assert reads == {"__float__": 1}


def test_evaluation_reads_once_a_batch(tmp_path, monkeypatch, reads):
    """Ten sentences of two objects in batches of two and of five: three reads more."""
    sentences = ["a cup", "the cup", "cup", "red", "left"]
    records = [record(number, sentences=sentences) for number in range(2)]
    dataset = open_dataset(str(write_folder(tmp_path, records)), "train")
    model = fast_model()
    items = EvalDataset(dataset, model.size, model.max_tokens)
    loaded = [items[0], items[1]]  # reading files is not counted
    monkeypatch.setattr(evaluation, "EvalDataset", lambda *_: loaded)
    totals = []
    for batch_size in (2, 5):
        reads.clear()
        evaluate(model, dataset, batch_size=batch_size, progress=False)
        totals.append(reads.total())
    assert totals[0] - totals[1] == 5 - 2
    assert reads["tolist"] == 2 and reads["nonzero"] == 0


def test_an_object_is_uploaded_once_for_all_its_sentences(tmp_path):
    """Image, mask and tokens: three copies an object."""
    copies = []

    class Spy:
        def to(self, device, non_blocking):
            copies.append((device.type, non_blocking))
            return self

    item = {"image": Spy(), "mask": Spy(), "tokens": Spy(), "box": None}
    for kind in ("cuda", "cpu"):
        list(evaluation.upload([item], torch.device(kind)))
    assert copies == [("cuda", True)] * 3 + [("cpu", False)] * 3


# ------------------------------------------------------------------------------------- determinism
def backward_nodes(loss) -> set[str]:
    """The names of all nodes in the backward graph of `loss`."""
    names = set()
    seen = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        waiting += [next_node for next_node, _ in node.next_functions]
    return names


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_backward_pass_has_a_deterministic_kernel_on_a_gpu(system):
    """With positions that learn and are resized; so --deterministic survives it."""
    model = fast_model(system)
    names = backward_nodes(loss_of(model, batch_of(model)))
    assert len(names) > 20
    assert [name for name in names if name.startswith(NOT_DETERMINISTIC)] == []


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("side, size", [(7, (13, 13)), (14, (26, 26)), (4, (2, 6)), (3, (3, 3))])
def test_positions_are_resized_as_bicubic_interpolation_does(side, size, dtype, bound):
    """In bf16's autocast, too, whose matrix products would be rougher."""
    positions = torch.randn(side**2 + 1, 24, dtype=dtype)
    grid = positions[1:].T.unflatten(1, (side, side))[None]
    expected = F.interpolate(grid, size, mode="bicubic", align_corners=False)
    expected = torch.cat([positions[:1], expected[0].flatten(1).T])
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_positions(positions, *size)
    assert found.dtype is dtype
    assert (found - expected).abs().max() <= bound * expected.abs().max()


def test_cudnn_tries_its_kernels_in_training_only(monkeypatch, tmp_path):
    """Never with --deterministic, nor in validation: evaluate.py would find another number."""
    seen = []
    real = evaluation.predict_masks

    def spy(*args):
        seen.append(torch.backends.cudnn.benchmark)
        return real(*args)

    monkeypatch.setattr(evaluation, "predict_masks", spy)
    run(tmp_path / "a", "--steps", 1)
    assert torch.backends.cudnn.benchmark and not any(seen) and seen
    train.setup(train.arguments(["--device", "cpu", "--deterministic"]))
    assert not torch.backends.cudnn.benchmark


# ------------------------------------------------------------------------------------------ layouts
def test_maps_stay_channels_last_up_to_the_last_convolution(monkeypatch):
    """Every convolution's input and weight, forward; the step's and the evaluation's."""
    model = fast_model()
    batch = batch_of(model)
    shapes = []

    def spy(function):
        def convolve(x, weight, *args, **more):
            assert x.is_contiguous(memory_format=torch.channels_last), (x.shape, x.stride())
            assert weight.is_contiguous(memory_format=torch.channels_last), weight.shape
            shapes.append(x.shape)
            return function(x, weight, *args, **more)

        return convolve

    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(F, name, spy(getattr(F, name)))
    loss_of(model, batch).backward()
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)]
    assert len(shapes) >= len(convolutions) - 3  # the projector's are products on the fast path


@pytest.mark.parametrize("system", SYSTEMS)
def test_gradients_and_moments_lie_as_their_parameters(system):
    """Fused Adam asks for it on a GPU; after a checkpoint was read as well."""
    model = fast_model(system)
    optimizer = plain_adam(model)
    loss_of(model, batch_of(model)).backward()
    learns = [p for p in model.parameters() if p.grad is not None]
    assert all(p.grad.stride() == p.stride() for p in learns)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = plain_adam(model)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for copy in (optimizer, resumed):
        for p in learns:
            assert copy.state[p]["exp_avg"].stride() == p.stride()
            assert copy.state[p]["exp_avg_sq"].stride() == p.stride()


def test_causal_attention_needs_no_mask_on_the_fast_path(monkeypatch):
    """torch's kernel is told; where words are hidden too, the plain path combines both."""
    attention = set_fast(Attention(16, 2)).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    options = []
    real = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask, dropout_p, is_causal):
        options.append((attn_mask is None, is_causal))
        return real(q, k, v, attn_mask, dropout_p, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    fast = [attention(x, causal=True), attention(x, key_padding_mask=padding)]
    fast.append(attention(x, key_padding_mask=padding, causal=True))
    assert options == [(True, True), (False, False)]
    set_fast(attention, False)
    plain = [attention(x, causal=True), attention(x, key_padding_mask=padding)]
    plain.append(attention(x, key_padding_mask=padding, causal=True))
    torch.testing.assert_close(fast, plain)
    x[1, 2:] = 0  # nothing before position 2 sees it
    assert torch.equal(attention(x, key_padding_mask=padding, causal=True)[1, :2], plain[2][1, :2])


# ------------------------------------------------------------------------------------------- memory
def test_recompute_trains_the_same_run(tmp_path):
    """Bit for bit, dropout included, as a command."""
    more = ("--steps", 2, "--dropout", "0.1")
    assert same(run(tmp_path / "a", *more), run(tmp_path / "b", *more, "--recompute"))


def test_recompute_reaches_the_decoder_of_every_system_and_leaves_evaluation():
    for system in SYSTEMS:
        model = fast_model(system).eval()
        batch = batch_of(model)
        with torch.inference_mode():
            before = model(batch["image"], batch["tokens"])
            recompute_decoder(model)
            assert torch.equal(before, model(batch["image"], batch["tokens"]))
        names = backward_nodes(loss_of(model, batch))
        assert "SoftmaxBackward0" not in names and len(names) > 10


# ------------------------------------------------------------------------------------------ loading
def test_a_batch_of_the_papers_run_is_at_most_30_megabytes():
    """32 objects at 416 pixels, as the loading processes hand them over in shared memory."""
    scenes = open_dataset("scenes", "train", limit=4, side=416)
    dataset = TrainDataset([scenes[i % 4] for i in range(32)], 416, 17)
    [batch] = train_loader(dataset, 32, epoch=0)
    tensors = [x for x in batch.values() if isinstance(x, torch.Tensor)]
    assert len(batch["image"]) == 32
    assert sum(x.nbytes for x in tensors) <= 30e6


def test_datasets_travel_to_processes_that_start_anew(refer_tree):
    """Windows, macOS and Python 3.14 pickle what a loading process needs."""
    dataset = open_dataset("refcoco", "train", refer_tree)
    train_set = TrainDataset(dataset, 32, 8)
    items = EvalDataset(dataset, 32, 8)
    twin = pickle.loads(pickle.dumps(train_set))
    assert torch.equal(twin[0]["image"], train_set[0]["image"])
    loader = DataLoader(items, None, num_workers=1, multiprocessing_context="spawn")
    for found, expected in zip(loader, items, strict=True):
        assert torch.equal(found["mask"], expected["mask"])
        assert found["sample"] == expected["sample"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_an_image_damaged_in_a_loading_process_is_one_line_and_costs_no_step(tmp_path, capsys):
    """Two processes load; the image of the third step is cut off."""
    folder = write_folder(tmp_path / "own", [record(i % 2, ref_id=i) for i in range(6)])
    order = [i for batch in epoch_batches(6, 1, 0, 0) for i in batch]
    damaged = folder / "images" / "damaged.png"
    damaged.write_bytes((folder / "images" / "0.png").read_bytes()[:40])
    lines = (folder / "refs.jsonl").read_text().splitlines()
    lines[order[2]] = lines[order[2]].replace("images/0.png", "images/damaged.png")
    lines[order[2]] = lines[order[2]].replace("images/1.png", "images/damaged.png")
    (folder / "refs.jsonl").write_text("\n".join(lines))
    more = ["--dataset", folder, "--steps", 6, "--batch-size", 1, "--workers", 2]
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", *more)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.splitlines()[-1].startswith("error: ") and "damaged.png" in error
    assert "Traceback" not in error
    assert step_of(read_checkpoint(tmp_path / "a" / "last.pt")) == 2


def test_ctrl_c_with_loading_processes_stops_after_a_step_and_nobody_stays(tmp_path):
    """The terminal sends it to all of them."""
    out = tmp_path / "a"
    more = ["--out", str(out), "--steps", "5000", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *FAST, *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.time() + 240
        while not (out / "last.pt").exists() and time.time() < end:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=120)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert output.count("go on with --resume") == 1 and "Traceback" not in errors
    assert step_of(read_checkpoint(out / "last.pt")) >= 2
