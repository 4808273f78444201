"""Pictures and the report: what is where, in which colour, the same every time."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from pyreid import evaluation, pictures, report
from pyreid.data import ImageArrays, ReidData

ASKED, RIGHT, WRONG, MAIN = (
    tuple(bytes.fromhex(colour[1:]))
    for colour in (pictures.ASKED, pictures.RIGHT, pictures.WRONG, pictures.LINES[0])
)


def flat(values, ids, cameras):
    """Images of one grey each, so that a crop can be told in a sheet."""
    pixels = np.empty((len(values), 16, 8, 3), np.uint8)
    pixels[:] = np.array(values, np.uint8)[:, None, None, None]
    return ImageArrays(pixels, None, np.array(ids), np.array(cameras))


def at(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def retrieval():
    """Query 0: another, itself, itself by camera 1; what is nearest to it is of its own camera. Query 1: a
    match first. Query 2: no match."""
    query = flat([10, 20, 30], [0, 1, 2], [0, 0, 0])
    gallery = flat([101, 102, 103, 104, 105, 106], [0, 1, 0, 1, -1, 0], [0, 1, 1, 2, 1, 2])
    return query, gallery, at(0, 90, 45), at(1, 10, 20, 80, 3, 30)


def frames(sheet, y):
    """The colours of frames and crops that a line of pixels crosses, white between them left out."""
    line = [sheet.getpixel((x, y)) for x in range(sheet.width)]
    runs = [line[x] for x in range(1, len(line)) if line[x] != line[x - 1]]
    return [colour for colour in runs if colour != (255, 255, 255)]


def line_tops(sheet, colour, x):
    """Where frames of a colour begin, going down at x."""
    column = [sheet.getpixel((x, y)) == colour for y in range(sheet.height)]
    return [y for y in range(1, len(column)) if column[y] and not column[y - 1]]


def test_ranked_list():
    sheet = pictures.ranked_list(*retrieval(), rows=[0, 1], top=4)
    x = pictures._MARGIN + 1  # within the frames of the queries
    first, second = line_tops(sheet, ASKED, x)
    assert frames(sheet, first + 133) == [ASKED, WRONG, RIGHT, RIGHT, WRONG]
    assert frames(sheet, second + 133) == [ASKED, RIGHT, WRONG, WRONG, RIGHT]
    greys = [colour[0] for colour in frames(sheet, first + 70) if len(set(colour)) == 1]
    assert greys == [10, 102, 103, 106, 104]  # 101 is of the query's camera, 105 is junk
    greys = [colour[0] for colour in frames(sheet, second + 70) if len(set(colour)) == 1]
    assert greys == [20, 104, 106, 103, 102]


def test_ranked_list_has_marks_beside_colours():
    sheet = pictures.ranked_list(*retrieval(), rows=[0], top=2)
    (y,) = line_tops(sheet, ASKED, pictures._MARGIN + 1)
    line = [sheet.getpixel((x, y)) for x in range(sheet.width)]
    for colour, symmetric in ((WRONG, True), (RIGHT, False)):
        end = len(line) - line[::-1].index(colour)  # of the frame: the badge is in its corner
        badge = np.array(sheet.crop((end - 18, y, end, y + 18))).astype(int)
        white = (badge > 200).all(axis=2)
        assert 20 < white.sum() < 150
        assert (
            white == white[:, ::-1]
        ).all() == symmetric  # a cross is its mirror image, a tick is not


def test_which_queries():
    query, gallery, query_features, gallery_features = retrieval()
    case = (query, gallery, query_features, gallery_features)

    def shown(**options):
        sheet = pictures.ranked_list(*case, **options)
        tops = line_tops(sheet, ASKED, pictures._MARGIN + 1)
        return [frames(sheet, y + 70)[1][0] for y in tops]

    assert shown(rows="worst") == [10, 20]  # (1/2 + 2/3) / 2 and (1 + 2/4) / 2; 30 has no match
    assert shown(rows="best", count=1) == [20]
    assert shown(rows="random", count=5) == [10, 20]
    assert {shown(rows="random", count=1, seed=seed)[0] for seed in range(8)} == {10, 20}
    with pytest.raises(ValueError, match="rows must be random, best, worst or rows, got 'some'"):
        shown(rows="some")
    with pytest.raises(pictures.NothingToShow):
        pictures.ranked_list(query.select([2]), gallery, query_features[2:], gallery_features)


def test_ranked_list_by_a_given_distance():
    *case, query_features, gallery_features = retrieval()
    turned = query_features @ gallery_features.T
    before = turned.clone()
    sheet = pictures.ranked_list(
        *case, query_features, gallery_features, rows=[1], top=9, distance=turned
    )
    assert torch.equal(turned, before)
    (y,) = line_tops(sheet, ASKED, pictures._MARGIN + 1)
    # 101 is at 1 degree, the farthest, so first; 105, at 3, is junk.
    greys = [colour[0] for colour in frames(sheet, y + 70) if len(set(colour)) == 1]
    assert greys == [20, 101, 102, 103, 106, 104]
    sheet = pictures.ranked_list(
        *case, query_features, gallery_features, rows=[0], top=9, same_camera=True
    )
    greys = [colour[0] for colour in frames(sheet, y + 70) if len(set(colour)) == 1]
    assert greys == [10, 101, 102, 103, 106, 104]


def test_cluster_montage():
    of = flat(range(10, 20), [1, 1, 1, 2, 3, 3, 3, 3, -1, 4], [0] * 10)
    labels = np.array([0, 0, 0, 0, 5, 5, 5, -1, 5, 5])
    sheet = pictures.cluster_montage(of, torch.from_numpy(labels), of.ids)
    x = sheet.width - pictures._MARGIN - 2 * 56 - 5  # within the last frames but one
    tops = sorted({*line_tops(sheet, MAIN, x - 120), *line_tops(sheet, WRONG, x - 120)})
    lines = [frames(sheet, y + 101) for y in tops]
    assert [[c for c in line if c in (MAIN, WRONG)] for line in lines] == [
        [MAIN, MAIN, MAIN, MAIN, WRONG],  # cluster 5: an unknown id is not wrong
        [MAIN, MAIN, MAIN, WRONG],
    ]
    greys = [colour[0] for colour in frames(sheet, tops[0] + 50) if len(set(colour)) == 1]
    assert greys[-5:] == [14, 15, 16, 18, 19]


def test_cluster_montage_by_strangers():
    of = flat(range(8), [1, 1, 1, 1, 1, 2, 3, 3], [0] * 8)
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    largest = pictures.cluster_montage(of, labels, of.ids)
    impure = pictures.cluster_montage(of, labels, of.ids, order="impure")
    assert impure.height < largest.height  # one cluster of three
    colours = {colour for _, colour in impure.getcolors(1 << 20)}
    assert {(4, 4, 4), (5, 5, 5)} <= colours
    assert (6, 6, 6) not in colours
    unknown = pictures.cluster_montage(of, labels)
    assert not {MAIN, WRONG} & {colour for _, colour in unknown.getcolors(1 << 20)}
    for ids, order in ((None, "impure"), (labels, "impure")):
        with pytest.raises(pictures.NothingToShow):
            pictures.cluster_montage(of, labels, ids, order=order)
    with pytest.raises(pictures.NothingToShow):
        pictures.cluster_montage(of, np.full(8, -1))
    with pytest.raises(ValueError, match="order must be largest or impure, got 'best'"):
        pictures.cluster_montage(of, labels, order="best")


@pytest.mark.parametrize("count", [1, 2, 5, 30])
@pytest.mark.parametrize("bad", [0, 1, 7, 20])
def test_montage_shows_both_sides(count, bad):
    wrong = np.arange(20) < bad
    shown = pictures._spread(wrong, count)
    assert len(set(shown)) == len(shown) == min(count, 20)
    if count > 1:
        assert wrong[shown].any() == (bad > 0)
        assert (~wrong[shown]).any() == (bad < 20)
    assert sorted(wrong[shown]) == list(wrong[shown])


def evaluations():
    query, gallery, *features = retrieval()
    return {
        "before": evaluation.evaluate(*(f.flip(0) for f in features), query, gallery),
        "after": evaluation.evaluate(*features, query, gallery, rerank=True, k1=3, k2=1),
    }


HISTORY = [
    {
        "epoch": epoch,
        "losses": {"cluster": 3 - epoch, "instance": 1.0},
        "clusters": {"clusters": 10, "outliers": 5 - epoch, "pair_precision": 0.5, "nmi": None},
        "evaluation": {"mAP": 0.2, "rank1": 0.4} if epoch == 1 else None,
        "seconds": {"features": 2.0, "training": 6.0},
    }
    for epoch in range(3)
]


def lines(figure):
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for plot in figure.axes
        for line in plot.lines
    }


def test_cmc_curve():
    found = evaluations()
    drawn = lines(pictures.cmc_curve(found, max_rank=5))
    after = found["after"]
    texts = [label.split(":")[0] for label in drawn]
    assert texts == ["before", "after", "after, re-ranked"]
    label = f"after: mAP {100 * after.mAP:.1f}, rank-1 {100 * after.rank1:.1f}"
    np.testing.assert_allclose(drawn[label][1], 100 * after.ranking.cmc[:5])
    plain = {name: result.to_dict() for name, result in found.items()}
    assert lines(pictures.cmc_curve(plain, max_rank=5)) == drawn


def test_training_curves():
    figure = pictures.training_curves(HISTORY)
    assert [plot.get_title("left") for plot in figure.axes] == [
        "loss",
        "clusters",
        "clusters against ids (%)",
        "retrieval (%)",
    ]
    drawn = lines(figure)
    assert drawn["cluster"] == ([0, 1, 2], [3, 2, 1])
    assert drawn["outliers"] == ([0, 1, 2], [5, 4, 3])
    assert drawn["mAP"] == ([1], [20])
    assert "NMI" not in drawn
    assert len(pictures.training_curves([{"losses": {"a": 1.0}}]).axes) == 1
    with pytest.raises(ValueError):
        pictures.training_curves([{"epoch": 0}])


def test_camera_pair_table():
    found = evaluations()["after"]
    figure = pictures.camera_pair_table(found)
    for plot, values in zip(
        figure.axes, (found.camera_pairs.mAP, found.camera_pairs.rank1), strict=True
    ):
        texts = [text.get_text() for text in plot.texts]
        expected = ["\N{EN DASH}" if np.isnan(x) else f"{100 * x:.0f}" for x in values.ravel()]
        assert texts == expected


def test_principal_components():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 20, generator=generator) * torch.logspace(1, -1, 20)
    places, shares = pictures.principal(features, 2)
    centred = (features - features.mean(0)).double()
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = (left * scale)[:, :2].numpy()
    expected *= np.sign((expected * places).sum(axis=0))
    np.testing.assert_allclose(places, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(shares, (scale**2 / (scale**2).sum())[:2], rtol=1e-4)
    before = torch.random.get_rng_state()
    pictures.principal(features, 2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_feature_map():
    groups = np.array([*range(12)] * 3 + [0, 0, 3, -1])
    features = torch.randn(len(groups), 8, generator=torch.Generator().manual_seed(0))
    (plot,) = pictures.feature_map(features, groups, name="camera", most=4).axes
    found = {c.get_label(): len(c.get_offsets()) for c in plot.collections}
    assert found == {"8 others": 25, "camera 0": 5, "camera 1": 3, "camera 2": 3, "camera 3": 4}
    styles = {(tuple(c.get_facecolor()[0]), str(c.get_paths()[0])) for c in plot.collections}
    assert len(styles) == 5
    (plot,) = pictures.feature_map(features, groups, max_points=9).axes
    assert sum(len(c.get_offsets()) for c in plot.collections) == 9
    (plot,) = pictures.feature_map(features, groups, method="tsne").axes
    assert sum(len(c.get_offsets()) for c in plot.collections) == len(groups)
    with pytest.raises(ValueError, match="method must be pca or tsne, got 'umap'"):
        pictures.feature_map(features, groups, method="umap")


def test_pictures_are_the_same_every_time():
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    for make in (
        lambda: pictures.ranked_list(*retrieval(), seed=3),
        lambda: pictures.feature_map(features, np.arange(30) % 3),
        lambda: pictures.feature_map(features, np.arange(30) % 3, method="tsne"),
    ):
        assert pictures.png(make()) == pictures.png(make())


class Page(HTMLParser):
    """The sections of a page, its text, its pictures; fails on tags that do not match."""

    def __init__(self, path):
        super().__init__()
        self.open, self.sections, self.images, self.text, self.tags = [], {}, [], "", set()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        found = dict(attributes)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        if tag == "section":
            self.sections[found["id"]] = ""
        if tag == "img":
            self.images.append(found)
        assert not {"href", "src"} & {
            name for name in found if not found[name].startswith(("#", "data:image/"))
        }

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text
        if self.sections and "section" in self.open:
            self.sections[list(self.sections)[-1]] += text + "\n"


def run(folder, **options):
    query, gallery, query_features, gallery_features = retrieval()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 16, 3), np.uint8)
    train = ImageArrays(pixels, None, np.arange(24) % 4, np.arange(24) % 3)
    labels = np.where(np.arange(24) < 3, -1, np.arange(24) % 3)
    data = ReidData("<b>data</b>", train, query, gallery)
    features = normalize(torch.from_numpy(pixels.reshape(24, -1)).float())
    drawn = report.draw(
        data,
        {"train": features, "query": query_features, "gallery": gallery_features},
        labels,
    )
    sheet = pictures.view_grid([train[0][0]], pixels[None, :8], pixels[:1])
    drawn.append(report.Picture("Generated views", "Turned", sheet))
    return report.write_report(
        folder,
        title='ice on <made-up> & "people"',
        results=evaluations(),
        history=HISTORY,
        drawn=drawn,
        data=data,
        clusters=evaluation.cluster_quality(labels, train.ids),
        settings={"method": {"eps": 0.5, "path": "<script>alert(1)</script>", "flip": True}},
        **options,
    )


def test_view_grid_has_each_picture_where_its_column_says():
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 256, (2 * 2 * 8 + 4, 1, 1, 3), np.uint8)
    flat = np.broadcast_to(flat, (len(flat), 32, 16, 3))
    views, truth = flat[:16].reshape(2, 8, 32, 16, 3), flat[16:32].reshape(2, 8, 32, 16, 3)
    inputs, cycles = [Image.fromarray(one) for one in flat[32:34]], flat[34:]
    sheet = np.asarray(pictures.view_grid(inputs, views, cycles, truth=truth, height=64))

    def runs(line):
        """Colours of what is wider than a letter, left to right, white left out."""
        edges = np.flatnonzero((line[1:] != line[:-1]).any(1)) + 1
        pieces = [piece for piece in np.split(line, edges) if len(piece) >= 16]
        return [tuple(piece[0]) for piece in pieces if tuple(piece[0]) != (255, 255, 255)]

    first, high = 16 + 12 + 8, 64 + 5
    for row in range(2):
        shown = [flat[32 + row], views[row, 0], *views[row], cycles[row]]
        at = first + 2 * row * high + 20
        assert runs(sheet[at]) == [tuple(image[0, 0]) for image in shown]
        assert runs(sheet[at + high]) == [tuple(image[0, 0]) for image in truth[row]]
    without = pictures.view_grid(inputs, views, cycles, height=64)
    assert without.height < len(sheet)
    with pytest.raises(ValueError, match="inputs, cycles and angles must be as many"):
        pictures.view_grid(inputs[:1], views, cycles)
    with pytest.raises(ValueError, match=r"truth must be of \(2, 8\)"):
        pictures.view_grid(inputs, views, cycles, truth=truth[:1])


def test_report(tmp_path):
    path = run(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert path.stat().st_size < 3_000_000
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert list(page.sections) == [name.lower().replace(" ", "-") for name in report.SECTIONS]
    assert not page.tags & {"script", "link", "b", "iframe"}
    assert not re.search(r"https?:|url\(|@import", text)
    for shown in ('ice on <made-up> & "people"', "<b>data</b>", "<script>alert(1)</script>"):
        assert shown in page.text
    results = page.sections["results"].split("\n")
    after = evaluations()["after"]
    assert f"{100 * after.mAP:.1f}" in results
    assert "after, re-ranked" in results
    assert "2 / 3" in results
    cost = page.sections["cost"].split()
    assert cost[cost.index("training") :][:5] == ["training", "18.0", "6.0", "75", "%"]
    assert "24" in page.sections["what-was-run"].split()
    titles = [image["alt"] for image in page.images]
    assert len(titles) == len(set(titles)) == 11
    for image in page.images:
        head, content = image["src"].split(",")
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert head == f"data:image/{picture.format.lower()};base64"
            picture.load()


def test_report_keeps_to_a_size(tmp_path):
    paths = [
        report.write_report(tmp_path / str(size), title="x", results=evaluations(), max_bytes=size)
        for size in (200_000, 70_000)
    ]
    large, small = (path.stat().st_size for path in paths)
    assert small <= 70_000 < large <= 200_000
    shown = [[image["width"] for image in Page(path).images] for path in paths]
    assert shown[0] == shown[1] != []


def test_report_of_little(tmp_path):
    page = Page(report.write_report(tmp_path, title="nothing yet", environment={"torch": "9"}))
    assert list(page.sections) == ["what-was-run"]
    assert "9" in page.sections["what-was-run"]
    nothing = flat([1, 2], [0, 1], [0, 0])
    found = evaluation.evaluate(at(0, 90), at(0, 90), nothing, nothing)
    page = Page(report.write_report(tmp_path, title="no match", results={"only": found}))
    assert page.images == []
    assert "\N{EN DASH}" in page.sections["results"]
    data = ReidData("x", nothing, nothing, nothing)
    assert report.draw(data, {"query": at(0, 90), "gallery": at(0, 90)}) == []
    assert report.draw(data, {}, np.full(2, -1)) == []
    with pytest.raises(ValueError) as raised:
        report.write_report(tmp_path, title="", drawn=[report.Picture("Else", "", None)])
    assert str(raised.value).startswith("write_report: section must be one of Results, Training")


def test_pictures_as_files(tmp_path):
    sheet = pictures.ranked_list(*retrieval())
    (path,) = report.save(tmp_path / "x", [report.Picture("Retrieval", "Some queries", sheet)])
    assert path == tmp_path / "x" / "retrieval-some-queries.png"
    with Image.open(path) as saved:
        assert saved.size == sheet.size
