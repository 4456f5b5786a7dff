"""14. Every trick of the fast path, at RN101's depth (its widths are an eighth): it changes the work, not the result.

max|Δ| / max|·| ≤ 1e-10 in float64 and ≤ 1e-4 in float32, for logits and for the gradient of everything that learns.
"""

import copy
import json
import platform
import subprocess
import sys
from dataclasses import astuple
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import benchmark
import etris
import train
import tuning
from clip_model import CLIP, HERE, Attention, Norm, Size, build_clip, fill_by_name, tokenize
from data import open_dataset
from etris import Enlarge, Gate, Projector, assemble, convolve_doubled, set_fast, text_to_pixel_loss
from evaluate import evaluate

DEEP = Size(32, 64, (3, 4, 23, 3), 8, None, 64, 12, 20)
SHALLOW = Size(32, 64, (1, 2, 1, 1), 8, None, 64, 3, 20)
BOUND = {torch.float64: 1e-10, torch.float32: 1e-4}


def model_of(size=DEEP, dtype=torch.float64, tuned="bridger", **options):
    """With norms as training leaves them: no scale is 1, no mean 0; and with tuned parts that do something."""
    torch.manual_seed(0)
    clip = build_clip(fill_by_name(CLIP(size).state_dict()))
    for norm in (module for module in clip.modules() if isinstance(module, Norm)):
        for x in (norm.weight, norm.running_var):
            nn.init.uniform_(x, 0.5, 1.5)
        for x in (norm.bias, norm.running_mean):
            nn.init.normal_(x, std=0.3)
    model = tuning.apply(assemble(clip, 64, 8, width=16, dropout=0.0, **options), tuning.parse(tuned))
    for name, parameter in model.named_parameters():
        if "adapter" in name or ".up" in name:  # else they start as the identity
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def inputs(count=2):
    texts = ["the red cat on the left", "dog", "ring", "two big stars"][:count]
    dice = torch.Generator().manual_seed(1)
    masks = (torch.rand(count, 1, 64, 64, generator=dice) > 0.7).float()
    return torch.randn(count, 3, 64, 64, generator=dice), tokenize(texts, 8), masks


def results(model, dtype=torch.float64, **batch):
    """{"logits": …, name of what learns: its gradient}; the gates' queries and keys, dead by design, left out."""
    images, tokens, masks = inputs(**batch)
    model.zero_grad()
    logits = model(images.to(dtype), tokens)
    text_to_pixel_loss(logits.to(dtype), masks.to(dtype)).backward()
    third = {name: len(p) // 3 * 2 for name, p in model.named_parameters() if "gates" in name and "in_proj" in name}
    learn = {n: p.grad[third.get(n, 0) :] for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **learn}


def assert_same(plain, fast, bound):
    assert plain.keys() == fast.keys()
    for name, x in plain.items():  # a bias of keys has no effect: its gradient is 0 but for rounding, hence the 1e-5
        off, largest = (x - fast[name]).abs().max().item(), max(1e-5, x.abs().max().item())
        assert off <= bound * largest, f"{name}: {off:.2e} of {largest:.2e}"


def calls(monkeypatch, owner, name):
    """How often the function is called from now on: a list that grows."""
    seen, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **more: seen.append(name) or function(*args, **more))
    return seen


# ---- all of it
@pytest.mark.parametrize("dtype", BOUND)
def test_the_fast_path_gives_the_same_logits_and_gradients_and_can_be_left(dtype):
    """set_fast on: the same. Off again: bit for bit what it was. The state dict never changes, in name or number."""
    model = model_of(dtype=dtype)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.eval()  # of BatchNorm in the head too: statistics would move between the two
    plain = results(model, dtype)
    assert_same(plain, results(set_fast(model), dtype), BOUND[dtype])
    assert_same(plain, results(model.to(memory_format=torch.channels_last), dtype), BOUND[dtype])
    assert_same(plain, results(set_fast(model, False).to(memory_format=torch.contiguous_format), dtype), 0)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in state.items())


def test_set_fast_is_the_only_switch():
    """What has a fast path is `fast = False` until then, in every system's modules, and a new model is plain."""
    model = model_of(SHALLOW)
    kinds = {type(m) for m in model.modules() if hasattr(m, "fast")}
    assert {Norm, Attention, Gate, Projector, Enlarge} <= kinds
    assert not any(m.fast for m in model.modules() if type(m) in kinds)
    assert all(m.fast for m in set_fast(model).modules() if type(m) in kinds)


# ---- memory
def test_freed_memory_stays_with_the_process_on_the_fast_path(monkeypatch):
    """set_fast tells. Then blocks of 100 MB come back without page faults, and else with one for every page.

    In a fresh process, where no block is left over; the last line is for glibc's arenas, one for each thread.
    """
    told = []
    monkeypatch.setattr(etris, "keep_memory", told.append)
    set_fast(set_fast(nn.Linear(1, 1)), False)
    assert told == [True, False]
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc's allocator can be told")
    code = """if True:
        import concurrent.futures, resource, torch, command
        for on in (False, True):
            command.keep_memory(on)
            faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
            for n in range(12):  # small blocks settle in what was freed: some rounds are new
                torch.ones(25_000_000)
                faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
            print(min(after - before for before, after in zip(faults, faults[1:])))
        print(int(concurrent.futures.ThreadPoolExecutor().submit(torch.ones, 25_000_000).result().sum()))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    usual, kept, threaded = map(int, done.stdout.split())
    assert usual > 1000 > 10 > kept and threaded == 25_000_000


# ---- BatchNorm in its convolution
def test_the_frozen_towers_norms_are_folded_into_their_convolutions(monkeypatch):
    """RN101 has 3 + 33 · 3 + 4 = 106 of them; none is computed on the fast path, the head's own all are."""
    model, (images, tokens, _) = model_of().eval(), inputs()
    images, norms = images.double(), [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    frozen = [m for m in norms if isinstance(m, Norm)]
    seen = calls(monkeypatch, F, "batch_norm")
    model(images, tokens)
    assert (len(frozen), len(seen)) == (106, len(norms))
    seen.clear()
    set_fast(model)(images, tokens)
    assert len(seen) == len(norms) - 106 > 0


@pytest.mark.parametrize("tuned", ["full", "bitfit+bridger", "lora+bridger", "adapter", "conv-adapter+bridger"])
def test_where_the_tower_learns_or_is_adapted_nothing_is_folded_wrongly(tuned):
    """Scales that learn get their gradient; what hangs behind a norm is still passed through."""
    model = model_of(DEEP, tuned=tuned).eval()
    plain, fast = results(model), results(set_fast(model))
    assert len(plain) > 10
    assert_same(plain, fast, 1e-10)


def test_a_norm_that_moves_is_never_folded(monkeypatch):
    """Pre-training our own CLIP: in training mode the batch's statistics count, though nothing may learn."""
    norm, conv, x = Norm(4), nn.Conv2d(3, 4, 3, bias=False), torch.randn(2, 3, 8, 8)
    norm.fast = True
    seen = calls(monkeypatch, F, "batch_norm")
    norm.requires_grad_(False), conv.requires_grad_(False)
    norm.train()(conv, x)
    assert len(seen) == 1 and norm.running_mean.abs().max() > 0
    norm.eval()(conv, x)
    assert len(seen) == 1
    conv.requires_grad_(True)
    norm(conv, x).sum().backward()
    assert len(seen) == 2 and conv.weight.grad.abs().max() > 0


def test_a_tensor_loaded_after_the_switch_counts():
    """The folded weights are made from the frozen tensors each time: nothing goes stale."""
    model, (images, tokens, _) = set_fast(model_of(SHALLOW)).eval(), inputs()
    before = model(images.double(), tokens)
    model.clip.visual.bn1.bias.data += 1
    after = model(images.double(), tokens)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, set_fast(model, False)(images.double(), tokens), rtol=1e-10)


# ---- what is kept for the backward pass
def kept(function):
    """Bytes that autograd keeps of what `function` computes, each storage once."""
    storages = {}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(note, lambda x: x):
        out = function()
    return sum(storages.values()), out


def test_there_is_no_graph_below_the_first_trainable_place():
    """Stem, layer1, layer2 keep nothing, nor the words' first third if positions are frozen; then a graph begins."""
    model, (images, tokens, _) = set_fast(model_of(SHALLOW, torch.float32)), inputs()
    begins = []
    for layer in model.clip.visual.stages:
        layer.register_forward_hook(lambda module, given, out: begins.append(out.requires_grad))
    visual, text = model.clip.visual, model.clip
    assert kept(lambda: visual.stages[0](visual.stem(images)))[0] == 0
    words = kept(lambda: text.stages[0](text.stem(tokens)))[0]
    model.clip.positional_embedding.requires_grad_(False)
    assert words > kept(lambda: text.stages[0](text.stem(tokens)))[0] == 0
    begins.clear()
    model(images, tokens)
    assert begins == [False, True, True]


def test_folding_and_recomputing_keep_less():
    """Without its norm a convolution's output is not kept; `recompute` keeps none of a frozen stage. Same gradients."""
    model, (images, tokens, _) = model_of(dtype=torch.float32).eval(), inputs(4)
    sizes = [kept(lambda: model(images, tokens))[0]]
    for model.recompute in (False, True):
        sizes.append(kept(lambda: set_fast(model)(images, tokens))[0])
    assert sizes[0] > sizes[1] > sizes[2]
    model.double()
    again = results(model)
    model.recompute = False
    assert_same(results(model), again, 1e-12)


# ---- attention
def test_scaled_dot_product_attention_wherever_no_map_is_asked_for(monkeypatch):
    """12 text blocks, 12 in the Bridger, the pool, 6 in the decoder; `look` asks for maps and gets the plain path's."""
    model, (images, tokens, _) = model_of(dtype=torch.float32).eval(), inputs()
    seen = calls(monkeypatch, F, "scaled_dot_product_attention")
    plain = model.look(images, tokens)
    assert not seen
    set_fast(model)(images, tokens)
    assert len(seen) == 12 + 12 + 1 + 6
    fast = model.look(images, tokens)
    maps = {name for name, x in plain.items() if name.endswith("attn")}
    assert len(maps) == 12 + 12 + 6 and maps <= fast.keys()
    assert_same({name: plain[name] for name in maps}, {name: fast[name] for name in maps}, 1e-4)


def test_the_gates_dead_tensors_stay_in_the_state_dict_and_out_of_the_optimiser(tmp_path):
    """Width 64, three gates: 3 · 2 · (64² + 64) = 24,960 numbers that Adam does not know; the rest of a gate learns."""
    args = train.arguments(["--weights", "random", "--out", str(tmp_path), "--lr", "0.01"])
    model, (images, tokens, masks) = model_of(SHALLOW, torch.float32), inputs()
    run = train.Run(args, set_fast(model), torch.device("cpu"), torch.float32, 10)
    known = sum(x.numel() for group in run.adam.param_groups for x in group["params"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) - known == 24960
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for _ in range(3):
        train.step(run, {"image": images, "tokens": tokens, "mask": masks, "ref_id": torch.arange(2)})
    for name, x in model.state_dict().items():
        if "gates" in name and "in_proj" in name:
            dead = len(x) // 3 * 2
            assert torch.equal(x[:dead], before[name][:dead]) and not torch.equal(x[dead:], before[name][dead:])
    assert all(x.grad is None for group in run.adam.param_groups for x in group["params"])


def test_leaving_the_dead_rows_out_changes_no_step(tmp_path):
    """Three steps by train.py and three of an Adam that knows every parameter: the same numbers, to the last bit."""
    args = train.arguments(["--weights", "random", "--out", str(tmp_path), "--lr", "0.01"])
    start, (images, tokens, masks) = model_of(SHALLOW, torch.float32), inputs()
    one, other = set_fast(copy.deepcopy(start)), set_fast(copy.deepcopy(start))
    run = train.Run(args, one, torch.device("cpu"), torch.float32, 10)
    assert len(run.partly) == 6
    run.rate.step = lambda: None
    adam = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], run.rate.get_last_lr()[0],
                            betas=(0.9, args.beta2), fused=True)  # fmt: skip
    for _ in range(3):
        train.step(run, {"image": images, "tokens": tokens, "mask": masks, "ref_id": torch.arange(2)})
        adam.zero_grad()
        text_to_pixel_loss(other(images.contiguous(memory_format=torch.channels_last), tokens), masks).backward()
        adam.step()
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in one.state_dict().items())


# ---- the projector
@pytest.mark.parametrize("size", [(3, 4), (1, 5), (6, 2), (1, 1)])
@pytest.mark.parametrize("dtype", BOUND)
def test_channels_may_be_mixed_before_a_map_is_enlarged(size, dtype):
    """What the 3×3 convolution of the enlarged map and `convolve_doubled` makes, borders included; gradients too."""
    x, weight = torch.randn(2, 5, *size, dtype=dtype), torch.randn(7, 5, 3, 3, dtype=dtype)
    found = []
    for function in (lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear"), w, padding=1),
                     convolve_doubled):  # fmt: skip
        one, two = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(one, two)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
        found.append({"out": out.detach(), "x": one.grad, "weight": two.grad})
    assert_same(*found, BOUND[dtype])


def test_no_map_is_enlarged_and_no_1x1_convolution_runs_on_the_largest(monkeypatch):
    """Plain: two enlargements, three convolutions and one by the sentence's kernel. Fast: none of these."""
    projector = Projector(model_of(SHALLOW, torch.float32).clip)
    features, sentence = torch.randn(2, 64, 4, 4), torch.randn(2, 32)
    seen = calls(monkeypatch, F, "conv2d")
    plain = projector(features, sentence)
    assert len(seen) == 4
    seen.clear()
    assert_same({"logits": plain}, {"logits": set_fast(projector)(features, sentence)}, 1e-4)
    assert not seen


# ---- the step
def test_fused_adam_takes_the_same_steps():
    """Three steps from the same gradients; float32, so to a millionth."""
    start, moved = model_of(SHALLOW, torch.float32), []
    for fused in (False, True):
        model, dice = copy.deepcopy(start), torch.Generator().manual_seed(2)
        learn = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.Adam(learn, 1e-3, fused=fused)
        for _ in range(3):
            for p in learn:
                p.grad = torch.randn(p.shape, generator=dice)
            adam.step()
        moved.append({str(i): p.detach() for i, p in enumerate(learn)})
    assert_same(*moved, 1e-6)


def test_bf16_stays_near():
    """Eight bits of mantissa: no equality. Logits stay within a tenth, the loss, always float32, within a hundredth."""
    model, (images, tokens, masks) = set_fast(model_of(dtype=torch.float32)).eval(), inputs()
    exact = model(images, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images, tokens)
        loss = text_to_pixel_loss(rough, masks)
    assert rough.dtype is torch.bfloat16 and loss.dtype is torch.float32
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()
    assert loss.item() == pytest.approx(text_to_pixel_loss(exact, masks).item(), rel=0.01)


# ---- evaluation
@pytest.mark.parametrize("stages, begins", [((0, 1, 2), 1), ((1,), 2), ((2,), 3), ((), 3)])
def test_a_picture_of_several_sentences_is_seen_once_below_the_bridges(stages, begins):
    """Two pictures, five sentences: the logits of five pictures; stem and stages below the first bridge see two."""
    model, (images, tokens, _) = set_fast(model_of(SHALLOW, stages=stages)).eval(), inputs(4)
    images, tokens, owner = images[:2].double(), tokens[[0, 1, 2, 3, 0]], torch.tensor([0, 0, 1, 0, 1])
    each, seen = model(images[owner], tokens), []
    for layer in (model.clip.visual.layer1, *model.clip.visual.stages):
        layer.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    assert_same({"logits": each}, {"logits": model(images, tokens, owner=owner)}, 1e-10)
    assert seen == [2] * (1 + begins) + [5] * (3 - begins)


def test_evaluation_shares_pictures_and_measures_the_same():
    """Drawn scenes in batches of five sentences and one at a time: the same rows, fewer pictures seen."""
    model = set_fast(model_of(SHALLOW, torch.float32))
    source, seen = open_dataset("scenes", "val", limit=4), []
    model.clip.visual.layer1.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    _, alone = evaluate(model, source, batch_size=1, progress=False)
    count = len(seen)
    seen.clear()
    _, together = evaluate(model, source, batch_size=5, progress=False)
    assert count == len(alone) > sum(seen) and [row["sent_id"] for row in alone] == [row["sent_id"] for row in together]
    assert all(abs(a["I"] - b["I"]) <= 2 and abs(a["U"] - b["U"]) <= 2 for a, b in zip(alone, together, strict=True))


# ---- compiling
def test_compiling_leaves_names_and_numbers_and_says_what_it_bought(monkeypatch, tmp_path, capsys):
    """--compile compiles model and loss together; the model itself, and so a checkpoint, keeps its names.

    After the second of four steps; told after the fourth. Here torch traces and does not generate code ("eager"), which
    would take a minute.
    """
    real, compiled, states = torch.compile, [], []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or real(f, backend="eager"))
    monkeypatch.setattr(train, "TRIAL", 2)
    given = ["--weights", "random", "--steps", "4", "--batch-size", "2", "--limit", "8", "--size", "64"]
    for more in ([], ["--compile"]):
        out = tmp_path / str(len(states))
        train.main([*given, "--processes", "1", "--device", "cpu", "--out", str(out), *more])
        states.append(torch.load(out / "last.pt", weights_only=True)["tuned"])
        assert capsys.readouterr().out.count("compiled in ") == len(compiled) == len(more)
    assert_same({n: x.double() for n, x in states[0].items()}, {n: x.double() for n, x in states[1].items()}, 1e-4)


def test_what_compiling_bought_is_told_against_what_it_took(monkeypatch):
    """Steps of 2 s, of 1 s after one of 11: it took 10 s, which 10 steps earn. The first step of all warms up."""
    monkeypatch.setattr(train, "TRIAL", 3)
    told = train.bought([9, 2, 2, 11, 1, 1])
    assert told == "compiled in 10.0 s: a step takes 1 s, before 2 (2.00×); paid back after 10 steps"
    assert train.bought([9, 1, 1, 11, 2, 2]).endswith("before 1 (0.50×); it does not pay here: leave --compile out")


# ---- benchmark.py
def test_the_ladder_leads_from_the_plain_path_to_what_training_does():
    """No trick on the first rung; on the last the modules, layout and optimiser of train.py; one more on each."""
    bench = benchmark.Bench(train.arguments(["--weights", "random"]), torch.device("cpu"))
    rungs = benchmark.ladder(bench.device)
    climb = list(rungs.values())[: list(rungs).index(benchmark.FAST) + 1]
    assert climb[0] == benchmark.Tricks() and climb[-1].fused and climb[-1].channels_last
    assert all(sum(a != b for a, b in zip(astuple(x), astuple(y), strict=True)) == 1 for x, y in pairwise(climb))
    switches = [module for module in bench.model.modules() if hasattr(module, "fast")]
    bench.fill(1, 32).dress(climb[-1])
    assert all(module.fast for module in switches) and bench.model.clip.visual.conv1.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    bench.dress(climb[0])
    assert not any(module.fast for module in switches) and bench.model.clip.visual.conv1.weight.is_contiguous()


def test_what_the_benchmark_measures_adds_up():
    """Three parts are the step; parts of the model are 100 %; the peak grows with the batch; and no weight moves."""
    bench = benchmark.Bench(train.arguments(["--weights", "random"]), torch.device("cpu")).fill(1, 32)
    before = {name: x.clone() for name, x in bench.model.named_parameters()}
    tricks = benchmark.ladder(bench.device)[benchmark.FAST]
    spent = bench.step(tricks)
    assert spent.pop("train_step") == pytest.approx(sum(spent.values())) and min(spent.values()) > 0
    rows = list(benchmark.part_rows(bench, tricks))
    assert {"part: text", "part: bridger", "part: picture: layer3", "part: projector"} <= {row["row"] for row in rows}
    assert sum(row["share"] for row in rows) == pytest.approx(100)
    few, many = bench.memory(tricks), bench.fill(4, 32).memory(tricks)
    weights = sum(x.nbytes for x in bench.model.state_dict().values()) / 2**20
    assert weights < few < many
    assert all(torch.equal(x, before[name]) for name, x in bench.model.named_parameters())


def test_what_keeps_memory_takes_turns_after_the_rest(monkeypatch):
    """Blocks once kept would spare the plain path their price. All rungs up to the last but one, then the others."""
    groups, parts = [], dict.fromkeys(("train_step", "forward", "backward", "optimiser"), [1.0, 1.0])
    monkeypatch.setattr(benchmark, "take_turns", lambda some, _: groups.append([*some]) or dict.fromkeys(some, parts))
    bench = type("Fake", (), {"batch": [[0, 0]], "memory": lambda self, tricks: 100.0})()
    rungs = benchmark.ladder(torch.device("cpu"))
    rows = [row["row"] for row in benchmark.step_rows(bench, rungs, 0)]
    last = list(rungs).index(benchmark.FAST)
    assert groups == [list(rungs)[:last], list(rungs)[last:]] and groups[0][0] == "plain"
    assert rows[4:] == [f"ladder: {name}" for name in rungs]


def test_variants_take_turns_and_the_first_round_is_not_counted():
    order, clock = [], iter(range(1000))
    functions = {name: lambda name=name: order.append(name) or {"step": next(clock)} for name in ("plain", "fast")}
    times = benchmark.take_turns(functions, 0)
    assert order[:6] == ["plain", "fast"] * 3 and times["plain"]["step"] == [2, 4, 6]
    assert benchmark.middle([4.0, 1.0, 3.0, 2.0, 5.0])["quartiles"] == [2.0, 4.0]


def test_the_benchmark_prints_writes_and_draws_what_it_measured(monkeypatch, tmp_path, capsys):
    """`--backbone tiny --batch-size 2 --quick --json`, three rounds of everything: rows as DESIGN names them."""
    real = benchmark.take_turns
    monkeypatch.setattr(benchmark, "take_turns", lambda functions, seconds: real(functions, 0))
    path = tmp_path / "b.json"
    benchmark.main(["--backbone", "tiny", "--batch-size", "2", "--quick", "--device", "cpu", "--json", str(path)])
    rows = {row["row"]: row for row in json.loads(path.read_text())}
    step = rows["train_step"]
    assert step["speedup"] == pytest.approx(step["plain_seconds"] / step["seconds"])
    assert {"backbone", "device", "seconds", "plain_seconds", "speedup", "memory_mb"} <= set(step)
    assert step["backbone"] == "tiny" and 0 < rows["data"]["share"] < 100 and rows["machine"]["device"] == "cpu"
    assert {"forward", "backward", "optimiser", "evaluation", "growth: batch", "growth: size"} <= rows.keys()
    assert rows["evaluation"]["rounds"] == 3 and "evaluation: fast + bf16" in rows
    assert 0 < rows["matrix rate: plain"]["share"] < 100 and path.with_suffix(".png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert all(f"\n{name}" in said for name in rows if name != "machine")


def test_memory_of_larger_batches_is_the_line_through_the_measured_ones():
    """Micro-batches are measured, at the largest batch wanted; with one or two objects there are none."""
    bench, small = benchmark.Bench(train.arguments(["--weights", "random"]), torch.device("cpu")), benchmark.MICRO
    rungs = {name: benchmark.ladder(bench.device)[name] for name in ("plain", small)}
    bench.fill(1).step(rungs["plain"])  # Adam's moments stand from now on
    one, two, eight = benchmark.memory_rows(bench, rungs, (1, 2), (2, 8))
    assert [row["how"] for row in (one, two, eight)] == ["measured", "measured", "computed"]
    slope = two["memory_mb"] - one["memory_mb"]
    assert slope > 0 and eight["memory_mb"] == pytest.approx(two["memory_mb"] + 6 * slope)
    *_, whole, micro = benchmark.memory_rows(bench, rungs, (1, 8), (8,))
    assert (micro["row"], micro["batch"], micro["how"]) == (f"memory: {small}", 8, "measured")
    assert micro["memory_mb"] < whole["memory_mb"] and micro["seconds"] > 0
