"""GCL's networks against plain transcriptions that read the released names; one pass against several."""

import copy
import pickle

import numpy as np
import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pyreid import evaluation, train
from pyreid.methods import METHODS
from pyreid.models import (
    Decoder,
    Discriminator,
    Encoder,
    Generator,
    PartEncoder,
    StructureEncoder,
    Teacher,
    build_encoder,
    build_part_encoder,
    ghost_,
    load_weights,
    save_weights,
    separate_statistics,
)
from pyreid.models.generator import PictureNorm, instance_norm, mirrored
from pyreid.models.resnet import ResNet, Shape

TINY = Shape((1, 1, 1, 1), bottleneck=False, widths=(4, 8, 8, 16))


def part_encoder(seed=0, **options):
    torch.manual_seed(seed)
    return PartEncoder(ResNet(TINY), 16, embedding=12, **options)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# --- the released files: names and shapes ---------------------------------------------------------------


def generator_shapes(width=16, appearance=8192):
    """What gen_*.pt holds."""
    shapes = {}

    def conv(name, inputs, outputs, size):
        shapes[f"{name}.conv.weight"] = (outputs, inputs, size, size)
        shapes[f"{name}.conv.bias"] = (outputs,)

    w = width
    stem = [(1, w, 3), (w, 2 * w, 3), (2 * w, 2 * w, 3), (2 * w, 4 * w, 3)]
    for place, sizes in enumerate(stem):
        conv(f"enc_content.model.{place}", *sizes)
    for block in range(4):
        for place in range(2):
            conv(f"enc_content.model.4.model.{block}.model.{place}", 4 * w, 4 * w, 3)
            name = f"dec.model.1.model.{block}.model.{place}"
            conv(name, 8 * w, 8 * w, 3)
            shapes[f"{name}.norm.running_mean"] = shapes[f"{name}.norm.running_var"] = (8 * w,)
    conv("enc_content.model.5.conv1", 4 * w, 2 * w, 1)
    for name in ("conv6", "conv12", "conv18"):
        conv(f"enc_content.model.5.{name}.0", 4 * w, 2 * w, 1)
        conv(f"enc_content.model.5.{name}.1", 2 * w, 2 * w, 3)
    conv("enc_content.model.5.fuse", 8 * w, 8 * w, 1)
    for place, inputs in ((3, 8 * w), (5, 4 * w)):
        conv(f"dec.model.{place}", inputs, inputs // 2, 5)
        for kind in ("gamma", "beta"):
            shapes[f"dec.model.{place}.norm.{kind}"] = (inputs // 2,)
    for place, outputs, size in ((6, 2 * w, 3), (7, 2 * w, 3), (8, 3, 1)):
        conv(f"dec.model.{place}", 2 * w, outputs, size)
    sizes = (appearance // 4, 32 * w, 32 * w, 16 * w)
    for name in [f"mlp_{letter}{n}" for letter in "wb" for n in range(1, 5)]:
        for layer in range(3):
            shapes[f"{name}.model.{layer}.fc.weight"] = (sizes[layer + 1], sizes[layer])
            shapes[f"{name}.model.{layer}.fc.bias"] = (sizes[layer + 1],)
    return shapes


def discriminator_shapes(width=32, scales=3):
    """What dis_*.pt holds."""
    shapes = {}
    w = width
    layers = [(3, w, 1), (w, w, 3), (w, w, 3), (w, w, 3), (w, 2 * w, 3)]
    for scale in range(scales):
        named = {f"{place}.conv": sizes for place, sizes in enumerate(layers)}
        for block in range(5, 9):
            for place in range(2):
                named[f"{block}.model.{place}.conv"] = (2 * w, 2 * w, 3)
        named["9"] = (2 * w, 1, 1)
        for name, (inputs, outputs, size) in named.items():
            shapes[f"cnns.{scale}.{name}.weight"] = (outputs, inputs, size, size)
            shapes[f"cnns.{scale}.{name}.bias"] = (outputs,)
    return shapes


def filled(shapes, seed=0):
    """Values of the size that networks have, no two tensors alike."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        fan_in = max(1, int(np.prod(shape[1:])))
        state[name] = torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5
    return state


def generator_of(state, tmp_path, width=2, appearance=16, slices="channel"):
    torch.save({"gen": state}, tmp_path / "gen_00000001.pt")
    generator = Generator(appearance, width, slices=slices).double()
    return generator, load_weights(generator, tmp_path / "gen_00000001.pt")


def discriminator_of(state, tmp_path, width=2, scales=3):
    torch.save({"dis": state}, tmp_path / "dis_00000001.pt")
    discriminator = Discriminator(width, scales).double()
    return discriminator, load_weights(discriminator, tmp_path / "dis_00000001.pt")


# --- the networks, written down plainly; `state` has the released names ---------------------------------


def reflected(maps, border):
    rows, columns = (
        torch.from_numpy(np.pad(np.arange(n), border, mode="reflect")) for n in maps.shape[2:]
    )
    return maps[:, :, rows][:, :, :, columns]


def convolved(state, name, maps, *, stride=1, dilation=1):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    border = (weight.shape[-1] // 2) * dilation
    return F.conv2d(reflected(maps, border), weight, bias, stride, dilation=dilation)


def standardised(maps):
    mean = maps.mean((2, 3), keepdim=True)
    return (maps - mean) / ((maps - mean).square().mean((2, 3), keepdim=True) + 1e-5).sqrt()


def leaky(maps):
    return torch.where(maps > 0, maps, 0.2 * maps)


def structure_of(state, mesh):
    maps = mesh
    for place, stride in enumerate((2, 1, 1, 2)):
        maps = convolved(state, f"enc_content.model.{place}.conv", maps, stride=stride)
        maps = leaky(standardised(maps))
    for block in range(4):
        name = f"enc_content.model.4.model.{block}.model"
        inner = leaky(standardised(convolved(state, f"{name}.0.conv", maps)))
        maps = maps + standardised(convolved(state, f"{name}.1.conv", inner))
    name = "enc_content.model.5"
    around = [standardised(convolved(state, f"{name}.conv1.conv", maps))]
    for branch, dilation in (("conv6", 3), ("conv12", 6), ("conv18", 9)):
        inner = leaky(standardised(convolved(state, f"{name}.{branch}.0.conv", maps)))
        around.append(
            standardised(convolved(state, f"{name}.{branch}.1.conv", inner, dilation=dilation))
        )
    return standardised(convolved(state, f"{name}.fuse.conv", torch.cat(around, 1)))


def perceptron(state, name, part):
    for layer in range(3):
        part = F.linear(
            part, state[f"{name}.model.{layer}.fc.weight"], state[f"{name}.model.{layer}.fc.bias"]
        )
        part = part if layer == 2 else leaky(part)
    return part[:, :, None, None]


def decoded(state, structure, appearance, slices="channel"):
    maps, channels, quarter = structure, structure.shape[1], appearance.shape[1] // 4
    for block in range(4):
        if slices == "channel":
            part = appearance[:, block * quarter : (block + 1) * quarter]
        else:
            part = appearance[:, block::4]
        weight = perceptron(state, f"mlp_w{block + 1}", part)
        bias = perceptron(state, f"mlp_b{block + 1}", part)
        name = f"dec.model.1.model.{block}.model"
        inner = standardised(convolved(state, f"{name}.0.conv", maps))
        inner = leaky(inner * weight[:, :channels] + bias[:, :channels])
        inner = standardised(convolved(state, f"{name}.1.conv", inner))
        maps = maps + inner * weight[:, channels:] + bias[:, channels:]
    for name in ("dec.model.3", "dec.model.5"):
        maps = maps.repeat_interleave(2, 2).repeat_interleave(2, 3)
        maps = convolved(state, f"{name}.conv", maps)
        flat = maps.flatten(1)
        mean, std = flat.mean(1), flat.var(1, correction=1).sqrt()
        maps = (maps - mean[:, None, None, None]) / (std[:, None, None, None] + 1e-5)
        gamma, beta = state[f"{name}.norm.gamma"], state[f"{name}.norm.beta"]
        maps = leaky(maps * gamma[:, None, None] + beta[:, None, None])
    for place in (6, 7):
        maps = leaky(convolved(state, f"dec.model.{place}.conv", maps))
    return convolved(state, "dec.model.8.conv", maps)


def told_apart(state, images, scales=3):
    outputs = []
    for scale in range(scales):
        maps, name = images, f"cnns.{scale}"
        for place, stride in enumerate((1, 1, 2, 1, 2)):
            maps = leaky(convolved(state, f"{name}.{place}.conv", maps, stride=stride))
        for block in range(5, 9):
            inner = leaky(convolved(state, f"{name}.{block}.model.0.conv", maps))
            maps = maps + convolved(state, f"{name}.{block}.model.1.conv", inner)
        outputs.append(convolved(state, f"{name}.9", maps))
        # Sums of what lies inside, over how much that is.
        sums = [
            F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2).sum((-1, -2))
            for x in (images, torch.ones_like(images))
        ]
        images = sums[0] / sums[1]
    return outputs


def assert_same_gradients(outputs, expected, ours, theirs):
    weights = [noise(*output.shape, seed=place) for place, output in enumerate(outputs)]
    sums = [
        sum((o * w).sum() for o, w in zip(os, weights, strict=True)) for os in (outputs, expected)
    ]
    for got, wanted in zip(
        torch.autograd.grad(sums[0], ours), torch.autograd.grad(sums[1], theirs), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [(8, 4), (16, 8), (20, 48), (64, 32)])
def test_structure_encoder(size, tmp_path):
    state = filled(generator_shapes(2, 16))
    structure = generator_of(state, tmp_path)[0].structure
    assert structure.channels == 16
    meshes = [noise(2, 1, *size).requires_grad_() for _ in range(2)]
    got, expected = structure(meshes[0]), structure_of(state, meshes[1])
    assert got.shape == (2, 16, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(got, expected)
    pairs = {
        "enc_content.model.4.model.2.model.1.conv.weight": structure.blocks[2].second.conv.weight,
        "enc_content.model.5.conv12.0.conv.weight": structure.around[2][0].conv.weight,
        "enc_content.model.5.fuse.conv.bias": structure.fuse.conv.bias,
    }
    ours, theirs = list(pairs.values()), [state[name].requires_grad_() for name in pairs]
    expected = structure_of(state, meshes[1])
    assert_same_gradients([got], [expected], [meshes[0], *ours], [meshes[1], *theirs])


@pytest.mark.parametrize("slices", ["channel", "stripe"])
@pytest.mark.parametrize("size", [(2, 1), (4, 2), (7, 5)])
def test_decoder(size, slices, tmp_path):
    state = filled(generator_shapes(2, 16))
    decoder = generator_of(state, tmp_path, slices=slices)[0].decoder
    inputs = [
        (noise(3, 16, *size).requires_grad_(), noise(3, 16, seed=1).requires_grad_())
        for _ in range(2)
    ]
    names = ["mlp_b3.model.0.fc.weight", "mlp_w4.model.2.fc.bias", "dec.model.3.norm.gamma"]
    theirs = [state[name].requires_grad_() for name in names]
    ours = [decoder.biases[2][0].weight, decoder.weights[3][4].bias, decoder.enlarge[0].norm.weight]
    got, expected = decoder(*inputs[0]), decoded(state, *inputs[1], slices)
    assert got.shape == (3, 3, 4 * size[0], 4 * size[1])
    torch.testing.assert_close(got, expected)
    assert_same_gradients([got], [expected], [*inputs[0], *ours], [*inputs[1], *theirs])


def test_the_slices_differ():
    """A stripe is one band of all channels, as the encoder lays them out; a channel slice all of some."""
    encoder = part_encoder().eval()
    maps = torch.zeros(1, 16, 8, 4)
    maps[:, :, 6:] = torch.arange(1.0, 17)[:, None, None]
    encoder.backbone = nn.Identity()
    appearance = encoder.appearance_and_embedding(maps)[0]
    changed = {}
    for slices in ("channel", "stripe"):
        decoder = Decoder(64, 1, slices=slices)
        seen = changed[slices] = []
        for perceptron_ in decoder.weights:
            perceptron_.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0][0])
            )
        decoder(torch.randn(1, 8, 2, 2), appearance)
    assert [part.any().item() for part in changed["stripe"]] == [False, False, False, True]
    assert torch.equal(changed["stripe"][3], torch.arange(1.0, 17))
    expected = torch.zeros(4, 4)
    expected[:, 3] = torch.arange(5.0, 9)
    assert torch.equal(changed["channel"][1], expected.flatten())


@pytest.mark.parametrize("size", [(4, 4), (9, 7), (32, 16), (64, 32)])
def test_discriminator(size, tmp_path):
    state = filled(discriminator_shapes(2))
    discriminator = discriminator_of(state, tmp_path)[0]
    images = [noise(2, 3, *size).requires_grad_() for _ in range(2)]
    names = ["cnns.0.0.conv.weight", "cnns.1.6.model.1.conv.bias", "cnns.2.9.weight"]
    theirs = [state[name].requires_grad_() for name in names]
    scales = discriminator.scales
    ours = [scales[0][0].conv.weight, scales[1][6].second.conv.bias, scales[2][9].weight]
    got, expected = discriminator(images[0]), told_apart(state, images[1])
    for output, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(output, wanted)
    assert_same_gradients(got, expected, [images[0], *ours], [images[1], *theirs])


def test_generator_is_its_two_halves():
    torch.manual_seed(0)
    generator = Generator(16, 2)
    mesh, appearance = torch.randn(2, 1, 32, 16), torch.rand(2, 16)
    structure = generator.structure(mesh)
    images = generator(mesh, appearance)
    assert torch.equal(generator.decoder(structure, appearance), images)
    torch.testing.assert_close(
        generator.decoder(
            structure.repeat(2, 1, 1, 1), torch.cat([appearance, appearance.flip(0)])
        ),
        torch.cat([images, generator.decoder(structure, appearance.flip(0))]),
    )


@pytest.mark.parametrize("size", [(256, 128), (64, 32)])
def test_shapes_of_the_released_sizes(size):
    with torch.no_grad():
        generator, discriminator = Generator(16, 1), Discriminator(1)
        images = generator(torch.zeros(1, 1, *size), torch.zeros(1, 16))
        assert images.shape == (1, 3, *size)
        places = [tuple(maps.shape) for maps in discriminator(images)]
    assert places == [(1, 1, size[0] // n, size[1] // n) for n in (4, 8, 16)]
    assert [tuple(maps.shape[2:]) for maps in Discriminator(1, 2)(torch.zeros(1, 3, 9, 6))] == [
        (3, 2),
        (2, 1),
    ]


def test_released_width():
    with torch.device("meta"):
        structure, decoder, discriminator = StructureEncoder(), Decoder(8192), Discriminator()
    counts = [
        sum(p.numel() for p in module.parameters())
        for module in (structure, decoder, discriminator)
    ]
    assert counts == [380_544, 13_000_131, 1_025_571]
    parameters = [s for n, s in generator_shapes().items() if "running" not in n]
    assert sum(int(np.prod(shape)) for shape in parameters) == counts[0] + counts[1]
    assert sum(int(np.prod(shape)) for shape in discriminator_shapes().values()) == counts[2]


# --- pieces ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    border=st.integers(0, 14),
)
def test_mirrored_is_numpys_reflection(height, width, border):
    maps = torch.arange(2 * height * width).view(1, 2, height, width).double().requires_grad_()
    got = mirrored(maps, border)
    edges = ((0, 0), (0, 0), (border, border), (border, border))
    assert np.array_equal(
        got.detach().numpy(), np.pad(maps.detach().numpy(), edges, mode="reflect")
    )
    got.sum().backward()
    assert maps.grad.sum() == got.numel()


def test_picture_norm_of_one_colour():
    """No variance: no image, and no gradient that is not a number."""
    norm = PictureNorm(3)
    maps = torch.full((2, 3, 4, 2), 7.0, requires_grad=True)
    output = norm(maps)
    assert not output.any()
    output.square().sum().backward()
    assert maps.grad.isfinite().all()


def test_initial_values():
    torch.manual_seed(0)
    generator, discriminator = Generator(1024, 8), Discriminator(8)
    for module, std in ((generator, None), (discriminator, 0.02)):
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                assert not layer.bias.any(), name
                fan_in = layer.weight[0].numel()
                expected = std or (2 / fan_in) ** 0.5
                spread = 5 / (2 * layer.weight.numel()) ** 0.5
                assert layer.weight.std().item() / expected == pytest.approx(1, abs=spread), name
    gamma = torch.cat([block.norm.weight for block in generator.decoder.enlarge])
    assert 0 <= gamma.min() < 0.1 < 0.9 < gamma.max() < 1
    assert not any(block.norm.bias.any() for block in generator.decoder.enlarge)


@pytest.mark.parametrize("make", [lambda: Generator(16, 1), lambda: Discriminator(1)])
def test_seed_gives_the_same_weights(make):
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(make())
    assert_equal_states(*built)


@pytest.mark.parametrize("make", [lambda: Generator(16, 1), lambda: Discriminator(1)])
def test_copies(make):
    module = make()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_equal_states(module, other)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: StructureEncoder(0), "StructureEncoder: width must be at least 1, got 0"),
        (lambda: Decoder(16, 0), "Decoder: width must be at least 1, got 0"),
        (lambda: Decoder(18), "Decoder: appearance_dim must be a multiple of 4, got 18"),
        (
            lambda: Decoder(16, 1, slices="part"),
            'Decoder: slices must be "channel" or "stripe", got \'part\'',
        ),
        (lambda: Discriminator(0), "Discriminator: width must be at least 1, got 0"),
        (lambda: Discriminator(1, 0), "Discriminator: scales must be at least 1, got 0"),
        (
            lambda: StructureEncoder(1)(torch.zeros(2, 1, 8, 6)),
            "StructureEncoder: mesh must have shape (B, 1, H, W) with H and W multiples of 4, "
            "got (2, 1, 8, 6)",
        ),
        (
            lambda: StructureEncoder(1)(torch.zeros(2, 3, 8, 8)),
            "StructureEncoder: mesh must have shape (B, 1, H, W) with H and W multiples of 4, "
            "got (2, 3, 8, 8)",
        ),
        (
            lambda: StructureEncoder(1)(torch.zeros(2, 1, 4, 4)),
            "StructureEncoder: mesh must be at least 8x4, for its norms, got (2, 1, 4, 4)",
        ),
        (
            lambda: Decoder(16, 1)(torch.zeros(2, 8, 4, 2), torch.zeros(2, 12)),
            "Decoder: appearance must have shape (2, 16), got (2, 12)",
        ),
        (lambda: part_encoder(bands=0), "PartEncoder: bands must be at least 1, got 0"),
        (
            lambda: build_part_encoder("small", parts=0),
            "build_part_encoder: parts must be at least 1, got 0",
        ),
        (
            lambda: build_encoder("small", stripes=2, parts=4),
            "build_encoder: stripes or parts must be 0, got stripes=2 and parts=4",
        ),
        (
            lambda: PartEncoder(nn.Flatten(), 6, embedding=2).appearance_and_embedding(
                torch.zeros(2, 3, 2, 1)
            ),
            "PartEncoder: the backbone must give maps, one mean is no part, got (2, 6)",
        ),
        (
            lambda: separate_statistics(part_encoder(), 0).__enter__(),
            "separate_statistics: passes must be at least 1, got 0",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


# --- how they run ---------------------------------------------------------------------------------------


def test_r1_penalty():
    """The gradient of a gradient, as the discriminator's penalty takes it, against differences."""
    torch.manual_seed(0)
    discriminator = Discriminator(2, 2).double()
    for parameter in discriminator.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = noise(2, 3, 8, 8).requires_grad_()

    def penalty(images):
        total = sum(maps.sum() for maps in discriminator(images))
        (gradient,) = torch.autograd.grad(total, images, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean()

    (weight, *_), direction = discriminator.parameters(), noise(2, 3, 1, 1, seed=4)
    penalty(images).backward()
    assert all(
        p.grad is not None for n, p in discriminator.named_parameters() if n.endswith("weight")
    )
    slope, step = (weight.grad * direction).sum(), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * step)
        values.append(penalty(images).detach())
        with torch.no_grad():
            weight.sub_(direction, alpha=sign * step)
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-8)


def test_gradient_of_a_gradient_through_the_generator():
    weight, bias = noise(1, 2, seed=1).requires_grad_(), noise(1, 2, seed=2).requires_grad_()
    maps = noise(1, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(instance_norm, (maps, weight, bias))
    assert torch.autograd.gradgradcheck(instance_norm, (maps, weight, bias))
    norm = PictureNorm(2).double()
    assert torch.autograd.gradcheck(norm, maps)
    assert torch.autograd.gradgradcheck(norm, maps)


def test_autocast():
    torch.manual_seed(0)
    generator, discriminator = Generator(16, 4), Discriminator(4)
    mesh, appearance = torch.randn(2, 1, 64, 32), torch.rand(2, 16)
    images = generator(mesh, appearance)
    scores = discriminator(images)
    with torch.autocast("cpu", torch.bfloat16):
        halved = generator(mesh, appearance)
        outputs = discriminator(halved)
    assert halved.dtype == torch.bfloat16
    error = (halved.float() - images).square().mean() / images.square().mean()
    assert error.sqrt() < 0.03
    for output, score in zip(outputs, scores, strict=True):
        assert (output.float() - score).abs().max() < 0.1 * score.abs().max() + 1e-3
    sum(output.float().square().mean() for output in outputs).backward()
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_norms_compute_in_float32():
    """Values whose squares, and whose sums, half precision could not tell apart."""
    maps = (300 + noise(2, 4, 32, 16, dtype=torch.float32)).bfloat16()
    weight, bias = torch.rand(2, 4), torch.rand(2, 4)
    for norm in (PictureNorm(4), lambda x: instance_norm(x, weight, bias), instance_norm):
        expected, got = norm(maps.float()), norm(maps).float()
        torch.testing.assert_close(got, expected, rtol=0.01, atol=1e-3)


def test_channels_last():
    torch.manual_seed(0)
    generator, discriminator = Generator(16, 2), Discriminator(2)
    mesh, appearance = torch.randn(2, 1, 32, 16), torch.rand(2, 16)
    images = generator(mesh, appearance)
    expected = discriminator(images)
    other, judge = (m.to(memory_format=torch.channels_last) for m in (generator, discriminator))
    got = other(mesh.to(memory_format=torch.channels_last), appearance)
    torch.testing.assert_close(got, images, rtol=1e-4, atol=1e-4)
    for output, wanted in zip(
        judge(got.to(memory_format=torch.channels_last)), expected, strict=True
    ):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


# --- the encoder of identities --------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 11), columns=st.integers(1, 3), bands=st.integers(1, 5))
def test_appearance_is_adaptive_pooling(rows, columns, bands):
    encoder = PartEncoder(nn.Identity(), 3, embedding=2, bands=bands).eval()
    maps = noise(2, 3, rows, columns, dtype=torch.float32)
    appearance, _ = encoder.appearance_and_embedding(maps)
    assert appearance.shape == (2, encoder.appearance_dim) == (2, 3 * bands)
    expected = F.adaptive_avg_pool2d(maps, (bands, 1)).flatten(1)
    torch.testing.assert_close(appearance, expected)


def test_embedding_is_an_encoders():
    encoder = part_encoder()
    plain = Encoder(ResNet(TINY), 16, embedding=12)
    plain.load_state_dict(encoder.state_dict())
    images = noise(6, 3, 64, 32, dtype=torch.float32)
    expected = plain(images)
    assert torch.equal(encoder(images), expected)
    appearance, embedding = encoder.appearance_and_embedding(images)
    assert torch.equal(embedding, expected)
    (appearance.square().sum() + embedding.square().sum()).backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert encoder.dim == 12
    assert encoder.appearance_dim == 64
    clips = images.view(2, 3, 3, 64, 32)
    encoder.eval()
    appearance, embedding = encoder.appearance_and_embedding(clips)
    torch.testing.assert_close(embedding, encoder(clips))
    each = encoder.appearance_and_embedding(images)[0]
    torch.testing.assert_close(appearance, each.view(2, 3, 64).mean(1))


def test_build_part_encoder():
    encoder = build_part_encoder("small", embedding=32, norm_group=2)
    assert (encoder.dim, encoder.appearance_dim, encoder.bands) == (32, 1024, 4)
    assert encoder(torch.zeros(4, 3, 64, 32)).shape == (4, 32)
    assert isinstance(build_encoder("small", parts=2), PartEncoder)
    with torch.device("meta"):
        encoder = build_part_encoder()
    assert (encoder.dim, encoder.appearance_dim) == (512, 8192)


def test_part_encoder_under_autocast():
    encoder = part_encoder()
    with torch.autocast("cpu", torch.bfloat16):
        appearance, embedding = encoder.appearance_and_embedding(torch.randn(4, 3, 64, 32))
    assert appearance.dtype == embedding.dtype == torch.float32


def test_part_encoder_where_encoders_work(tmp_path):
    torch.manual_seed(0)
    encoder, data = part_encoder(), runs.data()
    config = METHODS["cluster-contrast"].Config(instances=2, min_samples=2, eps=0.6, k1=6, k2=2)
    training = runs.training(epochs=1, steps=2)
    result = train.fit(config, encoder, data, training, output=tmp_path / "run")
    assert result.encoder is encoder
    assert result.evaluation.mAP > 0
    features = evaluation.extract(encoder, data.query, height=32, width=16)
    assert features.shape == (len(data.query), 12)
    other = part_encoder(seed=1)
    assert load_weights(other, tmp_path / "run/last.pt").missing == ()
    again = evaluation.extract(other, data.query, height=32, width=16)
    assert torch.equal(again, features)


# --- several passes in one ------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    passes=st.integers(1, 3),
    batch=st.integers(2, 7),
    group=st.sampled_from([None, 2, 3]),
    momentum=st.sampled_from([0.1, 0.9, None]),
    running=st.booleans(),
)
def test_a_batched_pass_is_several(passes, batch, group, momentum, running):
    torch.manual_seed(batch)
    norm = nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    if group is not None:
        ghost_(norm, group)
    norm(torch.randn(batch, 3, dtype=torch.float64))
    several = copy.deepcopy(norm)
    before = copy.deepcopy(norm)
    for step in range(2):
        x = noise(passes * batch, 3, seed=step)
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        with separate_statistics(norm, passes, running=running):
            got = norm(x1)
        expected = torch.cat([several(part) for part in x2.split(batch)])
        assert torch.equal(got, expected)
        for output in (got, expected):
            output.pow(3).sum().backward()
        assert torch.equal(x1.grad, x2.grad)
    torch.testing.assert_close(norm.weight.grad, several.weight.grad)
    assert_equal_states(norm, several if running else before)
    assert type(norm) is type(several)
    assert vars(norm).keys() == vars(several).keys()


@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("running", [True, False])
def test_gcls_passes_in_one(group, running):
    """(x), (x_rec | x_nv): outputs, gradients and statistics of the whole encoder."""
    encoder = part_encoder().double()
    if group:
        ghost_(encoder, group)
    separate = copy.deepcopy(encoder)
    photos, generated = noise(4, 3, 32, 16), noise(8, 3, 32, 16, seed=1)
    got = encoder.appearance_and_embedding(photos)
    with separate_statistics(encoder, 2, running=running):
        parts = [got, encoder.appearance_and_embedding(generated)]
    got = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    parts = [separate.appearance_and_embedding(photos)]
    kept = copy.deepcopy(separate)
    parts += [separate.appearance_and_embedding(part) for part in generated.split(4)]
    expected = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    for output, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(output, wanted)
    weights = [noise(*output.shape, seed=2) for output in got]
    for outputs in (got, expected):
        sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    for ours, theirs in zip(encoder.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    for (name, ours), theirs in zip(
        encoder.named_buffers(), (separate if running else kept).buffers(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)
    # All statistics together are something else.
    together = copy.deepcopy(kept).appearance_and_embedding(generated)[1]
    assert group or (together - got[1][4:]).abs().max() > 1e-3


def test_separate_statistics_leaves_nothing():
    encoder = part_encoder()
    encoder.backbone.bn1.eval()
    before = {name: dict(vars(m)) for name, m in encoder.named_modules()}
    kinds = {name: type(m) for name, m in encoder.named_modules()}
    with separate_statistics(encoder, 2):
        assert type(encoder.backbone.bn1) is nn.BatchNorm2d
        assert type(encoder.neck) is not nn.BatchNorm1d
        assert isinstance(encoder.neck, nn.BatchNorm1d)
    with pytest.raises(ValueError) as caught, separate_statistics(encoder, 2):
        encoder(torch.zeros(3, 3, 32, 16))
    message = "separate_statistics: a batch must be a multiple of 2 passes, got 3"
    assert str(caught.value) == message
    for name, module in encoder.named_modules():
        assert vars(module) == before[name]
        assert type(module) is kinds[name]
    pickle.dumps(encoder)


def test_contexts_in_contexts():
    norm = nn.BatchNorm1d(2)
    x = noise(4, 2, dtype=torch.float32)
    pairs = torch.cat([nn.BatchNorm1d(2)(part) for part in x.split(2)])
    with separate_statistics(norm, running=False):
        with separate_statistics(norm, 2):
            assert torch.equal(norm(x), pairs)
        assert torch.equal(norm(x), nn.BatchNorm1d(2)(x))
    with separate_statistics(norm, 2, running=False):
        with separate_statistics(norm, 1):
            assert torch.equal(norm(x), nn.BatchNorm1d(2)(x))
        assert torch.equal(norm(x), pairs)
    assert not norm.running_mean.any()
    assert type(norm) is nn.BatchNorm1d


def test_separate_statistics_compiled():
    norm = nn.BatchNorm1d(3)
    eager = copy.deepcopy(norm)
    compiled = torch.compile(norm, backend="aot_eager")
    x = noise(4, 3, dtype=torch.float32)
    torch.testing.assert_close(compiled(x), eager(x))
    with separate_statistics(compiled, 2), separate_statistics(eager, 2):
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(norm.running_var, eager.running_var)
    assert norm.num_batches_tracked == 4


# --- checkpoints ----------------------------------------------------------------------------------------


def test_released_generator(tmp_path):
    """Every published name has its place, and goes back there."""
    state = filled(generator_shapes(2, 16))
    generator, loaded = generator_of(state, tmp_path)
    assert (loaded.layout, loaded.missing, loaded.unexpected) == ("gen", (), ())
    assert (
        str(loaded)
        == f"{tmp_path}/gen_00000001.pt (GCL's generator): {len(loaded.matched)} tensors"
    )
    assert set(loaded.matched) == set(generator.state_dict())
    save_weights(nn.DataParallel(generator), tmp_path / "a.pt", layout="gcl")
    written = torch.load(tmp_path / "a.pt", weights_only=True)
    assert written.keys() == {"gen"}
    assert written["gen"].keys() == state.keys()
    for name, tensor in written["gen"].items():
        if "running" in name:
            assert torch.equal(tensor, torch.full_like(tensor, name.endswith("var")))
        else:
            assert torch.equal(tensor, state[name]), name


def test_released_discriminator(tmp_path):
    state = filled(discriminator_shapes(2))
    discriminator, loaded = discriminator_of(state, tmp_path)
    assert (loaded.layout, loaded.missing, loaded.unexpected) == ("dis", (), ())
    save_weights(discriminator, tmp_path / "a.pt", layout="gcl")
    written = torch.load(tmp_path / "a.pt", weights_only=True)["dis"]
    assert written.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "b.pt")
    other = Discriminator(2).double()
    load_weights(other, tmp_path / "b.pt")
    assert_equal_states(other, discriminator)


@pytest.mark.parametrize("layout", ["gcl", "jvtc"])
def test_released_identities(layout, tmp_path):
    encoder = part_encoder()
    save_weights(Teacher(encoder), tmp_path / "id_00000001.pt", layout=layout)
    written = torch.load(tmp_path / "id_00000001.pt", weights_only=True)
    if layout == "gcl":
        assert written.keys() == {"id"}
        written = written["id"]
    assert {"conv1.weight", "bn1.running_var", "layer4.0.downsample.1.bias", "feat.weight"} < set(
        written
    )
    assert {"feat.bias", "feat_bn.weight", "feat_bn.bias", "feat_bn.running_mean"} < set(written)
    assert not any("backbone" in name or "neck" in name for name in written)
    other = part_encoder(seed=1)
    # JVTC's own have a classifier.
    written = {
        **written,
        "classifier.weight": torch.zeros(702, 12),
        "classifier.bias": torch.zeros(702),
    }
    torch.save(written, tmp_path / "resnet50_market075_epoch00045.pth")
    for path in tmp_path.iterdir():
        loaded = load_weights(other, path)
        assert loaded.layout == "flat"
        assert loaded.missing == ()
        assert_equal_states(other, encoder)


def test_own_layout(tmp_path):
    for make in (lambda: Generator(16, 1), lambda: Discriminator(1), part_encoder):
        torch.manual_seed(0)
        written = make()
        save_weights(written, tmp_path / "a.pt")
        torch.manual_seed(1)
        other = make()
        loaded = load_weights(other, tmp_path / "a.pt")
        assert (loaded.missing, loaded.unexpected) == ((), ())
        assert_equal_states(other, written)


def test_files_that_do_not_fit(tmp_path):
    gen, dis = filled(generator_shapes(2, 16)), filled(discriminator_shapes(2))
    path = tmp_path / "a.pt"
    cases = [
        (Generator(16, 2), dis, "must hold weights of the module, got cnns.0.0.conv.weight"),
        (
            Discriminator(2),
            gen,
            "must hold weights of the module, got enc_content.model.0.conv.weight",
        ),
        (
            Generator(16, 1),
            gen,
            "structure.stem.0.conv.weight must have shape (1, 1, 3, 3), got (2, 1, 3, 3)",
        ),
        (Discriminator(2, 2), dis, "must not have cnns.2.0.conv.weight"),
        (Discriminator(2, 4), dis, "must have scales.3.0.conv.weight"),
        (
            Generator(16, 2),
            {name: gen[name] for name in gen if name != "dec.model.3.norm.beta"},
            "must have decoder.enlarge.0.norm.bias, to be of the generator's kind of network",
        ),
        (part_encoder(), gen, "must hold the weights of a backbone like the encoder's"),
    ]
    for module, state, complaint in cases:
        torch.save(state, path)
        before = copy.deepcopy(module)
        with pytest.raises(ValueError) as caught:
            load_weights(module, path)
        assert str(caught.value).startswith(f"{path}: {complaint}")
        assert_equal_states(module, before)


@pytest.mark.parametrize(
    "module, name, layout, message",
    [
        (nn.Linear(2, 2), "a.pt", "gcl", "gcl has no layout of a Linear"),
        (Discriminator(1), "a.pt", "jvtc", "jvtc has no layout of a Discriminator"),
        (Discriminator(1), "a.pt", "ice", 'layout must be "pyreid", "gcl" or "jvtc", got \'ice\''),
        (
            part_encoder(pooling="gem"),
            "a.pt",
            "gcl",
            "gcl has no place for pool.p",
        ),
        (
            Discriminator(1),
            "a.safetensors",
            "gcl",
            "gcl reads what torch.save writes, not .safetensors",
        ),
    ],
)
def test_layouts_that_cannot_be_written(module, name, layout, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        save_weights(module, tmp_path / name, layout=layout)
    assert str(caught.value) == f"{tmp_path / name}: {message}"
    assert not list(tmp_path.iterdir())
