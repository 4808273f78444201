"""Extraction, retrieval and clusters: against cases worked by hand, and against scikit-learn."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

from pyreid import distributed, evaluation, ops
from pyreid.data import ImageArrays, ReidData
from pyreid.data.transforms import make

HEIGHT, WIDTH = 16, 8


def images(count, *, ids=None, cameras=None, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 20, 10, 3), np.uint8)
    return ImageArrays(pixels, [f"{seed}/{row}.png" for row in range(count)], ids, cameras)


class Encoder(nn.Module):
    """Tells left from right, and has a part whose mode shows in its output."""

    def __init__(self, dim=12):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(3)
        self.project = nn.Linear(3 * HEIGHT * WIDTH, dim)

    def forward(self, batch):
        return self.project(self.norm(batch).flatten(1))


def extract(encoder, of, **options):
    return evaluation.extract(encoder, of, height=HEIGHT, width=WIDTH, **options)


def by_hand(encoder, of, flip=False):
    transform = make("plain", HEIGHT, WIDTH)
    encoder.eval()
    rows = []
    with torch.no_grad():
        for image, _, _ in of:
            one = transform(image)[None]
            feature = encoder(one)
            if flip:
                feature = feature + encoder(one.flip(-1))
            rows.append(normalize(feature))
    encoder.train()
    return torch.cat(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("flip", [False, True])
def test_extract_one_by_one(batch_size, flip):
    encoder, some = Encoder(), images(7)
    features = extract(encoder, some, batch_size=batch_size, flip=flip)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, by_hand(encoder, some, flip), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(7))


def test_flip_does_not_tell_left_from_right():
    some = images(4)
    mirrored = ImageArrays(np.ascontiguousarray(some.pixels[:, :, ::-1]))
    both = extract(Encoder(), some, flip=True), extract(Encoder(), mirrored, flip=True)
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    assert (extract(Encoder(), some) - extract(Encoder(), mirrored)).abs().max() > 0.01


def test_extract_follows_select():
    encoder, some = Encoder(), images(6)
    rows = np.array([5, 0, 3])
    chosen = extract(encoder, some.select(rows))
    torch.testing.assert_close(chosen, extract(encoder, some)[rows], rtol=1e-5, atol=1e-6)


def test_modes_are_put_back():
    encoder = Encoder()
    encoder.norm.eval()
    extract(encoder, images(2))
    assert [module.training for module in encoder.modules()] == [True, False, True]
    encoder.project = nn.Linear(5, 5)
    with pytest.raises(RuntimeError):
        extract(encoder, images(2))
    assert [module.training for module in encoder.modules()] == [True, False, True]


def test_half_precision():
    encoder, some = Encoder(), images(5)
    exact, half = extract(encoder, some), extract(encoder, some, precision="bfloat16")
    assert half.dtype == torch.float32
    assert 0 < (exact - half).abs().max() < 0.02


@pytest.mark.parametrize("processes, count", [(2, 7), (3, 7), (4, 2)])
def test_processes_share_the_images(monkeypatch, processes, count):
    """Each process encodes its share, some have none; the rows are gathered in order."""
    encoder, some = Encoder(), images(count)
    whole, sent = extract(encoder, some), []
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(distributed, "gather_rows", lambda rows: sent.append(rows) or whole)
    for part in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda part=part: part)
        assert extract(encoder, some, batch_size=2) is whole
    assert [rows.shape[1] for rows in sent] == [12] * processes
    assert max(map(len, sent)) == -(-count // processes)
    torch.testing.assert_close(torch.cat(sent), whole, rtol=1e-5, atol=1e-6)


class Returns(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, batch):
        return self.result(batch)


@pytest.mark.parametrize(
    "result, message",
    [
        (lambda x: x, "encoder must map (2, 3, 16, 8) to (2, D), got (2, 3, 16, 8)"),
        (lambda x: x[:1].flatten(1), "encoder must map (2, 3, 16, 8) to (2, D), got (1, 384)"),
        (lambda x: (x, x), "encoder must return a tensor (B, D), got tuple"),
    ],
)
def test_encoders_that_are_none(result, message):
    with pytest.raises(ValueError) as raised:
        extract(Returns(result), images(2))
    assert str(raised.value) == f"extract: {message}"


def test_features_that_are_not_finite():
    def encoder(batch):
        features = batch.flatten(1).clone()
        features[:, 3] = torch.where(batch.mean((1, 2, 3)) > worst, torch.inf, 1.0)
        return features

    some = images(6)
    means = torch.stack([make("plain", HEIGHT, WIDTH)(image).mean() for image, _, _ in some])
    worst = means.sort().values[-2]
    row = int(means.argmax())
    with pytest.raises(ValueError) as raised:
        extract(Returns(encoder), some, batch_size=2)
    message = (
        f"features must be finite, got NaN or infinity for 0/{row}.png (row {row}, 1 rows in all)"
    )
    assert str(raised.value) == f"extract: {message}"


def test_extract_refuses():
    with pytest.raises(ValueError) as raised:
        extract(Encoder(), images(2), precision="half")
    message = "extract: precision must be one of float32, bfloat16, float16, got 'half'"
    assert str(raised.value) == message
    with pytest.raises(ValueError) as raised:
        extract(Encoder(), images(2).select(slice(0)))
    assert str(raised.value) == "extract: images must hold at least one image, got none"


def at(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def worked_case():
    """Queries at 0, 90 and 45 degrees. What they see of the gallery, nearest first, once their own id and
    camera and junk are left out:

    | query | | AP | INP |
    |---|---|---|---|
    | id 0, camera 0 | 10 no, 20 yes, 30 no, 40 yes, 85 no, 89 no | (1/2 + 2/4) / 2 | 2/4 |
    | id 1, camera 1 | 85 yes, 40 no, 30 no, 20 no, 10 yes, 1 no | (1 + 2/5) / 2 | 2/5 |
    | id 2, camera 2 | no match: the one there was is of camera 2 | - | - |
    """
    query = images(3, ids=np.array([0, 1, 2]), cameras=np.array([0, 1, 2]))
    gallery = images(
        8,
        ids=np.array([1, 0, 2, 0, 1, 0, -1, 1]),
        cameras=np.array([2, 1, 2, 2, 2, 0, 1, 1]),
        seed=1,
    )
    return at(0, 90, 45), at(10, 20, 30, 40, 85, 1, 2, 89), query, gallery


def test_worked_case():
    found = evaluation.evaluate(*worked_case())
    first, second = (1 / 2 + 2 / 4) / 2, (1 + 2 / 5) / 2
    np.testing.assert_allclose(found.ranking.ap, [first, second, 0], rtol=1e-6)
    assert found.ranking.valid.tolist() == [True, True, False]
    assert found.mAP == pytest.approx((first + second) / 2)
    assert found.ranking.mINP == pytest.approx((2 / 4 + 2 / 5) / 2)
    assert found.ranking.cmc[:3].tolist() == [0.5, 1, 1]
    assert found.rank1 == 0.5
    assert found.reranked is None


def test_camera_pairs_of_the_worked_case():
    pairs = evaluation.evaluate(*worked_case()).camera_pairs
    assert pairs.cameras.tolist() == [0, 1, 2]
    nan = math.nan
    # Camera 0's query sees 20 (yes), 89 of camera 1; 10, 30, 40 (yes), 85 of camera 2.
    # Camera 1's query sees 1 of camera 0; 85 (yes), 40, 30, 10 (yes) of camera 2.
    expected = [[nan, 1, 1 / 3], [nan, nan, (1 + 2 / 4) / 2], [nan, nan, nan]]
    np.testing.assert_allclose(pairs.mAP, expected, rtol=1e-6)
    np.testing.assert_allclose(pairs.rank1, [[nan, 1, 0], [nan, nan, 1], [nan, nan, nan]])
    assert pairs.valid.tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_plain_values_and_summary():
    found = evaluation.evaluate(*worked_case(), max_rank=6)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["mAP"] == found.mAP
    assert (values["rank1"], values["rank5"], values["rank10"]) == (0.5, 1, None)
    assert values["cmc"] == [0.5, 1, 1, 1, 1, 1]
    assert (values["queries"], values["valid"]) == (3, 2)
    assert values["camera_pairs"]["mAP"][1] == [None, None, 0.75]
    assert values["reranked"] is None
    assert found.summary().splitlines() == [
        "   mAP  rank-1  rank-5  rank-10  mINP  queries",
        "  60.0    50.0   100.0        -  45.0   2 of 3",
    ]
    both = evaluation.summary({"before": found, "after": values}).splitlines()
    assert both[1].split() == ["before", *found.summary().splitlines()[1].split()]
    assert both[2].split()[1:] == both[1].split()[1:]


def test_own_camera_may_count():
    query_features, gallery_features, query, gallery = worked_case()
    alone = ImageArrays(query.pixels, query.names, query.ids, np.zeros(3, np.int64))
    cameraless = ImageArrays(gallery.pixels, gallery.names, gallery.ids, np.zeros(8, np.int64))
    case = query_features, gallery_features, alone, cameraless
    none = evaluation.evaluate(*case)
    assert math.isnan(none.mAP)
    assert not none.ranking.valid.any()
    assert none.summary().splitlines()[-1].startswith("no query has a match")
    json.dumps(none.to_dict(), allow_nan=False)
    found = evaluation.evaluate(*case, same_camera=True)
    assert found.ranking.valid.all()
    # Matches of the first at 1, 20, 40 degrees; of the second at 89, 85, 10; of the third at 30, after 40.
    expected = [(1 + 2 / 3 + 3 / 5) / 3, (1 + 1 + 3 / 6) / 3, 1 / 2]
    np.testing.assert_allclose(found.ranking.ap, expected, rtol=1e-6)
    np.testing.assert_allclose(found.camera_pairs.mAP, [[found.mAP]])


def test_reranked():
    ids, cameras = np.arange(40) % 8, np.arange(40) // 8 % 3
    of = images(40, ids=ids, cameras=cameras)
    generator = torch.Generator().manual_seed(0)
    centres, noise = (torch.randn(n, 16, generator=generator) for n in (8, 40))
    features = normalize(centres[ids] + 0.8 * noise)
    query, gallery = of.select(slice(0, 16)), of.select(slice(16, 40))
    options = {"k1": 6, "k2": 2, "lambda_value": 0.2}
    found = evaluation.evaluate(
        features[:16], features[16:], query, gallery, rerank=True, **options
    )
    columns = [torch.from_numpy(x) for x in (query.ids, gallery.ids)]
    seen = [torch.from_numpy(x) for x in (query.cameras, gallery.cameras)]
    expected = ops.evaluate_ranking(
        None,
        None,
        query_ids=columns[0],
        gallery_ids=columns[1],
        query_cameras=seen[0],
        gallery_cameras=seen[1],
        distance=ops.rerank(features[:16], features[16:], 6, 2, 0.2),
    )
    assert torch.equal(found.reranked.ap, expected.ap)
    assert found.reranked.mAP != found.mAP
    assert found.to_dict()["reranked"]["mAP"] == expected.mAP
    assert found.summary().splitlines()[2].startswith("re-ranked")


def test_features_must_be_those_of_the_images():
    query_features, gallery_features, query, gallery = worked_case()
    with pytest.raises(ValueError) as raised:
        evaluation.evaluate(query_features, gallery_features[:5], query, gallery)
    message = "evaluate: gallery_features must have shape (8, D), got (5, 2)"
    assert str(raised.value) == message


def test_evaluate_data():
    _, _, query, gallery = worked_case()
    encoder = Encoder()
    data = ReidData("made up", images(3, seed=2), query, gallery)
    size = {"height": HEIGHT, "width": WIDTH}
    found = evaluation.evaluate_data(encoder, data, same_camera=True, flip=True, **size)
    features = [extract(encoder, some, flip=True) for some in (query, gallery)]
    expected = evaluation.evaluate(*features, query, gallery, same_camera=True)
    assert found.to_dict() == expected.to_dict()
    every = evaluation.extract_data(encoder, data, flip=True, **size)
    assert list(every) == ["train", "query", "gallery"]
    assert torch.equal(every["gallery"], features[1])
    with pytest.raises(ValueError) as raised:
        evaluation.evaluate_data(encoder, ReidData("x", query), **size)
    assert str(raised.value) == "evaluate_data: data must have query and gallery images, got x"


def test_cluster_quality_by_hand():
    labels, ids = [0, 0, 0, 1, 1, -1, -1, 2], [5, 5, 6, 6, 6, 5, -1, -1]
    quality = evaluation.cluster_quality(np.array(labels), torch.tensor(ids))
    assert {key: quality[key] for key in ("images", "clusters", "outliers", "largest")} == {
        "images": 8,
        "clusters": 3,
        "outliers": 2,
        "largest": 3,
    }
    assert (
        quality["pair_precision"] == 2 / 4
    )  # 5-5 and 6-6, of three pairs in cluster 0 and one in 1
    assert quality["pair_recall"] == 2 / 6  # of three pairs of id 5 and three of id 6
    assert quality["purity"] == 4 / 5


def test_cluster_quality_without_ids():
    quality = evaluation.cluster_quality(np.array([0, 0, 3, -1]), np.full(4, -1))
    assert quality == {"images": 4, "clusters": 2, "outliers": 1, "largest": 2}
    quality = evaluation.cluster_quality(np.full(3, -1), np.array([1, 1, 2]))
    assert quality["pair_precision"] is None
    assert quality["pair_recall"] == 0
    assert quality["nmi"] is None
    with pytest.raises(ValueError):
        evaluation.cluster_quality(np.zeros(3), np.zeros(4))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 3)), min_size=1, max_size=40))
def test_cluster_quality_against_scikit_learn(samples):
    from sklearn import metrics

    labels, ids = np.array(samples).T
    quality = evaluation.cluster_quality(labels, ids)
    known = ids >= 0
    if not known.any():
        assert "nmi" not in quality
        return
    # An outlier is a cluster of its own.
    alone = np.where(labels < 0, 100 + np.arange(len(labels)), labels)
    (_, wrong), (split, right) = metrics.cluster.pair_confusion_matrix(ids[known], alone[known])
    assert quality["pair_precision"] == (right / (right + wrong) if right + wrong else None)
    assert quality["pair_recall"] == (right / (right + split) if right + split else None)
    inside = known & (labels >= 0)
    if not inside.any():
        assert quality["purity"] is None
        return
    table = metrics.cluster.contingency_matrix(ids[inside], labels[inside])
    assert quality["purity"] == pytest.approx(table.max(axis=0).sum() / inside.sum())
    truth = ids[inside], labels[inside]
    assert quality["ari"] == pytest.approx(metrics.adjusted_rand_score(*truth))
    assert quality["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(*truth))
