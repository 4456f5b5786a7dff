"""9. tuning.py: each method from outside, the identity where it promises that, all it adds learns, nothing else."""

import pytest
import torch
from torch.nn.utils import parametrize

import train
import tuning
from clip_model import CLIP, SIZES, Attention, UserError, tokenize
from etris import assemble
from official import load_checkpoint
from tuning import METHODS, Adapter, HypercomplexLinear, LowRank, apply, build, make_room, parse

BACKBONES = pytest.mark.parametrize("backbone", ["tiny", "tiny-vit"])
ADDED = ("adapter", "conv-adapter", "compacter", "coop", "lora")


def small(how, backbone="tiny", **config):
    torch.manual_seed(0)
    config = {"size": 64, "words": 8, "weights": "random", "width": 32, "dropout": 0.0} | config
    return build(backbone, tuning=how, **config)


def inputs():
    tokens = tokenize(["the red cat on the left", "two big stars"], 8)
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), tokens


@torch.no_grad()
def logits(model):
    return model.eval()(*inputs())


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_all(model):
    """With every name that a shared parameter has."""
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}


def on_paper(how, backbone="RN101", **options):
    with torch.device("meta"):
        clip = CLIP(SIZES[backbone]).requires_grad_(False)
        bridges = options if "bridger" in how else {"stages": ()}
        return apply(assemble(clip, 416, 17, **bridges), parse(how))


def count(module, prefix=""):
    return sum(p.numel() for name, p in module.named_parameters() if p.requires_grad and name.startswith(prefix))


# ---- identity, gradients, what is frozen
@BACKBONES
@pytest.mark.parametrize("how", ["adapter", "conv-adapter", "compacter", "lora", "full", "bitfit"])
def test_the_first_logits_are_those_of_the_frozen_model_bit_for_bit(how, backbone):
    if (how, backbone) == ("conv-adapter", "tiny-vit"):
        with pytest.raises(UserError, match="choose adapter"):
            small(how, backbone)
        return
    assert torch.equal(logits(small(how, backbone)), logits(small("frozen", backbone)))
    assert torch.equal(logits(small(f"{how}+bridger", backbone)), logits(small("bridger", backbone)))


@pytest.mark.parametrize("how", [*ADDED, "bitfit", "full", "coop+lora+adapter+bridger"])
def test_gradients_reach_all_that_learns_and_nothing_frozen(how):
    """Away from the start, where a zero matrix hides the one before it; a key's bias shifts all scores alike."""
    model = small(how).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model(*inputs()).square().mean().backward()
    silent = {n for n, p in model.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())}
    assert silent <= {"clip.visual.attnpool.k_proj.bias"}, silent
    assert not [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("how", ADDED)
def test_of_clip_only_what_was_added_learns(how):
    """The names say where: everything under clip. that learns was not there before, and CLIP's numbers stay."""
    model, plain = small(how), small("frozen")
    assert trained(model) - trained(plain) and not trained(model) & set(
        dict(plain.clip.named_parameters(prefix="clip"))
    )
    kept = {n.replace("parametrizations.", "").replace(".original", ""): x for n, x in model.state_dict().items()}
    assert all(torch.equal(kept[name], x) for name, x in plain.state_dict().items())


def test_full_tuning_keeps_the_statistics_and_slows_clip_down(tmp_path):
    """All of CLIP but logit_scale learns, at a tenth of the decoder's rate; BatchNorm's statistics do not move."""
    model = small("full")
    assert set(dict(model.named_parameters())) - trained(model) == {"clip.logit_scale"}
    assert not any(module.training for module in model.clip.modules())
    before = {n: x.clone() for n, x in model.clip.named_buffers()}
    args = train.arguments(["--out", str(tmp_path), "--lr", "0.01"])
    run = train.Run(args, model, torch.device("cpu"), torch.float32, 10)
    assert [group["initial_lr"] for group in run.adam.param_groups] == [0.01, pytest.approx(0.001)]
    weight = model.clip.visual.conv1.weight.detach().clone()
    images, tokens = inputs()
    train.step(run, {"image": images, "tokens": tokens, "mask": torch.ones(2, 1, 64, 64), "ref_id": tokens[:, 0]})
    assert not torch.equal(model.clip.visual.conv1.weight, weight)
    assert all(torch.equal(x, before[n]) for n, x in model.clip.named_buffers())


def test_bitfit_takes_by_name():
    clip = {name for name in trained(small("bitfit")) if name.startswith("clip.")}
    assert clip == {f"clip.{n}" for n, _ in small("frozen").clip.named_parameters() if n.endswith("bias")}


# ---- each method against its formula
@torch.no_grad()
def test_an_adapter_on_a_map_is_two_1x1_convolutions_and_the_map():
    module, x = Adapter(torch.nn.Linear(8, 2), torch.nn.Linear(2, 8), 1), torch.randn(2, 8, 5, 4)
    down, up = (layer.weight[..., None, None] for layer in (module.down, module.up))
    conv = torch.nn.functional.conv2d
    want = x + conv(torch.nn.functional.gelu(conv(x, down, module.down.bias)), up, module.up.bias)
    assert torch.allclose(module(x), want, atol=1e-6)


@torch.no_grad()
def test_a_hypercomplex_weight_is_a_sum_of_kronecker_products():
    """Compacter, equation 4: W = Σ Aᵢ ⊗ (sᵢ tᵢ); at in = 12, out = 8, n = 4, rank 2: 64 + 4·2·2 + 4·2·3 + 8 numbers."""
    layer = HypercomplexLinear(torch.nn.Parameter(torch.randn(4, 4, 4)), 12, 8, rank=2)
    want = sum(torch.kron(layer.rule[i], layer.left[i] @ layer.right[i]) for i in range(4))
    assert torch.allclose(layer.weight(), want, atol=1e-5) and want.shape == (8, 12)
    assert sum(p.numel() for p in layer.parameters()) == 64 + 16 + 24 + 8


@torch.no_grad()
def test_lora_is_a_low_rank_change_of_queries_and_values_alone():
    weight = torch.randn(12, 4)
    change = LowRank(weight, (0, 2), 3, rank=2)
    change.up.normal_()
    q, k, v = (change(weight) - weight).chunk(3)
    assert torch.allclose(q, change.up[0] @ change.down[0], atol=1e-6) and not k.any()
    assert torch.allclose(v, change.up[1] @ change.down[1], atol=1e-6) and torch.linalg.matrix_rank(v) == 2


@BACKBONES
def test_lora_equals_its_merged_weight(backbone):
    """After training, W + BA takes W's place: plain CLIP's layers again, the same logits, nothing left of LoRA."""
    model = small("lora", backbone)
    with torch.no_grad():
        [
            p.add_(0.05 * torch.randn_like(p))
            for n, p in model.named_parameters()
            if "parametrizations" in n and "up" in n
        ]
    tuned = logits(model)
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name)
    assert not any("parametrizations" in name for name in model.state_dict())
    assert type(model.clip.transformer.resblocks[0].attn) is Attention
    changed = model.clip.state_dict()
    for name, x in small("frozen", backbone).clip.state_dict().items():
        parts = (
            [not torch.equal(*pair) for pair in zip(changed[name].chunk(3), x.chunk(3), strict=True)] if x.ndim else []
        )
        if name.endswith("attn.in_proj_weight"):
            assert parts == [True, False, True], name  # queries and values, not keys
        else:
            assert any(parts) == name.endswith(("attnpool.q_proj.weight", "attnpool.v_proj.weight")), name
    assert torch.equal(logits(model), tuned) and not torch.equal(tuned, logits(small("frozen", backbone)))


def test_coop_makes_room_after_the_start_mark():
    """start 5 6 end 0 0, two places, at most 7: start _ _ 5 6 end 0; at most 5: cut, and the end mark last."""
    tokens = torch.tensor([[90, 5, 6, 99, 0, 0]])
    assert make_room(tokens, 2, 7).tolist() == [[90, 0, 0, 5, 6, 99, 0]]
    assert make_room(tokens, 2, 5).tolist() == [[90, 0, 0, 5, 99]]


@BACKBONES
@torch.no_grad()
def test_coops_vectors_stand_where_words_would(backbone):
    """Eight learned vectors that equal a word's embedding act like that word written eight times."""
    model = small("coop", backbone, words=8).eval()
    clip, (images, tokens) = model.clip, inputs()
    word = tokenize(["cat"], 3)[0, 1]
    clip.token_embedding.prompt.vectors.copy_(clip.token_embedding.weight[word].expand(8, -1))
    written = torch.cat([tokens[:, :1], word.expand(2, 8), tokens[:, 1:]], dim=1)
    assert torch.allclose(model(images, tokens), small("frozen", backbone).eval()(images, written), atol=1e-5)


# ---- counts at real size: SPEC 5.2
def test_counts_of_the_methods_at_rn101():
    """What the docstrings say; the printed numbers and why they differ stand in `experiments.py counts`."""
    want = {"adapter": 2_391_904 + 3_161_088, "conv-adapter": 1_195_952, "compacter": 107_104, "coop": 4_096,
            "lora": 131_072, "full": 120_737_633 - 1_049_600 - 1, "frozen": 0}  # fmt: skip
    models = {how: on_paper(how) for how in want}
    assert {how: count(model, "clip.") for how, model in models.items()} == want
    assert count(models["adapter"], "clip.visual.") == 2_391_904
    assert count(models["lora"], "clip.visual.attnpool.") == 32_768


ZOOMS = {"zoom-linear": 5_766_641, "zoom-interpolate": 1_450_560, "zoom-mlp": 1_682_633}


@pytest.mark.parametrize("how", ZOOMS)
def test_counts_of_the_zoom_layers_are_those_of_table_5(how):
    assert count(on_paper(f"bridger+{how}", released=True), "bridger.") == ZOOMS[how]


@pytest.mark.parametrize("how", ["adapter", "conv-adapter"])
def test_with_the_bridger_the_counts_add_up(how):
    """Table 8: 4.33M and 3.14M are 2.39M + 1.94M and 1.20M + 1.94M."""
    assert count(on_paper(f"{how}+bridger"), "bridger.") == 1_942_080
    assert count(on_paper(f"{how}+bridger", train_positions=False), "clip.") == count(on_paper(how), "clip.")


# ---- ETRIS with a part swapped
@BACKBONES
@pytest.mark.parametrize("how", ZOOMS)
def test_other_zoom_layers_give_maps_of_the_same_sizes_and_start_small(how, backbone):
    model = small(f"bridger+{how}", backbone)
    visual = model.clip.visual
    sides = [64 // stride for stride in visual.strides]
    for i, bridge in model.bridger.items():
        side, channels = sides[int(i)], visual.channels[int(i)]
        x = torch.randn(2, channels, side, side)
        inside = bridge.zoom_in(x)
        assert inside.shape == (2, 32, sides[1], sides[1])
        assert bridge.zoom_out(inside).shape == x.shape
        assert bridge.zoom_out(torch.randn_like(inside)).std() < 0.2
    assert torch.isfinite(logits(model)).all()


@torch.no_grad()
def test_without_ha_no_other_level_and_no_sentence_reaches_the_features():
    """The last map alone, projected with what the full model would start from; GA and projector stay."""
    model, whole = small("bridger+no-ha").eval(), small("bridger").eval()
    maps, _, sentence = model.encode(*inputs())
    features = model.hierarchical(maps, sentence)
    assert torch.equal(features, whole.hierarchical.project[2](maps[2])) and features.shape[2:] == (4, 4)
    assert torch.equal(features, model.hierarchical([None, None, maps[2]], None))


@torch.no_grad()
def test_without_ga_the_projector_gets_what_ha_gives():
    model, whole = small("bridger+no-ga").eval(), small("bridger").eval()
    maps, _, sentence = whole.encode(*inputs())
    assert torch.equal(logits(model), whole.projector(whole.hierarchical(maps, sentence), sentence))


def test_rows_of_a_table_start_from_the_same_decoder():
    """Same seed, whatever else is built: HA, GA and projector begin equal."""
    start = small("frozen").state_dict()
    for how in ("bridger", "adapter+bridger", "full", "bridger+zoom-mlp", "coop"):
        state = small(how).state_dict()
        assert all(torch.equal(x, state[n]) for n, x in start.items() if n.startswith(("hier", "global", "projector")))


# ---- names, checkpoints
@pytest.mark.parametrize(
    "how", ["adapter+bridger", "coop+lora", "compacter", "full", "bridger+zoom-linear", "bridger+no-ha"]
)
def test_a_checkpoint_rebuilds_the_model(how, tmp_path):
    """It holds what learns, of CLIP nothing that does not, and gives back a model with the same logits."""
    model = small(how)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * 0.01 * torch.randn_like(parameter))
    args = train.arguments(["--out", str(tmp_path), "--tuning", how])
    train.Run(args, model, torch.device("cpu"), torch.float32, 10).save("last.pt")
    again = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), logits(small(how)))
    held = torch.load(tmp_path / "last.pt", weights_only=True)["tuned"]
    assert {n for n in held if n.startswith("clip.")} == {n for n in trained_all(model) if n.startswith("clip.")}
    assert again.config["tuning"] == "+".join(parse(how)) and again.config["system"] == "etris"


def test_the_command_trains_and_resumes_joined_methods(tmp_path, capsys):
    command = ["--weights", "random", "--limit", "4", "--batch-size", "4", "--size", "64", "--device", "cpu",
               "--processes", "1", "--out", str(tmp_path), "--tuning", "adapter+bridger"]  # fmt: skip
    train.main([*command, "--steps", "1"])
    with pytest.raises(SystemExit):
        train.main([*command[:-1], "lora", "--steps", "1", "--resume"])
    assert "was trained with --tuning adapter+bridger, not lora" in capsys.readouterr().err


def test_chosen_stages_come_back_with_the_checkpoint():
    model = small("bridger", stages=(0, 2))
    assert list(build(**model.config).bridger) == list(model.bridger) == ["0", "2"]
    assert not build(**small("frozen").config).bridger


@pytest.mark.parametrize("how", ["nothing", "adapter+adapter", "bridger+", ""])
def test_an_unknown_name_lists_the_choices(how):
    with pytest.raises(UserError, match="conv-adapter"):
        build("tiny", tuning=how, weights="random")


def test_unknown_systems_and_systems_without_their_own_parts_are_refused():
    with pytest.raises(UserError, match="etris, barleria, detris"):
        build(system="unet")
    with pytest.raises(UserError, match=r"write bridger\+lora"):
        build(system="barleria", tuning="lora")


@pytest.mark.parametrize(("system", "backbone"), [("barleria", "tiny-vit"), ("detris", "tiny-dino")])
def test_the_other_systems_train_and_come_back(system, backbone, tmp_path):
    """Their own tiny backbone is the default, their preset the size; the checkpoint says which system it is."""
    command = ["--system", system, "--weights", "random", "--limit", "4", "--batch-size", "4", "--device", "cpu"]
    train.main([*command, "--steps", "1", "--tuning", "bridger+lora", "--out", str(tmp_path)])
    model = load_checkpoint(tmp_path / "best.pt")
    assert (model.system, model.config["system"], model.config["backbone"]) == (system, system, backbone)
    assert any("parametrizations" in name for name, _ in model.tuned())


def test_a_systems_backbones_are_its_own():
    with pytest.raises(UserError, match="choose one of ViT-B-16, tiny-vit"):
        train.arguments(["--system", "barleria", "--backbone", "RN50"])
    with pytest.raises(UserError, match="etris, barleria, detris"):
        train.arguments(["--system", "sam"])


def test_every_method_has_a_docstring_that_names_its_source():
    for name in ("adapter", "conv_adapter", "compacter", "lora", "coop", "bitfit"):
        assert any(year in getattr(tuning, name).__doc__ for year in ("2019", "2021", "2022")), name
    assert set(METHODS) >= {"bridger", "frozen", "full", "adapter", "conv-adapter", "compacter", "coop", "lora"}
