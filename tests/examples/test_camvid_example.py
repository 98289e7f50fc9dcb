"""The evidence on CamVid: every arm runs on a tiny folder, scores agree with scikit-learn, words with numbers."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.comparison_cases import data_folder
from helpers.example_modules import EXAMPLES, example

pytest.importorskip("sqlalchemy")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

script = example("camvid_segnet", "sklearn", "scipy")
scores_of = example("camvid_scores")
report = example("camvid_report")
tables = example("camvid_tables")
evidence = example("evidence")

STORED = ("runs.csv", "runs.json", "epochs.csv", "scores.csv", "about.json", "pictures.npz")
MADE = (".md", "_curves.png", "_pictures.png")
FEW = {
    "SGD_RATES": (0.1, 1e8),  # at which SGD diverges
    "ADAM_RATES": (0.01,),
    "RADAM_RATES": (0.1,),
    "NEAR": (0.1,),
    "DECAYS": (1e-2,),
}


def write_streets(folder: Path) -> None:
    """Images whose colours tell the classes, in the layout of the tutorial, with the paths of another machine."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3), ("test", 5)):
        lines = []
        for name in (part, f"{part}annot"):
            (folder / name).mkdir(parents=True)
        for number in range(count):
            labels = generator.integers(0, 12, (3, 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
            image = (20 * labels[..., None] + generator.integers(0, 30, (12, 16, 3))).astype(np.uint8)
            files = f"{part}/{number}.png", f"{part}annot/{number}.png"
            for file, array in zip(files, (image, labels), strict=True):
                Image.fromarray(array).save(folder / file)
            lines.append(" ".join(f"/SegNet/CamVid/{file}" for file in files))
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")


def run(*words: object, few: bool = True) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items() if few else ():
            patch.setattr(script, name, value)
        patch.setattr(sys, "argv", [str(EXAMPLES / "camvid_segnet.py"), *map(str, words)])
        script.main()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("camvid")
    write_streets(folder / "data")
    small = ("--size", "8x6", "--filters", 3, "--blocks", 2, "--epochs", 2, "--seeds", 2)
    run("--data", folder / "data", "--output", folder / "runs", "--write", folder / "results", *small)
    return folder


@pytest.mark.slow
def test_every_arm_is_stored_and_reported(finished):
    results = finished / "results"
    assert {path.name for path in results.iterdir()} == {
        *(f"camvid_{name}" for name in STORED),
        *(f"camvid{name}" for name in MADE),
    }
    stored = scores_of.read_stored(results)
    assert list(stored.about) == [
        *("SGD", "Adam", "Riemannian Adam", "SGD, rescaled", "SGD, weight decay 0.01", "SGD, constant rate"),
        *("recipes", "larger images, sgd", "larger images, rsgd"),
    ]
    assert len(stored.runs.rows) == 2 * (4 + 1 + 1 + 2 + 1 + 2 + 2 + 1 + 1)
    assert stored.about["larger images, sgd"]["task"]["input_shape"] == [3, 12, 16]
    rates = {run.learning_rate for run in stored.runs.rows if run.arm == "larger images, rsgd"}
    assert rates == {stored.runs.chosen("SGD", "rsgd")[0].learning_rate}
    text = (results / "camvid.md").read_text(encoding="utf-8")
    options = "--size 8x6 --filters 3 --blocks 2 --epochs 2 --seeds 2"
    command = f"python examples/camvid_segnet.py --data FOLDER --write examples/results {options}"
    assert f"Command: `{command}`; {len(stored.runs.rows)} runs." in text
    assert str(finished) not in text + (results / "camvid_about.json").read_text(encoding="utf-8")
    for heading in ("Test images", "Classes", "Robustness", "Other recipes", "Images of 16×12"):
        assert f"\n## {heading}\n" in text


@pytest.mark.slow
def test_the_report_is_made_again_from_what_is_stored(finished):
    results = finished / "results"
    before = {name: (results / f"camvid{name}").read_bytes() for name in MADE}
    for name in MADE:
        (results / f"camvid{name}").unlink()
    run("--write", results, "--report-only")
    assert {name: (results / f"camvid{name}").read_bytes() for name in MADE} == before


def check_scores(stored, score):
    """The scores of every stored run agree with the test error that the comparison found."""
    chosen = [run for run in stored.runs.rows if run.chosen]
    assert len(chosen) == len(stored.scores) > 15
    for found in chosen:
        counted = stored.of((found.arm, found.optimizer, found.initial_scale))[found.seed]
        # Test errors are stored with six digits.
        assert score(counted) == pytest.approx(100 * (1 - found.test_error), abs=1e-3)


@pytest.mark.slow
def test_stored_scores_are_those_of_the_comparison(finished):
    check_scores(scores_of.read_stored(finished / "results"), lambda found: found.mean_iou)


@pytest.mark.slow
def test_sabotage_another_score_is_noticed(finished):
    with pytest.raises(AssertionError):
        check_scores(scores_of.read_stored(finished / "results"), lambda found: found.class_average)


def check_against_scikit_learn(scores):
    from sklearn import metrics

    generator = np.random.default_rng(1)
    true = generator.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 500)  # no bicyclist, but some are seen
    predicted = np.where(generator.random(500) < 0.6, true, generator.integers(0, 11, 500))
    counts = np.zeros((11, 12), np.int64)
    np.add.at(counts, (true, predicted), 1)
    found, present = scores(counts), np.unique(true)
    expected = metrics.jaccard_score(true, predicted, average=None, labels=present)
    np.testing.assert_allclose(found.class_iou[present], 100 * expected, rtol=1e-12)
    assert math.isnan(found.class_iou[10])
    assert found.mean_iou == pytest.approx(100 * expected.mean(), rel=1e-12)
    recall = metrics.recall_score(true, predicted, average="macro", labels=present)
    assert found.class_average == pytest.approx(100 * recall, rel=1e-12)
    assert found.global_accuracy == pytest.approx(100 * metrics.accuracy_score(true, predicted), rel=1e-12)


def test_scores_agree_with_scikit_learn():
    check_against_scikit_learn(lambda counts: scores_of.Scores("a", "sgd", "plain", 0, counts))


def test_sabotage_exchanged_axes_are_noticed():
    def exchanged(counts):
        counts[:, :11] = counts[:, :11].T.copy()
        return scores_of.Scores("a", "sgd", "plain", 0, counts)

    with pytest.raises(AssertionError):
        check_against_scikit_learn(exchanged)


def stored_with(first, second):
    """Stored runs in which one class is right in as many of 1000 pixels as given in percent, for SGD and on spheres."""
    runs, scores = [], []
    for optimizer, values in (("sgd", first), ("rsgd", second)):
        for seed, value in enumerate(values):
            error = 1 - value / 100
            runs += [evidence.Run("SGD", optimizer, "plain", 0.1, 0.0, seed, 1, False, True, 1.0, error, error, 1.0)]
            counts = np.zeros((11, 12), np.int64)
            counts[0, [0, 11]] = round(10 * value), 1000 - round(10 * value)
            scores.append(scores_of.Scores("SGD", optimizer, "plain", seed, counts))
    return scores_of.Stored(evidence.Runs(tuple(runs)), (), tuple(scores), {})


def test_words_follow_from_the_interval():
    clear, unclear = stored_with([20, 30, 25], [24, 34, 30]), stored_with([20, 30, 25], [24, 26, 27])
    assert tables.judged(tables.difference(clear, tables.RSGD, tables.SGD)).startswith("+4.3 (+2.9 … +5.8) points")
    assert "leaves out zero" in tables.judged(tables.difference(clear, tables.RSGD, tables.SGD))
    assert "3 seeds do not tell the two apart" in tables.judged(tables.difference(unclear, tables.RSGD, tables.SGD))
    assert tables.spread(tables.values(clear, tables.SGD, tables.mean_iou)) == "25.0 ± 5.0"


def test_good_rates_are_those_of_nine_tenths_of_the_best_score():
    ious = {0.01: 0.20, 0.1: 0.28, 1.0: 0.30, 10.0: 0.24}
    rows = [
        evidence.Run("SGD", "sgd", "plain", rate, 0.0, 0, 1, False, rate == 1.0, 1.0, 1 - iou, math.nan, 1.0)
        for rate, iou in ious.items()
    ]
    stored = scores_of.Stored(evidence.Runs(tuple(rows)), (), (), {})
    found = tables.width(stored, tables.SGD)
    # 0.27 is crossed an eighth of a decade below 0.1, and in the middle between 1 and 10.
    assert math.log10(found.low) == pytest.approx(-1 - 0.01 / 0.08)
    assert math.log10(found.high) == pytest.approx(0.5)


def test_the_full_network_is_an_option():
    chosen = script.parser().parse_args(["--full", "--device", "cuda", "--seeds", "1"])
    options = script.protocol_of(chosen).options()
    paper = EXAMPLES / "paper" / "camvid.py"
    assert (options["task"], options["model"]) == (f"{paper}:camvid_480x360", f"{paper}:segnet_basic_64x4")
    assert (options["device"], options["seeds"]) == ("cuda", 1)
    assert script.command_of(chosen).endswith("--write examples/results --full --seeds 1 --device cuda")


def test_the_command_names_the_arms_that_were_asked_for():
    chosen = script.parser().parse_args(["--arms", "SGD, rescaled", "Adam"])
    assert script.command_of(chosen).endswith("--write examples/results --arms 'SGD, rescaled' Adam")


def test_the_stored_report_is_that_of_the_stored_runs():
    results = EXAMPLES / "results"
    if not (results / "camvid.md").is_file():
        pytest.skip("no stored results on CamVid")
    text = (results / "camvid.md").read_text(encoding="utf-8")
    assert report.as_markdown(scores_of.read_stored(results), "camvid") == text
    assert all((results / f"camvid{name}").stat().st_size < 400_000 for name in MADE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--write", "x", "--size", "8"], "--size 8: expected WIDTHxHEIGHT"),
        (["--write", "x", "--report-only"], "--report-only needs --write FOLDER"),
        (["--report-only"], "2"),  # argparse has printed what is wrong
    ],
)
def test_what_cannot_work_is_refused(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(*words)


@pytest.mark.slow
def test_an_arm_of_no_name_is_refused(finished, tmp_path):
    with pytest.raises(SystemExit, match=r"--arms tractor: no such arm; there are: SGD, Adam, .*larger images"):
        run("--data", finished / "data", "--size", "8x6", "--write", tmp_path, "--arms", "tractor")


@pytest.mark.slow
def test_the_real_images(tmp_path, capsys):
    size = ("--size", "60x45", "--filters", 8, "--blocks", 3, "--epochs", 1, "--seeds", 1)
    data = data_folder("camvid-240x180")
    run("--data", data, "--output", tmp_path, "--write", tmp_path, "--arms", "SGD, constant", *size)
    assert "No report: it needs the arm SGD." in capsys.readouterr().out
    stored = scores_of.read_stored(tmp_path)
    labels = script.load_task(f"{script.PAPER}:camvid_60x45", data=data).parts["test"].targets
    for optimizer in ("sgd", "rsgd"):
        found = stored.of(("SGD, constant rate", optimizer, "plain"))[0]
        assert found.counts.sum() == int((labels != 11).sum())
        assert found.class_average > 20  # the same class for all pixels has 9
