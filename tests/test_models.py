"""Encoders against torchvision, ghost batch norm against separate ones, the teacher, checkpoint layouts."""

import copy
import importlib.util
import io
import pickle
import sys
import types
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyreid.models import (
    Encoder,
    GhostBatchNorm,
    Teacher,
    build_encoder,
    ghost_,
    load_weights,
    save_weights,
)
from pyreid.models.resnet import SHAPES, ResNet, Shape, parse_name

TINY = Shape((1, 1, 1, 1), bottleneck=False, widths=(4, 8, 8, 16))


def images(count=4, height=32, width=16, seed=0):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return Encoder(ResNet(TINY, ibn=options.pop("ibn", "")), 16, **options)


def assert_equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# --- encoders -------------------------------------------------------------------------------------------


def test_resnet50_is_torchvisions_with_stride_1():
    theirs = torchvision.models.resnet50()
    theirs.layer4[0].conv2.stride = theirs.layer4[0].downsample[0].stride = (1, 1)
    theirs.avgpool = theirs.fc = nn.Identity()
    encoder = build_encoder("resnet50").eval()
    assert encoder.dim == 2048
    assert encoder.backbone.state_dict().keys() == theirs.state_dict().keys()
    encoder.backbone.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        maps = encoder.backbone(images(1, 256, 128))
        assert maps.shape == (1, 2048, 16, 8)
        expected = theirs.eval()(images(1, 256, 128)).view(1, 2048, 16, 8)
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)
        features = encoder(images(1, 256, 128))
    # The neck of an encoder that has not been trained divides by sqrt(1 + eps).
    torch.testing.assert_close(features, maps.mean((2, 3)) / (1 + 1e-5) ** 0.5)


@pytest.mark.parametrize("stride", [1, 2])
def test_basic_blocks_have_the_stride_in_their_first_convolution(stride):
    theirs = torchvision.models.resnet18()
    if stride == 1:
        theirs.layer4[0].conv1.stride = theirs.layer4[0].downsample[0].stride = (1, 1)
    theirs.avgpool = theirs.fc = nn.Identity()
    backbone = build_encoder("resnet18", last_stride=stride).backbone.eval()
    backbone.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        maps = backbone(images(2, 64, 32))
        torch.testing.assert_close(
            maps.flatten(1), theirs.eval()(images(2, 64, 32)).flatten(1), rtol=1e-4, atol=1e-4
        )
    assert maps.shape[2:] == ((4, 2) if stride == 1 else (2, 1))


@pytest.mark.parametrize("name", ["resnet18_ibn_a", "resnet18_ibn_b", "resnet34_ibn_a"])
def test_ibn_net_names(name):
    """The tensors of IBN-Net's published files, told from torchvision's."""
    plain = torchvision.models.get_model(name[:8]).state_dict().keys()
    plain = {key for key in plain if not key.startswith("fc.")}
    if name.endswith("a"):
        expected = set()
        for key in plain:
            layer, norm, kind = key.split(".")[0], *key.split(".")[-2:]
            if norm == "bn1" and layer in ("layer1", "layer2", "layer3"):
                expected.add(key.replace("bn1.", "bn1.BN."))
                if kind in ("weight", "bias"):
                    expected.add(key.replace("bn1.", "bn1.IN."))
            else:
                expected.add(key)
    else:
        expected = plain - {f"bn1.{x}" for x in ("running_mean", "running_var")}
        expected -= {"bn1.num_batches_tracked"}
        expected |= {f"layer{n}.1.IN.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert set(build_encoder(name).backbone.state_dict()) == expected


def test_ibn_a_splits_its_channels():
    norm = build_encoder("resnet18_ibn_a").backbone.layer1[0].bn1
    maps = torch.randn(6, 64, 5, 3)
    out = norm(maps)
    halves = (maps[:, :32], (2, 3)), (maps[:, 32:], (0, 2, 3))
    expected = [
        (half - half.mean(dims, keepdim=True))
        / (half.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()
        for half, dims in halves
    ]
    torch.testing.assert_close(out, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


def test_ibn_b_normalises_the_sum():
    block = build_encoder("resnet18_ibn_b").backbone.layer2[1]
    seen = []
    block.IN.register_forward_hook(lambda module, inputs, output: seen.extend([*inputs, output]))
    maps = torch.randn(2, 128, 6, 4)
    out = block(maps)
    relu = torch.relu
    total = block.bn2(block.conv2(relu(block.bn1(block.conv1(maps))))) + maps
    torch.testing.assert_close(seen[0], total)
    assert torch.equal(out, relu(nn.functional.instance_norm(seen[0])))


@pytest.mark.parametrize("pooling", ["average", "gem"])
@pytest.mark.parametrize("embedding", [0, 24])
def test_forward_is_the_raw_neck(pooling, embedding):
    encoder = tiny(pooling=pooling, embedding=embedding)
    assert encoder.dim == (embedding or 16)
    maps = encoder.backbone(images(8))
    if pooling == "average":
        pooled = maps.mean((2, 3))
    else:
        pooled = maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
        assert encoder.pool.p.shape == (1,)
    if embedding:
        pooled = pooled @ encoder.embedding.weight.T
        assert not encoder.embedding.bias.any()
    expected = (pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + 1e-5).sqrt()
    features = encoder(images(8))
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    features.square().sum().backward()
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert {n for n, _ in encoder.named_parameters()} - trained == {"neck.bias"}
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    assert torch.equal(encoder.neck.weight, torch.ones(encoder.dim))


def test_gem_exponent_is_learned():
    encoder = tiny(pooling="gem").double()
    maps = torch.rand(3, 16, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(encoder.pool, maps)
    encoder.pool(maps).sum().backward()
    assert encoder.pool.p.grad.abs() > 0


@pytest.mark.parametrize("name", ["small", "resnet18", "resnet18_ibn_a"])
def test_seed_gives_the_same_weights(name):
    built = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        built.append(build_encoder(name, pooling="gem", embedding=8))
    assert_equal_states(built[0], built[1])
    assert not torch.equal(built[0].backbone.conv1.weight, built[2].backbone.conv1.weight)


def test_small_is_small():
    encoder = build_encoder("small")
    assert encoder(images(2, 64, 32)).shape == (2, 256)
    assert sum(p.numel() for p in encoder.parameters()) < 2_000_000


def test_a_module_of_ones_own():
    maps = nn.Conv2d(3, 12, 3)
    assert build_encoder(maps, pooling="gem", embedding=5)(images()).shape == (4, 5)
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 16, 7), nn.BatchNorm1d(7))
    vectors[0].eval()
    encoder = build_encoder(vectors, size=(32, 16), norm_group=2)
    assert [module.training for module in vectors] == [False, True, True]
    assert not vectors[2].running_mean.any()
    assert encoder.backbone is vectors
    assert isinstance(vectors[2], GhostBatchNorm)
    assert encoder(images()).shape == (4, 7)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"name": "resnet51"},
            "build_encoder: name must be one of resnet18, resnet34, resnet50, resnet101, small, with or "
            "without _ibn_a or _ibn_b, or timm:NAME, got 'resnet51'",
        ),
        ({"pooling": "max"}, "Encoder: pooling must be average or gem, got 'max'"),
        ({"embedding": -1}, "Encoder: embedding must be 0 (none) or a width, got -1"),
        ({"last_stride": 3}, "build_encoder: last_stride must be 1 or 2, got 3"),
        ({"norm_group": 1}, "ghost batch norm: group must be at least 2, got 1"),
        ({"weights": "imagenet"}, 'build_encoder: weights="imagenet" do not exist for small'),
        (
            {"name": nn.Flatten(0), "size": (4, 2)},
            "build_encoder: the backbone must map (B, 3, H, W) images to (B, C, h, w) or (B, C), "
            "got (48,) for B = 2",
        ),
        (
            {"name": nn.Flatten(), "size": (4, 2), "pooling": "gem"},
            "build_encoder: pooling must be \"average\" for a backbone that pools by itself, got 'gem'",
        ),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError) as caught:
        build_encoder(**{"name": "small", **options})
    assert str(caught.value) == message


def test_names():
    assert parse_name("resnet50_ibn_b") == (SHAPES["resnet50"], "b")
    assert parse_name("small") == (SHAPES["small"], "")
    assert parse_name("resnet50_ibn_c") is None


# --- how encoders run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ibn", ["", "a", "b"])
def test_channels_last(ibn):
    encoder = tiny(ibn=ibn, pooling="gem")
    ghost_(encoder, 4)
    other = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
    expected = encoder(images(8))
    features = other(images(8).to(memory_format=torch.channels_last))
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


def test_autocast_keeps_features_in_float32():
    encoder = tiny(pooling="gem", embedding=8)
    expected = copy.deepcopy(encoder)(images(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder.backbone(images(8)).dtype == torch.bfloat16
        features = encoder(images(8))
    assert features.dtype == torch.float32
    similarity = nn.functional.cosine_similarity(features, expected)
    assert similarity.min() > 0.98
    features.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in encoder.parameters() if p.requires_grad)


def test_compile():
    encoder = ghost_(tiny(), 4)
    eager = copy.deepcopy(encoder)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    for step in range(2):
        a, b = compiled(images(8, seed=step)), eager(images(8, seed=step))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for out in (a, b):
            out.pow(3).sum().backward()
    torch.testing.assert_close(encoder.neck.running_var, eager.neck.running_var)
    grads = [e.backbone.conv1.weight.grad for e in (encoder, eager)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


# --- ghost batch norm -----------------------------------------------------------------------------------


def chunks_of(batch, group):
    """What each group holds: those left over join the last."""
    count = max(1, batch // group)
    return [slice(i * group, batch if i == count - 1 else (i + 1) * group) for i in range(count)]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(2, 17),
    group=st.integers(2, 9),
    space=st.sampled_from([(), (5,), (3, 2), (1, 1)]),
    momentum=st.sampled_from([0.1, 0.9, 1.0, 0.0, None]),
    channels_last=st.booleans(),
)
def test_ghost_equals_a_norm_per_group(batch, group, space, momentum, channels_last):
    torch.manual_seed(batch)
    channels, steps = 3, 3
    kind = nn.BatchNorm2d if len(space) == 2 else nn.BatchNorm1d
    start = kind(channels, momentum=momentum, dtype=torch.float64)
    nn.init.normal_(start.weight)
    nn.init.normal_(start.bias)
    ghost = ghost_(copy.deepcopy(start), group)
    parts = chunks_of(batch, group)
    separate = [copy.deepcopy(start) for _ in parts]
    for _ in range(steps):
        x = torch.randn(batch, channels, *space, dtype=torch.float64)
        if channels_last and len(space) == 2:
            x = x.to(memory_format=torch.channels_last)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        weights = torch.randn_like(x)
        out = ghost(x1)
        expected = torch.cat([norm(x2[part]) for norm, part in zip(separate, parts, strict=True)])
        torch.testing.assert_close(out, expected)
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-6, atol=1e-8)
        # Data-parallel processes average their buffers.
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(norm, name) for norm in separate]).mean(0)
            torch.testing.assert_close(getattr(ghost, name), mean)
            for norm in separate:
                getattr(norm, name).copy_(mean)
    for name in ("weight", "bias"):
        total = sum(getattr(norm, name).grad for norm in separate)
        torch.testing.assert_close(getattr(ghost, name).grad, total)
    assert ghost.num_batches_tracked == steps
    x = torch.randn(batch, channels, *space, dtype=torch.float64)
    torch.testing.assert_close(ghost.eval()(x), separate[0].eval()(x))


def test_ghost_gradient():
    ghost = GhostBatchNorm(2, 3).double()
    x = torch.randn(7, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ghost, x)


def test_ghost_without_running_statistics():
    ghost = GhostBatchNorm(3, 2, affine=False, track_running_stats=False)
    x = torch.randn(4, 3, 5)
    expected = torch.cat([nn.BatchNorm1d(3, affine=False)(half) for half in x.split(2)])
    torch.testing.assert_close(ghost(x), expected)


def test_ghost_in_place_keeps_parameters():
    encoder = tiny(ibn="a")
    before = dict(encoder.named_parameters()), dict(encoder.named_buffers())
    assert ghost_(encoder, 4) is encoder
    after = dict(encoder.named_parameters()), dict(encoder.named_buffers())
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(old[name] is new[name] for name in old)
    norms = [m for m in encoder.modules() if isinstance(m, GhostBatchNorm)]
    assert len(norms) == sum("running_mean" in name for name in before[1])
    assert {norm.group for norm in norms} == {4}
    assert "group=4" in repr(norms[0])
    ghost_(encoder, 6)
    assert {norm.group for norm in norms} == {6}
    assert not isinstance(tiny().neck, GhostBatchNorm)


def test_ghost_group_of_the_batch_is_plain():
    encoder = tiny()
    expected = copy.deepcopy(encoder)(images(4))
    assert torch.equal(ghost_(encoder, 4)(images(4)), expected)


def test_ghost_images_see_only_their_group():
    encoder = ghost_(tiny(), 4)
    batch = images(8)
    first = encoder(batch)[:4]
    batch[4:] = 0.5
    assert torch.equal(encoder(batch)[:4], first)


def test_ghost_refuses_norms_it_does_not_know():
    class ActiveNorm(nn.BatchNorm2d):
        pass

    module = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(ActiveNorm(3)))
    with pytest.raises(ValueError) as caught:
        ghost_(module, 4)
    assert str(caught.value) == (
        "ghost_: batch norms must be torch's BatchNorm1d, 2d or 3d, got ActiveNorm at 1.0"
    )
    assert type(module[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError) as caught:
        GhostBatchNorm(3, 2)(torch.zeros(3))
    assert str(caught.value) == "GhostBatchNorm: input must have shape (N, C, ...), got (3,)"


# --- teacher --------------------------------------------------------------------------------------------


def test_teacher_follows():
    encoder = tiny()
    teacher = Teacher(encoder, momentum=0.9)
    assert_equal_states(teacher.module, encoder)
    assert not any(p.requires_grad for p in teacher.parameters())
    expected = [p.detach().clone() for p in encoder.parameters()]
    for seed in (1, 2, 3):
        with torch.no_grad():
            for p in encoder.parameters():
                p.add_(torch.randn_like(p))
        encoder(images(seed=seed))
        teacher.update(encoder)
        for own, p in zip(expected, encoder.parameters(), strict=True):
            own.mul_(0.9).add_(p.detach(), alpha=0.1)
    for p, own in zip(teacher.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p, own)
    assert not teacher.module.neck.running_mean.any()  # the encoder's statistics are not taken over
    assert teacher.training
    with torch.no_grad():
        features = teacher(images())
    assert teacher.module.neck.running_mean.any()
    assert features.shape == (4, 16)


def test_teacher_with_the_modules_buffers():
    encoder = tiny()
    teacher = Teacher(encoder, buffers="copy")
    encoder(images())
    teacher.update(encoder)
    for own, other in zip(teacher.module.buffers(), encoder.buffers(), strict=True):
        assert torch.equal(own, other)


def test_teacher_of_wrapped_modules():
    encoder = tiny()
    teacher = Teacher(nn.DataParallel(encoder), momentum=0.0)
    with torch.no_grad():
        encoder.neck.weight.fill_(3)
    teacher.update(nn.DataParallel(encoder))
    assert_equal_states(teacher.module, encoder)
    other = Teacher(tiny(seed=1))
    other.load_state_dict(teacher.state_dict())
    assert_equal_states(other, teacher)
    assert_equal_states(copy.deepcopy(teacher), teacher)


def test_teacher_wrong_arguments():
    with pytest.raises(ValueError) as caught:
        Teacher(tiny(), momentum=1.5)
    assert str(caught.value) == "Teacher: momentum must lie in [0, 1], got 1.5"
    with pytest.raises(ValueError) as caught:
        Teacher(tiny(), buffers="none")
    assert str(caught.value) == 'Teacher: buffers must be "own" or "copy", got \'none\''


# --- checkpoints ----------------------------------------------------------------------------------------

STAGES = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
NECK = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def trained(seed=5, **options):
    """An encoder no value of which is an initial one."""
    encoder = tiny(seed, **options)
    torch.manual_seed(seed)
    for tensor in encoder.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return encoder


def flat(encoder, prefix=""):
    """As JVTC and torchvision call the tensors."""
    renamed = {}
    for name, tensor in encoder.state_dict().items():
        name = name.removeprefix("backbone.")
        name = name.replace("embedding.", "feat.").replace("neck.", "feat_bn.")
        renamed[prefix + name.replace("pool.", "gap.")] = tensor
    return renamed


def base(encoder, prefix="module."):
    """As ICE, SpCL and Cluster Contrast call them: their backbone is a Sequential."""
    renamed = {}
    for name, tensor in flat(encoder).items():
        first, rest = name.split(".", 1)
        place = f"base.{STAGES[first]}" if first in STAGES else first
        renamed[f"{prefix}{place}.{rest}"] = tensor
    return renamed


def scl(encoder, old=False):
    renamed = {}
    for name, tensor in flat(encoder).items():
        if name == "feat.weight" and old:
            tensor = tensor[:, :, None, None]
        if name.startswith("feat"):
            name = name.replace("feat.", "avg_pooling.embeding.")
            renamed[name.replace("feat_bn.", "avg_pooling.embeding_bn.")] = tensor
        else:
            renamed["CNN." + name] = tensor
    for stripe in range(2):
        at = f"local_pooling.local_conv_list.{stripe}"
        renamed[f"{at}.0.weight"] = torch.zeros(4, 16, 1, 1) if old else torch.zeros(4, 16)
        renamed[f"{at}.1.weight"] = torch.zeros(4)
    return renamed


def of_two_domains(state):
    """SpCL's domain adaptation: a source and a target norm in place of each."""
    norms = {name.removesuffix("running_mean") for name in state if name.endswith("running_mean")}
    renamed = {}
    for name, tensor in state.items():
        norm = next((norm for norm in norms if name.startswith(norm)), None)
        if norm is None:
            renamed[name] = tensor
        else:
            renamed[name.replace(norm, f"{norm}BN_S.")] = torch.zeros_like(tensor)
            renamed[name.replace(norm, f"{norm}BN_T.")] = tensor
    return renamed


def container(state, epoch=39):
    """As the four kin write it: the mAP is a numpy number."""
    return {"state_dict": state, "epoch": epoch, "best_mAP": np.float64(0.823)}


@pytest.mark.parametrize(
    "layout, options, write",
    [
        ("base", {}, lambda e: container(base(e))),
        ("base", {}, lambda e: container(base(e, prefix=""))),
        ("base", {"ibn": "a"}, lambda e: container(base(e))),
        ("base", {"pooling": "gem"}, lambda e: container(base(e))),
        ("base", {"embedding": 12}, lambda e: container(base(e))),
        ("base", {}, lambda e: container(of_two_domains(base(e)))),
        ("base", {"ibn": "a"}, lambda e: container(of_two_domains(base(e)))),
        ("flat", {"embedding": 12}, flat),
        ("flat", {"embedding": 12}, lambda e: {"id": flat(e)}),
        ("flat", {"ibn": "b", "embedding": 12}, lambda e: flat(e, prefix="module.")),
        ("scl", {"embedding": 16}, scl),
        ("scl", {"embedding": 16}, lambda e: scl(e, old=True)),
        ("pyreid", {"pooling": "gem", "embedding": 12}, lambda e: e.state_dict()),
        ("pyreid", {}, lambda e: nn.DataParallel(e).state_dict()),
        ("pyreid", {}, lambda e: Teacher(e).state_dict()),
        ("pyreid", {}, lambda e: container(nn.DataParallel(e).state_dict())),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_layouts(layout, options, write, zipped, tmp_path):
    written = trained(**options)
    content = write(written)
    inner = content.get("state_dict", content.get("id", content))
    unused = {"classifier.weight": torch.zeros(702, 16)} if layout in ("base", "flat") else {}
    inner.update(unused)
    path = tmp_path / "model_best.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    encoder = tiny(seed=9, **options)
    loaded = load_weights(encoder, path)
    assert_equal_states(encoder, written)
    assert loaded.layout == layout
    assert loaded.epoch == (39 if "epoch" in content else None)
    assert loaded.missing == ()
    assert set(loaded.matched) == set(encoder.state_dict())
    left_out = {n for n in inner if "BN_S" in n or "local_pooling" in n or "classifier" in n}
    assert {f"module.{n}" if n not in inner else n for n in loaded.unexpected} == left_out


def test_published_names_of_a_resnet50():
    """The names that the released files hold, against the encoder that is to read them."""
    names = set(base(Encoder(ResNet(SHAPES["resnet18"]), 512)))
    assert {f"module.feat_bn.{kind}" for kind in NECK} < names
    assert {
        *("module.base.0.weight", "module.base.1.running_var", "module.base.4.0.conv1.weight"),
        *("module.base.5.0.downsample.0.weight", "module.base.7.1.bn2.weight"),
    } < names


def test_a_classification_network_fills_the_backbone(tmp_path):
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    encoder = build_encoder("resnet18", weights=tmp_path / "resnet18.pth")
    assert torch.equal(encoder.backbone.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert encoder.neck.weight.eq(1).all()
    loaded = load_weights(encoder, tmp_path / "resnet18.pth")
    assert loaded.missing == tuple(f"neck.{kind}" for kind in NECK[:4])
    assert str(loaded) == (
        f"{tmp_path}/resnet18.pth (torchvision, IBN-Net, JVTC or GCL): 120 tensors; not in the file: "
        "neck.weight, neck.bias, neck.running_mean and 1 more; not used: fc.weight, fc.bias"
    )


def test_report_names_the_epoch(tmp_path):
    torch.save(container(base(trained()), epoch=7), tmp_path / "a.pth")
    loaded = load_weights(tiny(), tmp_path / "a.pth")
    count = len(loaded.matched)
    assert (
        str(loaded) == f"{tmp_path}/a.pth (ICE, SpCL or Cluster Contrast, epoch 7): {count} tensors"
    )


def test_scl_fills_the_backbone_alone_without_its_embedding(tmp_path):
    written = trained(embedding=16)
    torch.save(scl(written), tmp_path / "a.pth")
    encoder = tiny()
    loaded = load_weights(encoder, tmp_path / "a.pth")
    assert_equal_states(encoder.backbone, written.backbone)
    assert encoder.neck.weight.eq(1).all()
    assert "avg_pooling.embeding.weight" in loaded.unexpected
    assert {name.split(".")[0] for name in loaded.missing} == {"neck"}


@pytest.mark.parametrize(
    "file_has, encoder_has, complaint",
    [
        ({"embedding": 12}, {}, "embedding must be 12, as the file's neck was trained with, got 0"),
        ({}, {"embedding": 16}, "embedding must be 0, as the file's neck was trained with, got 16"),
        (
            {"pooling": "gem"},
            {},
            "pooling must be gem, as the file's neck was trained with, got average",
        ),
        (
            {},
            {"pooling": "gem"},
            "pooling must be average, as the file's neck was trained with, got gem",
        ),
    ],
)
def test_head_must_be_the_files(file_has, encoder_has, complaint, tmp_path):
    path = tmp_path / "a.pth"
    written, encoder = trained(**file_has), tiny(seed=9, **encoder_has)
    torch.save(base(written), path)
    before = copy.deepcopy(encoder)
    with pytest.raises(ValueError) as caught:
        load_weights(encoder, path)
    assert str(caught.value) == f"{path}: {complaint} (head=False loads the backbone alone)"
    assert_equal_states(encoder, before)
    load_weights(encoder, path, head=False)
    assert_equal_states(encoder.backbone, written.backbone)
    assert_equal_states(encoder.neck, before.neck)


def test_another_network_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    cases = [
        (tiny(), flat(tiny(ibn="b")), "must have backbone.bn1.running_mean"),
        (tiny(), flat(tiny(ibn="a")), "must have backbone.layer1.0.bn1.weight"),
        (tiny(), {**flat(tiny()), "layer4.1.conv1.weight": torch.zeros(1)}, "must not have"),
        (
            tiny(),
            {**flat(tiny()), "layer2.0.conv1.weight": torch.zeros(8, 4, 1, 1)},
            "backbone.layer2.0.conv1.weight must have shape (8, 4, 3, 3), got (8, 4, 1, 1)",
        ),
        (
            tiny(),
            {"cnns.0.0.conv.weight": torch.zeros(3)},
            "must hold the weights of a backbone like the encoder's, got cnns.0.0.conv.weight",
        ),
        (
            tiny(),
            {"weight": torch.zeros(3), "module.bias": torch.zeros(3)},
            "must hold the weights of a backbone like the encoder's, got weight, bias",
        ),
        (nn.Linear(2, 2), {"x": torch.zeros(3)}, "must hold weights of the module, got x"),
    ]
    for module, state, complaint in cases:
        torch.save(state, path)
        before = copy.deepcopy(module)
        with pytest.raises(ValueError) as caught:
            load_weights(module, path)
        assert str(caught.value).startswith(f"{path}: {complaint}")
        assert_equal_states(module, before)


def test_a_backbone_of_ones_own(tmp_path):
    written = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    torch.save({**written.state_dict(), "head.weight": torch.zeros(9, 6)}, tmp_path / "a.pth")
    encoder = build_encoder(nn.Sequential(nn.Conv2d(3, 6, 3)), weights=tmp_path / "a.pth")
    assert torch.equal(encoder.backbone[0].weight, written[0].weight)
    other = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3))
    with pytest.raises(ValueError) as caught:
        build_encoder(other, weights=tmp_path / "a.pth")
    assert str(caught.value) == (
        f"{tmp_path}/a.pth: must have backbone.1.weight, backbone.1.bias, to be of the encoder's kind of "
        "network"
    )


def test_files_of_old_torch_count_no_batches(tmp_path):
    state = {n: t for n, t in base(trained()).items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "a.pth")
    assert load_weights(tiny(), tmp_path / "a.pth").missing == ()


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(zipped, tmp_path, capfd):
    path = tmp_path / "a.pth"
    content = {**container(base(trained())), "extra": Payload()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError) as caught:
        load_weights(tiny(), path)
    message = f"{path}: must hold tensors and numbers only, got print; not loaded"
    assert str(caught.value).replace("__builtin__.", "").replace("builtins.", "") == message
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("numpy_module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("number", [np.float64(0.8), np.float32(0.8), np.int64(3)])
def test_numbers_of_either_numpy(numpy_module, number, tmp_path):
    """numpy 2 moved the module that a pickled number names; released files name the old one."""
    buffer = io.BytesIO()
    content = {"state_dict": base(trained()), "epoch": np.int64(3), "best_mAP": number}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    written = buffer.getvalue()
    present = b"numpy._core.multiarray" if b"numpy._core." in written else b"numpy.core.multiarray"
    (tmp_path / "a.pth").write_bytes(written.replace(present, numpy_module))
    assert load_weights(tiny(), tmp_path / "a.pth").epoch == 3


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError) as caught:
        load_weights(tiny(), path)
    assert str(caught.value) == f"{path}: no such file"
    if suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        return
    save_weights(tiny(), path)
    whole = path.read_bytes()
    for content in (b"", b"not weights", whole[: len(whole) // 2], pickle.dumps(7, protocol=2)):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            load_weights(tiny(), path)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_file_without_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(ValueError) as caught:
        load_weights(tiny(), tmp_path / "a.pth")
    assert str(caught.value) == f"{tmp_path}/a.pth: must hold a dictionary of tensors, got none"


HAVE_SAFETENSORS = importlib.util.find_spec("safetensors") is not None


@pytest.mark.parametrize("suffix", [".pth", *([".safetensors"] if HAVE_SAFETENSORS else [])])
@pytest.mark.parametrize("wrap", [nn.DataParallel, Teacher, torch.compile, lambda e: e])
def test_save_and_load(suffix, wrap, tmp_path):
    path = tmp_path / f"a{suffix}"
    written = trained(pooling="gem", embedding=12).to(memory_format=torch.channels_last)
    save_weights(wrap(written), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    encoder = wrap(tiny(seed=3, pooling="gem", embedding=12))
    loaded = load_weights(encoder, path)
    assert (loaded.layout, loaded.missing, loaded.unexpected) == ("pyreid", (), ())
    inner = getattr(encoder, "_orig_mod", getattr(encoder, "module", encoder))
    assert_equal_states(inner, written)
    linear = nn.Linear(3, 2)
    save_weights(linear, path)
    other = nn.Linear(3, 2)
    assert load_weights(other, path).layout == "own names"
    assert_equal_states(other, linear)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_weights(trained(), path)
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(tiny(), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pth"]


def test_safetensors_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError) as caught:
        load_weights(tiny(), path)
    assert (
        str(caught.value) == f"{path}: .safetensors files take safetensors: pip install safetensors"
    )


# --- weights from elsewhere -----------------------------------------------------------------------------


def test_imagenet_weights(monkeypatch):
    theirs, asked = torchvision.models.resnet18().state_dict(), []

    def fetch(url, **options):
        asked.append((url, options))
        return theirs

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    encoder = build_encoder("resnet18", weights="imagenet", norm_group=8)
    assert torch.equal(encoder.backbone.layer3[0].conv1.weight, theirs["layer3.0.conv1.weight"])
    assert asked[0][0] == torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    assert asked[0][1]["weights_only"] is True
    theirs = build_encoder("resnet18_ibn_a").backbone.state_dict()
    encoder = build_encoder("resnet18_ibn_a", weights="imagenet")
    name = "layer1.0.conv1.weight"
    assert torch.equal(encoder.backbone.state_dict()[name], theirs[name])
    assert asked[1][0].endswith("IBN-Net/releases/download/v1.0/resnet18_ibn_a-2f571257.pth")


def test_imagenet_weights_out_of_reach(monkeypatch):
    def fetch(url, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    with pytest.raises(OSError) as caught:
        build_encoder("resnet18", weights="imagenet")
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    assert str(caught.value) == (
        f"build_encoder: the weights could not be fetched ({url}: <urlopen error no route to host>); "
        "fetch the file elsewhere and give its path as weights"
    )


def fake_timm(monkeypatch):
    """What of timm an encoder needs: a convolutional model, and one made for a size."""
    timm, asked = types.ModuleType("timm"), []

    def create_model(name, **options):
        asked.append((name, options))
        if options["pretrained"]:
            raise OSError("offline")
        layers = [nn.Conv2d(3, 6, 8, 8)]
        if name == "fixed":
            height, width = options["img_size"]
            layers += [nn.Flatten(), nn.Linear(6 * height // 8 * width // 8, 10)]
        elif options.get("global_pool") != "":
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers)

    timm.create_model = create_model
    timm.is_model = lambda name: name in ("fixed", "conv")
    timm.list_models = lambda pattern: []
    timm.get_pretrained_cfg = lambda name: types.SimpleNamespace(fixed_input_size=name == "fixed")
    monkeypatch.setitem(sys.modules, "timm", timm)
    return asked


def test_timm(monkeypatch):
    asked = fake_timm(monkeypatch)
    assert build_encoder("timm:conv")(images()).shape == (4, 6)
    assert build_encoder("timm:conv", pooling="gem", embedding=3)(images()).shape == (4, 3)
    assert build_encoder("timm:fixed", size=(32, 16))(images()).shape == (4, 10)
    assert asked == [
        ("conv", {"pretrained": False, "num_classes": 0}),
        ("conv", {"pretrained": False, "num_classes": 0, "global_pool": ""}),
        ("fixed", {"pretrained": False, "num_classes": 0, "img_size": (32, 16)}),
    ]
    with pytest.raises(ValueError) as caught:
        build_encoder("timm:nothing")
    assert str(caught.value) == "build_encoder: timm must know the model, got 'nothing'"
    with pytest.raises(OSError) as caught:
        build_encoder("timm:conv", weights="imagenet")
    assert str(caught.value) == (
        "build_encoder: the weights could not be fetched (timm's model conv: offline); "
        "fetch the file elsewhere and give its path as weights"
    )


REAL_TIMM = [("test_vit", "average"), ("test_efficientnet", "gem")]


@pytest.mark.parametrize(
    "name, pooling", REAL_TIMM if importlib.util.find_spec("timm") else [("conv", "gem")]
)
def test_timm_itself(name, pooling, monkeypatch):
    if importlib.util.find_spec("timm") is None:
        fake_timm(monkeypatch)
    encoder = build_encoder(f"timm:{name}", pooling=pooling, size=(64, 32))
    assert encoder(images(4, 64, 32)).shape == (4, encoder.dim)


def test_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError) as caught:
        build_encoder("timm:resnet50")
    assert str(caught.value) == "build_encoder: timm:resnet50 takes timm: pip install timm"
