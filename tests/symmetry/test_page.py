"""The HTML page of a report: well-formed, self-contained, escaped, true to the report, and fit for every screen."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.browser import measure, photograph
from helpers.page_cases import Page, check_accessible, check_contrast, check_picture, check_self_contained
from helpers.toy_networks import TOYS
from torch import nn

import manifold_nets as mn
from manifold_nets.cli import main
from manifold_nets.errors import ReportMismatchError
from manifold_nets.symmetry import SymmetryReport
from manifold_nets.symmetry.page import page_html, write_page
from manifold_nets.symmetry.page.drawings import STATUSES, group_norms, histogram
from manifold_nets.symmetry.page.graph import parts


def check_true(text: str, report: SymmetryReport) -> None:
    """Every weight, its status, its remedy and what broke its groups stand on the page."""
    page = Page(text)
    for weight in report.weights:
        for told in (weight.name, weight.remedy, weight.broken_by or "", *weight.moves_along):
            assert told in page.text
    weights = {weight.name for weight in report.weights}
    joint = [f for f in report.families if f.kind != "scale" or f.partial or len(weights & set(f.parameters)) > 1]
    for symmetry in (*joint, *report.shifts):
        assert symmetry.remedy in page.text
        assert all(name in page.text for name in symmetry.parameters)
    assert len(page.having("details", **{"class": "card"})) == len(weights) + len(joint) + len(report.shifts)
    for status, count in report.counts().items():
        assert f"{status}{count}" in page.text
    # One point of the certificates and one card for each weight.
    assert len(page.having("use", width="10")) == len(report.weights)
    assert len([1 for a in page.having("div") if re.fullmatch(r"w\d+", a.get("id") or "")]) == len(report.weights)


@pytest.fixture(scope="module", params=sorted(TOYS))
def built(request: pytest.FixtureRequest) -> tuple[SymmetryReport, nn.Module]:
    toy = TOYS[request.param]
    model = toy.build()
    return mn.diagnose(model, toy.inputs()), model


def test_pages_of_the_toys(built: tuple[SymmetryReport, nn.Module]) -> None:
    report, model = built
    text = page_html(report, model)
    check_self_contained(text)
    check_accessible(text)
    check_true(text, report)


def dense() -> tuple[SymmetryReport, nn.Module]:
    torch.manual_seed(0)
    model = TOYS["dense"].build()
    return mn.diagnose(model, TOYS["dense"].inputs()), model


@pytest.mark.parametrize(
    ("fault", "planted"),
    [
        ("</h1>", '</h1><img src="a.png">'),
        ("</h1>", '</h1><a href="https://example.org">x</a>'),
        ("</h1>", '</h1><a href="#nowhere">x</a>'),
        ("body{", "body{background:url(a.png);"),
        ("</h1>", "</h1><script>1</script>"),
        ('<div id="w1"', '<div id="w0"'),
        ("<p>", '<p onclick="1">'),
    ],
)
def test_what_is_not_self_contained_is_found(fault: str, planted: str) -> None:
    text = page_html(*dense())
    assert fault in text
    with pytest.raises(AssertionError):
        check_self_contained(text.replace(fault, planted, 1))


@pytest.mark.parametrize(
    ("fault", "planted"),
    [('lang="en"', ""), ("h2", "h4"), ('scope="col"', ""), ("</h1>", "</h1><svg></svg>"), ('role="img"', "")],
)
def test_what_is_not_accessible_is_found(fault: str, planted: str) -> None:
    text = page_html(*dense())
    assert fault in text
    with pytest.raises(AssertionError):
        check_accessible(text.replace(fault, planted))


def test_a_page_of_another_report_is_found() -> None:
    report, model = dense()
    text = page_html(report, model)
    first = dataclasses.replace(report.weights[0], remedy="another remedy")
    for weights in ((first, *report.weights[1:]), report.weights[1:]):
        with pytest.raises(AssertionError):
            check_true(text, dataclasses.replace(report, weights=weights))


# ---- names and values that come from elsewhere -----------------------------------------------------------------------

HOSTILE = "<script>alert('x')</script>&\"'"


def hostile() -> tuple[SymmetryReport, nn.Module]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(HOSTILE.replace(".", ""), nn.Linear(5, 6))
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(getattr(self, HOSTILE)(x))

    Net.__name__ = HOSTILE
    model = Net()
    # torch.export takes no such names.
    plain = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    report = mn.diagnose(plain, torch.randn(4, 5))
    finding = dataclasses.replace(
        report.weights[0], name=f"{HOSTILE}.weight", layer=HOSTILE, remedy=HOSTILE, broken_by=HOSTILE
    )
    graph = tuple(
        dataclasses.replace(
            node, name=node.name.replace("0", HOSTILE), label=HOSTILE, weights=(finding.name,) if node.weights else ()
        )
        for node in report.graph
    )
    return dataclasses.replace(report, model=HOSTILE, weights=(finding,), graph=graph, families=(), shifts=()), model


def test_names_are_escaped() -> None:
    text = page_html(*hostile())
    check_self_contained(text)
    assert "<script" not in text
    assert Page(text).text.count(HOSTILE) >= 6


def test_an_unescaped_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manifold_nets.page.markup.html.escape", lambda text, quote: text)
    text = page_html(*hostile())
    with pytest.raises(AssertionError):
        check_self_contained(text)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_another_model_is_refused(change: str, tmp_path: Path) -> None:
    report, model = dense()
    other = nn.Sequential(nn.Linear(3, 3)) if change == "missing" else model
    if change == "shape":
        model.a = nn.Conv2d(3, 5, 3, padding=1)
    with pytest.raises(ReportMismatchError, match=re.escape("a.weight")):
        write_page(report, other, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: object, **__: object) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_page(*dense(), path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_an_empty_report() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))
    report = mn.diagnose(model, torch.randn(4, 4))
    assert report.weights == ()
    check_self_contained(page_html(report, model))
    check_accessible(page_html(report, model))


def test_every_status_has_a_mark_of_its_own() -> None:
    shapes = [status.shape for status in STATUSES.values()]
    assert len(set(shapes)) == len(shapes)
    report, model = dense()
    (first, second), statuses = report.weights, list(STATUSES)
    for one, two in zip(statuses[::2], statuses[1::2], strict=True):
        changed = dataclasses.replace(first, status=one), dataclasses.replace(second, status=two)
        text = page_html(dataclasses.replace(report, weights=changed), model)
        check_self_contained(text)
        assert f'href="#m-{STATUSES[one].css}"' in text
        assert f'href="#m-{STATUSES[two].css}"' in text


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def bar_heights(drawn: str) -> list[float]:
    return [float(h) for h in re.findall(r"v-([\d.]+)h", drawn)]


def test_norms_are_those_of_the_groups() -> None:
    report, model = dense()
    finding = report["a.weight"]
    weight = dict(model.named_parameters())["a.weight"]
    norms = group_norms(finding, weight)
    assert norms is not None
    expected = torch.linalg.vector_norm(weight.detach().double().flatten(1), dim=1).sort().values
    torch.testing.assert_close(torch.tensor(norms.values, dtype=torch.float64), expected)
    with pytest.raises(AssertionError):  # Sabotage: the largest entry for the norm.
        torch.testing.assert_close(expected, weight.detach().double().flatten(1).abs().amax(1).sort().values)


def test_histograms_count_the_norms() -> None:
    report, _ = dense()
    finding = report["a.weight"]
    weight = torch.zeros(finding.shape)
    weight[:, 0, 0, 0] = torch.tensor([1.0, 1.0, 1.0, 3.0])
    norms = group_norms(finding, weight)
    assert norms is not None
    assert bar_heights(histogram(norms, 100, 32)) == [30.0, 10.0]
    assert str(norms) == "1 to 3, median 1 (4 filters)"
    weight[0], weight[1] = 0.0, float("nan")
    broken = group_norms(finding, weight)
    assert broken is not None
    assert (broken.zero, broken.lost) == (1, 1)
    assert "1 zero; 1 not finite" in str(broken)
    assert group_norms(finding, weight.to("meta")) is None


def test_weights_without_finite_norms_have_no_histogram() -> None:
    report, model = dense()
    with torch.no_grad():
        model.get_parameter("a.weight").fill_(float("inf"))
    check_self_contained(page_html(report, model))
    assert "no finite norm among 4 filters" in page_html(report, model)


def test_points_stand_where_their_values_are() -> None:
    report, model = dense()
    values = 1e-18, 1e-9
    weights = tuple(
        dataclasses.replace(w, certificate=dataclasses.replace(w.certificate, value=value))
        for w, value in zip(report.weights, values, strict=True)
    )
    text = page_html(dataclasses.replace(report, weights=weights), model)
    low, middle = (float(y) for y in re.findall(r'<svg x="[\d.]+%" y="([\d.]+)"', text))
    top = min(float(y) for y in re.findall(r'<line x1="0" x2="100%" y1="([\d.]+)"', text))
    assert middle == pytest.approx((low + top) / 2)


def test_the_graph_is_that_of_the_network() -> None:
    report, _ = dense()
    found = {node.name: (node.kind, node.inputs, node.weights) for node in report.graph}
    assert found == {
        "x": ("input", (), ()),
        "a": ("weight", ("x",), ("a.weight",)),
        "n1": ("normalization", ("a",), ()),
        "b": ("weight", ("n1",), ("b.weight",)),
        "cat": ("operation", ("a", "b"), ()),
        "n2": ("normalization", ("cat",), ()),
        "output": ("output", ("n2",), ()),
    }


def test_graphs_are_in_order_and_complete(built: tuple[SymmetryReport, nn.Module]) -> None:
    report, _ = built
    seen: set[str] = set()
    for node in report.graph:
        assert node.name not in seen
        assert set(node.inputs) <= seen
        seen.add(node.name)
    read = {name for node in report.graph for name in node.weights}
    assert read <= {weight.name for weight in report.weights}
    assert all(weight.status == "no evidence" for weight in report.weights if weight.name not in read)
    assert [node for part in parts(report.graph) for node in part.nodes] == list(report.graph)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    nets = tmp_path / "nets.py"
    nets.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))\n")
    page = tmp_path / "report.html"
    arguments = ["diagnose", f"{nets}:net", "--input-shape", "5", "--html"]
    done = CliRunner().invoke(main, [*arguments, str(page), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["html"] == str(page)
    check_self_contained(page.read_text(encoding="utf-8"))
    missing = CliRunner().invoke(main, [*arguments, str(tmp_path / "no" / "report.html")])
    assert missing.exit_code == 2


# ---- colours ---------------------------------------------------------------------------------------------------------


def test_colours_have_contrast() -> None:
    text = page_html(*dense())
    check_contrast(text)
    with pytest.raises(AssertionError):
        check_contrast(text.replace("--soft:#555b66", "--soft:#999999"))


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        ((1200, 700), "light"),
        ((390, 700), "dark"),
        pytest.param((1200, 700), "dark", marks=pytest.mark.slow),
        pytest.param((390, 700), "light", marks=pytest.mark.slow),
    ],
)
def test_the_page_is_drawn(size: tuple[int, int], scheme: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_page(*dense(), page)
    check_picture(photograph(page, tmp_path / "report.png", *size, scheme), size, scheme)


def test_a_blank_page_and_the_wrong_scheme_are_found(tmp_path: Path) -> None:
    page = tmp_path / "blank.html"
    page.write_text("<!DOCTYPE html><body style='background:rgb(251,251,249)'></body>")
    blank = photograph(page, tmp_path / "blank.png", 500, 400, "light")
    with pytest.raises(AssertionError):
        check_picture(blank, (500, 400), "light")
    drawn = dataclasses.replace(blank, rows=400)
    check_picture(drawn, (500, 400), "light")
    with pytest.raises(AssertionError):
        check_picture(drawn, (500, 400), "dark")


WIDTHS = [320, 390, 768, 1200]


def check_widths(text: str, folder: Path, *, opened: bool) -> None:
    """The document is as wide as its window, whatever that is."""
    assert measure(text, folder, WIDTHS, opened=opened) == {width: (width, width) for width in WIDTHS}


@pytest.mark.parametrize("opened", [False, True])
def test_no_page_is_wider_than_its_window(opened: bool, tmp_path: Path) -> None:
    check_widths(page_html(*dense()), tmp_path, opened=opened)


def test_a_wide_page_is_found(tmp_path: Path) -> None:
    text = page_html(*dense()).replace("</h1>", '</h1><div style="width:400px">x</div>', 1)
    with pytest.raises(AssertionError):
        check_widths(text, tmp_path, opened=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "densenet121"])
def test_pages_of_real_networks(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    torch.manual_seed(0)
    model = mn.sources.load_model(f"torchvision:{name}")
    report = mn.diagnose(model, torch.randn(2, 3, 64, 64))
    text = page_html(report, model)
    check_self_contained(text)
    check_accessible(text)
    check_true(text, report)
    assert len(parts(report.graph)) > 3
    assert len(text) < 2_000_000
    page = tmp_path / "report.html"
    page.write_text(text, encoding="utf-8")
    for size, scheme in (((390, 900), "dark"), ((1200, 900), "light")):
        check_picture(photograph(page, tmp_path / "report.png", *size, scheme), size, scheme)
    for opened in (False, True):
        check_widths(text, tmp_path, opened=opened)


# ---- in a notebook ---------------------------------------------------------------------------------------------------


def check_fragment(text: str, cells: list[str]) -> None:
    """Well-formed and escaped, with rules for its own elements alone and no colours but those around it."""
    page = Page(text)
    assert not {"script", "link", "img", "h1", "h2"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if "id" in attributes]
    assert all(cell in page.text for cell in cells)
    style = text.partition("<style>")[2].partition("</style>")[0]
    selectors = [part.strip() for rule in style.split("}")[:-1] for part in rule.partition("{")[0].split(",")]
    assert all(selector.startswith(".manifold-nets") for selector in selectors)
    assert not re.search("#|rgb|white|black", style)


def test_what_a_notebook_shows() -> None:
    name = "<script>alert(1)</script>"
    block = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
    net = nn.Sequential(block, nn.Linear(8, 2))
    report = mn.diagnose(net, torch.randn(16, 4))
    record = mn.conversion_record(mn.convert(net, report))
    assert record is not None
    renamed = dataclasses.replace(report, model=name)
    check_fragment(renamed._repr_html_(), [name, "0.0.weight", "8 filters of 4", "0.1 (batch_norm)", "not invariant"])
    check_fragment(record._repr_html_(), ["Sequential", str(record.verification), "0.0.weight", "sphere", "unit"])
    # Sabotage: unescaped, and a rule for the whole notebook.
    for broken in (name, "<p>", "<style>td{margin:0}</style>"):
        with pytest.raises(AssertionError):
            check_fragment(report._repr_html_().replace("<div ", f"{broken}<div ", 1), [])


def test_a_long_table_is_folded_in_a_notebook() -> None:
    layers = [layer for _ in range(13) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
    report = mn.diagnose(nn.Sequential(*layers), torch.randn(8, 4))
    assert "<details><summary>13 weights</summary>" in report._repr_html_()


@pytest.mark.parametrize("colours", ["background:#111;color:#eee", "background:#fff;color:#111"])
def test_a_notebook_may_be_dark_or_light(colours: str, tmp_path: Path) -> None:
    toy = TOYS[min(TOYS)]
    report = mn.diagnose(toy.build(), toy.inputs())
    page = tmp_path / "notebook.html"
    pictures = []
    for text in (report._repr_html_(), ""):
        page.write_text(f'<body style="margin:0;{colours}">{text}</body>', encoding="utf-8")
        pictures.append(photograph(page, tmp_path / "notebook.png", 800, 400, "light"))
    assert pictures[0].corner == pictures[1].corner
    assert pictures[0].rows > 20 > pictures[1].rows
