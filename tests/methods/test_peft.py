"""methods/peft.py: each method from outside, the identity where it promises that; what learns."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import train
from checkpoint import build_model, load_checkpoint, save_checkpoint
from clip_model import CLIP, CLIP_CONFIGS, Attention
from etris import build_etris
from methods import peft
from methods.peft import (
    METHODS,
    Adapter,
    HypercomplexLinear,
    LowRank,
    apply_tuning,
    insert_prompt_slots,
    parse_tuning,
)
from utils.common import UserError
from utils.tokenizer import tokenize

BACKBONES = pytest.mark.parametrize("backbone", ["tiny", "tiny-vit"])
ADDED = ("adapter", "conv-adapter", "compacter", "coop", "lora")


def small(tuning, backbone="tiny", **options):
    torch.manual_seed(0)
    defaults = {"size": 64, "max_tokens": 8, "weights": "random", "width": 32, "dropout": 0.0}
    return build_model(backbone, tuning=tuning, **{**defaults, **options})


def inputs():
    tokens = tokenize(["the red cat on the left", "two big stars"], 8)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 64, 64, generator=generator), tokens


@torch.no_grad()
def logits(model):
    return model.eval()(*inputs())


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_with_duplicates(model):
    """With every name that a shared parameter has."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if parameter.requires_grad}


def on_paper(tuning, backbone="RN101", **options):
    with torch.device("meta"):
        clip = CLIP(CLIP_CONFIGS[backbone]).requires_grad_(False)
        if "bridger" not in tuning:
            options = {"stages": ()}
        return apply_tuning(build_etris(clip, 416, 17, **options), parse_tuning(tuning))


def count(module, prefix=""):
    parameters = module.named_parameters()
    return sum(p.numel() for name, p in parameters if p.requires_grad and name.startswith(prefix))


# -------------------------------------------------- identity, gradients, what is frozen
@BACKBONES
@pytest.mark.parametrize("how", ["adapter", "conv-adapter", "compacter", "lora", "full", "bitfit"])
def test_the_first_logits_are_those_of_the_frozen_model_bit_for_bit(how, backbone):
    if (how, backbone) == ("conv-adapter", "tiny-vit"):
        with pytest.raises(UserError, match="choose adapter"):
            small(how, backbone)
        return
    assert torch.equal(logits(small(how, backbone)), logits(small("frozen", backbone)))
    with_bridger = small(f"{how}+bridger", backbone)
    assert torch.equal(logits(with_bridger), logits(small("bridger", backbone)))


@pytest.mark.parametrize("how", [*ADDED, "bitfit", "full", "coop+lora+adapter+bridger"])
def test_gradients_reach_all_that_learns_and_nothing_frozen(how):
    """Away from the start, where a zero matrix hides the one before it.

    A key's bias shifts all scores alike.
    """
    model = small(how).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model(*inputs()).square().mean().backward()
    silent = set()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and parameter.grad.any()
        if parameter.requires_grad and not reached:
            silent.add(name)
        assert parameter.requires_grad or parameter.grad is None, name
    assert silent <= {"clip.visual.attnpool.k_proj.bias"}, silent


@pytest.mark.parametrize("how", ADDED)
def test_of_clip_only_what_was_added_learns(how):
    """The names say where: what learns below clip. was not there before; CLIP's weights stay."""
    model = small(how)
    plain = small("frozen")
    clip_names = set(dict(plain.clip.named_parameters(prefix="clip")))
    assert trainable(model) - trainable(plain)
    assert not trainable(model) & clip_names
    kept = {}
    for name, x in model.state_dict().items():
        kept[name.replace("parametrizations.", "").replace(".original", "")] = x
    assert all(torch.equal(kept[name], x) for name, x in plain.state_dict().items())


def test_full_tuning_keeps_the_statistics_and_slows_clip_down(tmp_path):
    """All of CLIP but logit_scale learns, at a tenth of the decoder's rate; BatchNorm's statistics
    do not move.
    """
    model = small("full")
    assert set(dict(model.named_parameters())) - trainable(model) == {"clip.logit_scale"}
    assert not any(module.training for module in model.clip.modules())
    before = {name: x.clone() for name, x in model.clip.named_buffers()}
    args = train.arguments(["--out", str(tmp_path), "--lr", "0.01"])
    optimizer = train.make_optimizer(model, args, torch.device("cpu"))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.01, pytest.approx(0.001)]
    weight = model.clip.visual.conv1.weight.detach().clone()
    images, tokens = inputs()
    batch = {"image": images, "tokens": tokens, "mask": torch.ones(2, 1, 64, 64)}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train.train_step(model, batch, optimizer, scaler, torch.float32)
    assert not torch.equal(model.clip.visual.conv1.weight, weight)
    assert all(torch.equal(x, before[name]) for name, x in model.clip.named_buffers())


def test_bitfit_takes_by_name():
    found = {name for name in trainable(small("bitfit")) if name.startswith("clip.")}
    names = [name for name, _ in small("frozen").clip.named_parameters()]
    assert found == {f"clip.{name}" for name in names if name.endswith("bias")}


# -------------------------------------------------- each method against its formula
@torch.no_grad()
def test_an_adapter_on_a_map_is_two_1x1_convolutions_and_the_map():
    adapter = Adapter(torch.nn.Linear(8, 2), torch.nn.Linear(2, 8), 1)
    x = torch.randn(2, 8, 5, 4)
    down = adapter.down.weight[..., None, None]
    up = adapter.up.weight[..., None, None]
    hidden = F.gelu(F.conv2d(x, down, adapter.down.bias))
    expected = x + F.conv2d(hidden, up, adapter.up.bias)
    assert torch.allclose(adapter(x), expected, atol=1e-6)


@torch.no_grad()
def test_a_hypercomplex_weight_is_a_sum_of_kronecker_products():
    """Compacter, equation 4: W = Σ Aᵢ ⊗ (sᵢ tᵢ).

    At in = 12, out = 8, n = 4, rank 2: 64 + 4·2·2 + 4·2·3 + 8 parameters.
    """
    layer = HypercomplexLinear(torch.nn.Parameter(torch.randn(4, 4, 4)), 12, 8, rank=2)
    products = [torch.kron(layer.rule[i], layer.left[i] @ layer.right[i]) for i in range(4)]
    expected = sum(products)
    assert torch.allclose(layer.weight(), expected, atol=1e-5)
    assert expected.shape == (8, 12)
    assert sum(p.numel() for p in layer.parameters()) == 64 + 16 + 24 + 8


@torch.no_grad()
def test_lora_is_a_low_rank_change_of_queries_and_values_alone():
    weight = torch.randn(12, 4)
    change = LowRank(weight, (0, 2), 3, rank=2)
    change.up.normal_()
    q, k, v = (change(weight) - weight).chunk(3)
    assert torch.allclose(q, change.up[0] @ change.down[0], atol=1e-6)
    assert not k.any()
    assert torch.allclose(v, change.up[1] @ change.down[1], atol=1e-6)
    assert torch.linalg.matrix_rank(v) == 2


@BACKBONES
def test_lora_equals_its_merged_weight(backbone):
    """After training W + BA replaces W: plain CLIP's layers, the same logits, no LoRA left."""
    model = small("lora", backbone)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "parametrizations" in name and "up" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    unmerged = logits(model)
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name)
    assert not any("parametrizations" in name for name in model.state_dict())
    assert type(model.clip.transformer.resblocks[0].attn) is Attention
    merged = model.clip.state_dict()
    plain = small("frozen", backbone)
    for name, x in plain.clip.state_dict().items():
        if name.endswith("attn.in_proj_weight"):
            pairs = zip(merged[name].chunk(3), x.chunk(3), strict=True)
            changed = [not torch.equal(a, b) for a, b in pairs]
            assert changed == [True, False, True], name  # queries and values, not keys
        else:
            expected = name.endswith(("attnpool.q_proj.weight", "attnpool.v_proj.weight"))
            assert torch.equal(merged[name], x) != expected, name
    assert torch.equal(logits(model), unmerged)
    assert not torch.equal(unmerged, logits(plain))


def test_coop_inserts_slots_after_the_start_mark():
    """start 5 6 end 0 0, two slots, at most 7: start _ _ 5 6 end 0.

    At most 5: cut, and the end mark last.
    """
    tokens = torch.tensor([[90, 5, 6, 99, 0, 0]])
    assert insert_prompt_slots(tokens, 2, 7).tolist() == [[90, 0, 0, 5, 6, 99, 0]]
    assert insert_prompt_slots(tokens, 2, 5).tolist() == [[90, 0, 0, 5, 99]]


@BACKBONES
@torch.no_grad()
def test_coops_vectors_stand_where_words_would(backbone):
    """Eight learned vectors equal to a word's embedding act like that word written 8 times."""
    model = small("coop", backbone).eval()
    embedding = model.clip.token_embedding
    images, tokens = inputs()
    word = tokenize(["cat"], 3)[0, 1]
    embedding.prompt.vectors.copy_(embedding.weight[word].expand(8, -1))
    written = torch.cat([tokens[:, :1], word.expand(2, 8), tokens[:, 1:]], dim=1)
    expected = small("frozen", backbone).eval()(images, written)
    assert torch.allclose(model(images, tokens), expected, atol=1e-5)


# -------------------------------------------------- counts at real size
def test_counts_of_the_methods_at_rn101():
    """What the docstrings say; `experiments.reproduce counts` says why the paper's differ."""
    expected = {
        "adapter": 2_391_904 + 3_161_088,
        "conv-adapter": 1_195_952,
        "compacter": 107_104,
        "coop": 4_096,
        "lora": 131_072,
        "full": 120_737_633 - 1_049_600 - 1,
        "frozen": 0,
    }
    models = {how: on_paper(how) for how in expected}
    assert {how: count(model, "clip.") for how, model in models.items()} == expected
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
    both = on_paper(f"{how}+bridger", train_positions=False)
    assert count(both, "clip.") == count(on_paper(how), "clip.")


# -------------------------------------------------- ETRIS with a part swapped
@BACKBONES
@pytest.mark.parametrize("how", ZOOMS)
def test_other_zoom_layers_give_maps_of_the_same_sizes_and_start_small(how, backbone):
    model = small(f"bridger+{how}", backbone)
    visual = model.clip.visual
    sides = [64 // stride for stride in visual.strides]
    for i, bridge in model.bridger.items():
        side = sides[int(i)]
        x = torch.randn(2, visual.channels[int(i)], side, side)
        zoomed = bridge.zoom_in(x)
        assert zoomed.shape == (2, 32, sides[1], sides[1])
        assert bridge.zoom_out(zoomed).shape == x.shape
        assert bridge.zoom_out(torch.randn_like(zoomed)).std() < 0.2
    assert torch.isfinite(logits(model)).all()


@torch.no_grad()
def test_without_ha_no_other_level_and_no_sentence_reaches_the_features():
    """The last map alone, projected by what the full model would start from; GA, projector stay."""
    model = small("bridger+no-ha").eval()
    whole = small("bridger").eval()
    maps, _, sentence = model.encode(*inputs())
    features = model.hierarchical_alignment(maps, sentence)
    assert torch.equal(features, whole.hierarchical_alignment.project[2](maps[2]))
    assert features.shape[2:] == (4, 4)
    assert torch.equal(features, model.hierarchical_alignment([None, None, maps[2]], None))


@torch.no_grad()
def test_without_ga_the_projector_gets_what_ha_gives():
    model = small("bridger+no-ga").eval()
    whole = small("bridger").eval()
    maps, _, sentence = whole.encode(*inputs())
    features = whole.hierarchical_alignment(maps, sentence)
    assert torch.equal(logits(model), whole.projector(features, sentence))


def test_rows_of_a_table_start_from_the_same_decoder():
    """Same seed, whatever else is built: HA, GA and projector begin equal."""
    start = {}
    for name, x in small("frozen").state_dict().items():
        if name.startswith(("hierarchical_alignment", "global_alignment", "projector")):
            start[name] = x
    assert start
    for how in ("bridger", "adapter+bridger", "full", "bridger+zoom-mlp", "coop"):
        state = small(how).state_dict()
        assert all(torch.equal(x, state[name]) for name, x in start.items())


# -------------------------------------------------- names, checkpoints
REBUILT = [
    "adapter+bridger",
    "coop+lora",
    "compacter",
    "full",
    "bridger+zoom-linear",
    "bridger+no-ha",
]


@pytest.mark.parametrize("how", REBUILT)
def test_a_checkpoint_rebuilds_the_model(how, tmp_path):
    """It holds what learns, of CLIP nothing that does not, and gives a model with equal logits."""
    model = small(how)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    args = train.arguments(["--out", str(tmp_path), "--tuning", how])
    save_checkpoint(tmp_path / "last.pt", model, args)
    again = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(small(how)))
    stored = torch.load(tmp_path / "last.pt", weights_only=True)["tuned"]
    stored_of_clip = {name for name in stored if name.startswith("clip.")}
    learns = {name for name in trainable_with_duplicates(model) if name.startswith("clip.")}
    assert stored_of_clip == learns
    assert again.config["tuning"] == "+".join(parse_tuning(how))
    assert again.config["system"] == "etris"


def test_the_command_trains_and_resumes_joined_methods(tmp_path, capsys):
    command = ["--weights", "random", "--limit", "4", "--batch-size", "4", "--size", "64"]
    command += ["--device", "cpu", "--out", str(tmp_path), "--steps", "1"]
    train.main([*command, "--tuning", "adapter+bridger"])
    with pytest.raises(SystemExit):
        train.main([*command, "--tuning", "lora", "--resume"])
    assert "was trained with --tuning adapter+bridger, not lora" in capsys.readouterr().err


def test_chosen_stages_come_back_with_the_checkpoint():
    model = small("bridger", stages=(0, 2))
    assert list(build_model(**model.config).bridger) == list(model.bridger) == ["0", "2"]
    assert not build_model(**small("frozen").config).bridger


@pytest.mark.parametrize("how", ["nothing", "adapter+adapter", "bridger+", "", "frozen+bridger"])
def test_an_unknown_name_lists_the_choices(how):
    with pytest.raises(UserError, match="conv-adapter"):
        build_model("tiny", tuning=how, weights="random")


def test_unknown_systems_and_systems_without_their_own_modules_are_refused():
    with pytest.raises(UserError, match="etris, barleria, detris"):
        build_model(system="unet")
    with pytest.raises(UserError, match=r"write bridger\+lora"):
        build_model("tiny-vit", system="barleria", tuning="lora")


OTHER_SYSTEMS = [("barleria", "tiny-vit"), ("detris", "tiny-dino")]


@pytest.mark.parametrize(("system", "backbone"), OTHER_SYSTEMS)
def test_the_other_systems_train_and_come_back(system, backbone, tmp_path):
    """Their own tiny backbone is the default, their preset the size; the file names the system."""
    command = ["--system", system, "--weights", "random", "--limit", "4", "--batch-size", "4"]
    command += ["--device", "cpu", "--steps", "1", "--tuning", "bridger+lora"]
    train.main([*command, "--out", str(tmp_path)])
    model = load_checkpoint(tmp_path / "best.pt")
    assert model.system == model.config["system"] == system
    assert model.config["backbone"] == backbone
    assert any("parametrizations" in name for name in model.trainable_state_dict())


def test_a_systems_backbones_are_its_own():
    with pytest.raises(UserError, match="choose one of ViT-B-16, tiny-vit"):
        train.arguments(["--system", "barleria", "--backbone", "RN50"])
    with pytest.raises(UserError, match="etris, barleria or detris"):
        train.arguments(["--system", "sam"])


def test_every_method_has_a_docstring_that_names_its_source():
    for name in ("adapter", "conv_adapter", "compacter", "lora", "coop", "bitfit"):
        docstring = getattr(peft, name).__doc__
        assert any(year in docstring for year in ("2019", "2021", "2022")), name
    expected = {"bridger", "frozen", "full", "adapter", "conv-adapter", "compacter", "coop", "lora"}
    assert set(METHODS) >= expected
