"""fast.py: every trick, at RN101's depth (its widths are an eighth), changes the work, not the
result.

max|Δ| / max|·| ≤ 1e-10 in float64 and ≤ 1e-4 in float32, for logits and for the gradient of
everything that learns.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

import train
from checkpoint import build_model
from clip_model import CLIP, Attention, CLIPConfig, build_clip
from data import open_dataset
from etris import Gate, Projector, build_etris, text_to_pixel_loss
from evaluate import evaluate
from fast import (
    FAST,
    FOLDED,
    FoldedPair,
    compile_if_possible,
    conv3x3_after_upsample,
    recompute_decoder,
    set_fast,
)
from methods.peft import apply_tuning, parse_tuning
from utils.clip_weights import init_by_name
from utils.tokenizer import tokenize

DEEP = CLIPConfig(
    embed_dim=32,
    image_size=64,
    vision_layers=(3, 4, 23, 3),
    vision_width=8,
    text_width=64,
    text_layers=12,
    context_length=20,
)
SHALLOW = CLIPConfig(
    embed_dim=32,
    image_size=64,
    vision_layers=(1, 2, 1, 1),
    vision_width=8,
    text_width=64,
    text_layers=3,
    context_length=20,
)
BOUND = {torch.float64: 1e-10, torch.float32: 1e-4}


def model_of(config=DEEP, dtype=torch.float64, tuning="bridger", **options):
    """With norms as training leaves them: no scale is 1, no mean 0; and with tuned parts that do
    something.
    """
    torch.manual_seed(0)
    clip = build_clip(init_by_name(CLIP(config).state_dict()))
    for norm in (module for module in clip.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.3)
    model = build_etris(clip, 64, 8, width=16, dropout=0.0, **options)
    apply_tuning(model, parse_tuning(tuning))
    for name, parameter in model.named_parameters():
        if "adapter" in name or ".up" in name:  # else they start as the identity
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def inputs(count=2, side=64):
    texts = ["the red cat on the left", "dog", "ring", "two big stars"][:count]
    generator = torch.Generator().manual_seed(1)
    masks = (torch.rand(count, 1, side, side, generator=generator) > 0.7).float()
    images = torch.randn(count, 3, side, side, generator=generator)
    return images, tokenize(texts, 8), masks


def results(model, dtype=torch.float64, side=64):
    """{"logits": …, name of what learns: its gradient}; the gates' queries and keys, dead by
    design, left out.
    """
    images, tokens, masks = inputs(side=side)
    model.zero_grad()
    logits = model(images.to(dtype), tokens)
    text_to_pixel_loss(logits.to(dtype), masks.to(dtype)).backward()
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        dead_rows = 0
        if "gates" in name and "in_proj" in name:
            dead_rows = len(parameter) // 3 * 2
        found[name] = parameter.grad[dead_rows:]
    return found


def assert_same(plain, fast, bound):
    assert plain.keys() == fast.keys()
    for name, x in plain.items():
        off = (x - fast[name]).abs().max().item()
        # a bias of keys has no effect: its gradient is 0 but for rounding, hence the 1e-5
        largest = max(1e-5, x.abs().max().item())
        assert off <= bound * largest, f"{name}: {off:.2e} of {largest:.2e}"


def calls(monkeypatch, owner, name):
    """How often the function is called from now on: a list that grows."""
    seen = []
    function = getattr(owner, name)

    def counted(*args, **options):
        seen.append(name)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, counted)
    return seen


def swapped(model):
    """The modules that have a fast method of their own, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if {"forward", "attend"} & vars(module).keys()
    }


# ---- all of it
@pytest.mark.parametrize("dtype", BOUND)
def test_the_fast_path_gives_the_same_logits_and_gradients_and_can_be_left(dtype):
    """set_fast on: the same. Off again: bit for bit what it was. The state dict never changes, in
    name or number.
    """
    model = model_of(dtype=dtype)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.eval()  # of BatchNorm in the head too: statistics would move between the two
    plain = results(model, dtype)
    assert_same(plain, results(set_fast(model), dtype), BOUND[dtype])
    model.to(memory_format=torch.channels_last)
    assert_same(plain, results(model, dtype), BOUND[dtype])
    set_fast(model, False).to(memory_format=torch.contiguous_format)
    assert_same(plain, results(model, dtype), 0)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in state.items())


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "tiny-vit", "size": 64},
        {"backbone": "tiny-vit", "size": 64, "tuning": "lora+bridger"},
        {"backbone": "tiny-vit", "size": 96, "system": "barleria"},
        {"backbone": "tiny-dino", "size": 96, "system": "detris"},
        {"backbone": "tiny-dino", "size": 96, "system": "detris", "tuning": "bridger+lora"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", BOUND)
def test_every_system_computes_the_same_on_the_fast_path(options, dtype):
    torch.manual_seed(0)
    model = build_model(weights="random", max_tokens=8, dropout=0.0, **options)
    for name, parameter in model.named_parameters():
        if ".up" in name:
            nn.init.normal_(parameter, std=0.1)
    model = model.to(dtype).eval()
    plain = results(model, dtype, model.size)
    assert_same(plain, results(set_fast(model), dtype, model.size), BOUND[dtype])
    assert_same(plain, results(set_fast(model, False), dtype, model.size), 0)


def test_set_fast_is_the_only_switch():
    """A new model is plain. Then every module of a class with a trick has its fast method, and no
    other module has one; switched off, none has.
    """
    model = model_of(SHALLOW)
    assert not swapped(model)
    expected = set()
    for name, module in set_fast(model).named_modules():
        if type(module) in FAST:
            expected.add(name)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and name.startswith("clip."):
            expected.add(name)
    found = swapped(model)
    assert found.keys() == expected
    assert {Attention, Gate, Projector, nn.Conv2d, nn.BatchNorm2d} <= {*map(type, found.values())}
    assert not swapped(set_fast(model, False))


def test_tricks_can_be_switched_class_by_class():
    """What an experiment that measures them one by one needs."""
    model = model_of(SHALLOW)
    kinds = {type(module) for module in swapped(set_fast(model, classes=[Gate])).values()}
    assert kinds == {Gate}
    kinds = {type(module) for module in swapped(set_fast(model, classes=FOLDED)).values()}
    assert kinds == {Gate, nn.Conv2d, nn.BatchNorm2d}
    set_fast(model, False, classes=[Gate])
    assert {type(module) for module in swapped(model).values()} == {nn.Conv2d, nn.BatchNorm2d}


@pytest.mark.parametrize("tuning", ["bridger", "lora+bridger", "adapter+bridger"])
def test_a_copy_of_a_fast_model_is_fast_and_on_its_own(tuning):
    """The copy's methods are bound to the copy: what happens to it leaves the original alone."""
    model = set_fast(model_of(SHALLOW, tuning=tuning)).eval()
    before = results(model)
    twin = copy.deepcopy(model)
    assert swapped(twin).keys() == swapped(model).keys()
    assert_same(before, results(twin), 0)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert results(twin)["logits"].abs().max() == 0
    assert_same(before, results(model), 0)
    set_fast(model, False)
    assert swapped(twin)


def test_a_state_dict_loads_into_either_path():
    model = set_fast(model_of(SHALLOW))
    plain = model_of(SHALLOW)
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)


def test_the_fast_path_can_be_compiled():
    """One graph without a break, with torch's attention and without BatchNorm of the frozen tower;
    the model keeps its parameters' names. Here torch traces and generates no code, which would take
    a minute.
    """
    model = set_fast(model_of(SHALLOW)).eval()
    images, tokens, _ = inputs()
    names = list(model.state_dict())
    expected = model(images.double(), tokens)
    called = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same({"logits": expected}, {"logits": compiled(images.double(), tokens)}, 1e-10)
    norms = [m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    own = [
        m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and n[:5] != "clip."
    ]
    assert sum("scaled_dot_product_attention" in name for name in called) == 3 + 12 + 1 + 6
    assert sum("batch_norm" in name for name in called) == len(own) < len(norms)
    assert list(model.state_dict()) == names


# ---- BatchNorm in its convolution
def test_the_frozen_towers_norms_are_folded_into_their_convolutions(monkeypatch):
    """RN101 has 3 + 33 · 3 + 4 = 106 of them; none is computed on the fast path, the head's own all
    are.
    """
    model = model_of().eval()
    images, tokens, _ = inputs()
    images = images.double()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    frozen = [m for m in model.clip.modules() if isinstance(m, nn.BatchNorm2d)]
    seen = calls(monkeypatch, F, "batch_norm")
    model(images, tokens)
    assert (len(frozen), len(seen)) == (106, len(norms))
    seen.clear()
    set_fast(model)(images, tokens)
    assert len(seen) == len(norms) - 106 > 0


@pytest.mark.parametrize(
    "tuning", ["full", "bitfit+bridger", "lora+bridger", "adapter", "conv-adapter+bridger"]
)
def test_where_the_tower_learns_or_is_adapted_nothing_is_folded_wrongly(tuning):
    """Scales that learn get their gradient; what hangs behind a norm is still passed through."""
    model = model_of(DEEP, tuning=tuning).eval()
    plain = results(model)
    fast = results(set_fast(model))
    assert len(plain) > 10
    assert_same(plain, fast, 1e-10)


def test_what_hangs_behind_a_folded_norm_sees_its_output():
    """A forward hook on a frozen BatchNorm runs, on both paths, and reads the normalized map."""
    model = model_of(SHALLOW).eval()
    images, tokens, _ = inputs()
    outputs = []
    norm = model.clip.visual.layer2[1].bn2
    norm.register_forward_hook(lambda module, args, out: outputs.append(out.clone()))
    for on in (False, True):
        set_fast(model, on)(images.double(), tokens)
    plain, fast = outputs
    assert_same({"out": plain}, {"out": fast}, 1e-10)


def test_a_norm_that_moves_is_never_folded(monkeypatch):
    """Pre-training our own CLIP: in training mode the batch's statistics count, though nothing may
    learn.
    """
    conv = nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False)
    norm = nn.BatchNorm2d(4).requires_grad_(False)
    pair = FoldedPair(conv, norm)
    x = torch.randn(2, 3, 8, 8)

    def run():
        return pair.bn_forward(pair.conv_forward(x))

    seen = calls(monkeypatch, F, "batch_norm")
    norm.train()
    run()
    assert len(seen) == 1 and norm.running_mean.abs().max() > 0
    norm.eval()
    run()
    assert len(seen) == 1
    conv.requires_grad_(True)
    run().sum().backward()
    assert len(seen) == 2 and conv.weight.grad.abs().max() > 0


@torch.no_grad()
def test_a_tensor_written_after_the_switch_counts():
    """The folded weights are made anew: after a write, a load, a way through half precision."""
    model = set_fast(model_of(SHALLOW)).eval()
    images, tokens, _ = inputs()
    images = images.double()
    other = model_of(SHALLOW)
    other.clip.visual.bn2.running_mean.add_(1)
    outputs = [model(images, tokens)]

    def check():
        outputs.append(model(images, tokens))
        assert not torch.allclose(outputs[-2], outputs[-1], rtol=1e-6)
        assert torch.allclose(set_fast(model, False)(images, tokens), outputs[-1], rtol=1e-10)
        set_fast(model)

    model.clip.visual.bn1.bias += 1
    check()
    model.load_state_dict(other.state_dict())
    check()
    model.half().double()
    check()
    model.clip.visual.bn1.bias = nn.Parameter(torch.ones(4).double(), requires_grad=False)
    check()


def test_frozen_weights_are_folded_and_cast_once_a_run(monkeypatch):
    """Not again by the next step, nor by a step after an evaluation in inference mode."""
    model = set_fast(model_of(SHALLOW, torch.float32)).eval()
    folds = calls(monkeypatch, FoldedPair, "fold")
    images, tokens, _ = inputs()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(images, tokens)
    pairs = len(folds)
    assert pairs == 3 + 3 * 5 + 4  # the stem; three convolutions of a block; four shortcuts
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            model(images, tokens).float().sum().backward()
    assert len(folds) == pairs
    results(model, torch.float32)
    assert len(folds) == 2 * pairs


# ---- what is kept for the backward pass
def kept(function):
    """Bytes that autograd keeps of what `function` computes, each storage once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = function()
    return sum(storages.values()), out


def test_there_is_no_graph_below_the_first_trainable_position():
    """Stem, layer1, layer2 keep nothing, nor the words' first third if positions are frozen; then a
    graph begins.
    """
    model = set_fast(model_of(SHALLOW, torch.float32))
    images, tokens, _ = inputs()
    begins = []
    for layer in model.clip.visual.stages:
        layer.register_forward_hook(lambda module, args, out: begins.append(out.requires_grad))
    visual = model.clip.visual
    text = model.clip
    assert kept(lambda: visual.stages[0](visual.stem(images)))[0] == 0
    words = kept(lambda: text.stages[0](text.stem(tokens)))[0]
    model.clip.positional_embedding.requires_grad_(False)
    assert words > kept(lambda: text.stages[0](text.stem(tokens)))[0] == 0
    begins.clear()
    model(images, tokens)
    assert begins == [False, True, True]


def test_folding_keeps_less():
    """Without its norm a convolution's output is not kept."""
    model = model_of(dtype=torch.float32).eval()
    images, tokens, _ = inputs(4)
    plain, _ = kept(lambda: model(images, tokens))
    folded, _ = kept(lambda: set_fast(model, classes=FOLDED)(images, tokens))
    all_tricks, _ = kept(lambda: set_fast(model)(images, tokens))
    assert plain > folded > all_tricks


# ---- attention
@pytest.mark.parametrize("tuning", ["bridger", "lora+bridger"])
def test_scaled_dot_product_attention_wherever_no_weights_are_asked_for(monkeypatch, tuning):
    """12 text blocks, 12 in the Bridger, the pool, 6 in the decoder; `activations` asks for the
    weights and gets the plain path's.
    """
    model = model_of(dtype=torch.float32, tuning=tuning).eval()
    images, tokens, _ = inputs()
    seen = calls(monkeypatch, F, "scaled_dot_product_attention")
    plain = model.activations(images, tokens)
    assert not seen
    set_fast(model)(images, tokens)
    assert len(seen) == 12 + 12 + 1 + 6
    seen.clear()
    fast = model.activations(images, tokens)
    assert not seen and fast.keys() == plain.keys()
    weights = [name for name in plain if name.endswith("attn")]
    assert len(weights) == 12 + 12 + 6
    assert_same(
        {name: plain[name] for name in weights}, {name: fast[name] for name in weights}, 1e-4
    )


def test_a_parametrized_module_keeps_its_trick():
    """LoRA gives an attention a class of its own; its fast method is that of the class before."""
    model = model_of(SHALLOW, tuning="lora+bridger")
    attention = model.clip.transformer.resblocks[0].attn
    assert parametrize.is_parametrized(attention) and type(attention) is not Attention
    assert "attend" in vars(set_fast(model).clip.transformer.resblocks[0].attn)


# ---- the projector
@pytest.mark.parametrize("size", [(3, 4), (1, 5), (6, 2), (1, 1)])
@pytest.mark.parametrize("dtype", BOUND)
def test_channels_may_be_mixed_before_a_map_is_upsampled(size, dtype):
    """What the 3×3 convolution of the upsampled map and `conv3x3_after_upsample` makes, borders
    included; gradients too.
    """
    x = torch.randn(2, 5, *size, dtype=dtype)
    weight = torch.randn(7, 5, 3, 3, dtype=dtype)

    def upsample_then_convolve(x, weight):
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear"), weight, padding=1)

    found = []
    for function in (upsample_then_convolve, conv3x3_after_upsample):
        x_leaf = x.clone().requires_grad_()
        weight_leaf = weight.clone().requires_grad_()
        out = function(x_leaf, weight_leaf)
        factors = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        (out * factors).sum().backward()
        found.append({"out": out.detach(), "x": x_leaf.grad, "weight": weight_leaf.grad})
    assert_same(*found, BOUND[dtype])


def test_no_map_is_upsampled_and_no_1x1_convolution_runs_on_the_largest(monkeypatch):
    """Plain: two upsamplings, three convolutions and one by the sentence's kernel. Fast: none."""
    projector = Projector(model_of(SHALLOW, torch.float32).clip)
    features = torch.randn(2, 64, 4, 4)
    sentence = torch.randn(2, 32)
    seen = calls(monkeypatch, F, "conv2d")
    plain = projector(features, sentence)
    assert len(seen) == 4
    seen.clear()
    fast = set_fast(projector)(features, sentence)
    assert_same({"logits": plain}, {"logits": fast}, 1e-4)
    assert not seen


def test_the_decoder_recomputed_gives_the_same_gradients_and_keeps_less():
    """Bit for bit, with dropout: the second time it is drawn as the first."""
    model = set_fast(model_of(SHALLOW, torch.float32))
    for layer in model.global_alignment.layers:
        layer.dropout.p = layer.self_attn.dropout = 0.5
    images, tokens, _ = inputs()
    gradients = []
    sizes = []
    for again in (False, True):
        if again:
            recompute_decoder(model)
        model.eval().global_alignment.train()
        torch.manual_seed(0)
        gradients.append(results(model, torch.float32))
        sizes.append(kept(lambda: model(images, tokens))[0])
    assert_same(*gradients, 0)
    assert sizes[1] < 0.8 * sizes[0]


# ---- the step
def test_fused_adam_takes_the_same_steps():
    """Three steps from the same gradients; float32, so to a millionth."""
    start = model_of(SHALLOW, torch.float32)
    moved = []
    for fused in (False, True):
        model = copy.deepcopy(start)
        generator = torch.Generator().manual_seed(2)
        learn = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learn, 1e-3, fused=fused)
        for _ in range(3):
            for p in learn:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        moved.append({str(i): p.detach() for i, p in enumerate(learn)})
    assert_same(*moved, 1e-6)


def test_bf16_stays_near():
    """Eight bits of mantissa: no equality. Logits stay within a tenth, the loss, always float32,
    within a hundredth.
    """
    model = set_fast(model_of(dtype=torch.float32)).eval()
    images, tokens, masks = inputs()
    exact = model(images, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images, tokens)
        loss = text_to_pixel_loss(rough, masks)
    assert rough.dtype is torch.bfloat16 and loss.dtype is torch.float32
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()
    assert loss.item() == pytest.approx(text_to_pixel_loss(exact, masks).item(), rel=0.01)


# ---- evaluation
def test_evaluation_in_batches_measures_the_same():
    """Drawn scenes in batches of five sentences and one at a time: the same rows."""
    model = set_fast(model_of(SHALLOW, torch.float32))
    dataset = open_dataset("scenes", "val", limit=4)
    _, alone = evaluate(model, dataset, batch_size=1, progress=False)
    _, together = evaluate(model, dataset, batch_size=5, progress=False)
    assert [row["sent_id"] for row in alone] == [row["sent_id"] for row in together]
    for a, b in zip(alone, together, strict=True):
        assert abs(a["I"] - b["I"]) <= 2
        assert abs(a["U"] - b["U"]) <= 2


# ---- compiling
def test_compiling_leaves_names_and_numbers(monkeypatch, tmp_path):
    """`train.py --compile` trains the same; the model itself, and so a checkpoint, keeps its names.

    Here torch traces and does not generate code ("eager"), which would take a minute.
    """
    real_compile = torch.compile
    compiled = []

    def traced(function, **options):
        compiled.append(function)
        return real_compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    given = ["--weights", "random", "--steps", "4", "--batch-size", "2", "--limit", "8"]
    given += ["--size", "64", "--device", "cpu"]
    states = []
    for extra in ([], ["--compile"]):
        out = tmp_path / str(len(states))
        train.main([*given, "--out", str(out), *extra])
        file = torch.load(out / "last.pt", weights_only=True)
        states.append({name: x.double() for name, x in file["tuned"].items()})
        assert len(compiled) == 2 * len(extra)  # a small function first: is there a compiler?
    assert_same(*states, 1e-4)


def test_without_a_compiler_one_line_and_the_plain_call(monkeypatch, capsys):
    """No compiler or no Triton on the machine must not end a run."""

    def no_compiler(function):
        def call(x):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler was found\nlong story")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = torch.nn.Linear(2, 2)
    assert compile_if_possible(model, "cpu") is model
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no C++ compiler was found" in said
