"""The page of `seft report`: of whole, unfinished, damaged and hostile runs, and as a browser shows it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import tests.preload  # noqa: F401
from seft_dist.commands import report as report_command
from seft_dist.config import SeftConfig
from seft_dist.results.page.findings import findings_of, missing_of
from seft_dist.results.page.layers import TargetLocation
from seft_dist.results.page.record import labels_of, read_records
from seft_dist.results.page.render import render, write_page
from seft_dist.results.page.svg import thin_out
from seft_dist.results.page.words import decimal, duration, model_name, size, spread_out
from tests.browser import CHROMIUM, Browser
from tests.runs import make_config, run_train
from tests.scripts import run_script

SECTIONS = ("warnings", "training", "perplexity", "sparsity", "topology", "deltas", "cost", "configuration", "missing")
FIGURES = (
    *("loss", "learning-rate", "gradient-norm", "perplexity", "zeros", "overlap", "evolutions"),
    *("dropped-0", "reactivated-0", "pruned-0", "deltas", "speed", "phases"),
)
VOID = {"meta", "link", "input", "br", "img"}
HOSTILE = "<script>alert('$x$')</script>&\"\x07\u202e${{ 7*7 }}"


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and evaluated run, with a validation loss in its metrics."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_train(make_config(inputs, folder))
    values = {"dense": (17.0, 0.0), "pruned": (66.0, 0.6), "repaired": (29.0, 0.6)}
    models = {
        n: {"path": f"models/{n}", "perplexity": p, "sparsity": s, "num_tokens": 99} for n, (p, s) in values.items()
    }
    (folder / "eval.json").write_text(json.dumps({"models": models}))
    edit_lines(folder, lambda line: line | {"validation": {"loss": 5 - line["step"] / 10, "perplexity": 9.0}})
    return folder


def edit_lines(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


class Parsed(HTMLParser):
    """A page: every tag closed, every id once, every reference to an id that is there."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        assert len(set(self.ids)) == len(self.ids), {i for i in self.ids if self.ids.count(i) > 1}
        assert set(self.references) <= set(self.ids), set(self.references) - set(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [tag] if tag not in VOID else []
        for key, value in attrs:
            assert not key.startswith("on"), f"{tag} has {key}"
            assert not re.match(r"(https?:)?//|javascript:", value or "") or key == "xmlns", f"{tag} has {key}={value}"
            if key == "id":
                self.ids.append(value or "")
            elif key == "href" and (value or "").startswith("#"):
                self.references.append((value or "")[1:])
            elif key == "aria-labelledby":
                self.references += (value or "").split()
            elif match := re.fullmatch(r"url\(#(.*)\)", value or ""):
                self.references.append(match[1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text[self.open[-1] if self.open else ""] = self.text.get(self.open[-1] if self.open else "", "") + data


def page_of(*runs: Path, draws: bool = True) -> tuple[str, Parsed]:
    page = render(read_records(list(runs)), draws=draws)
    return page, Parsed(page)


def test_a_whole_run_has_every_section_and_every_figure(trained: Path) -> None:
    page, parsed = page_of(trained)
    assert set(SECTIONS) <= set(parsed.ids) and {f"figure-{name}" for name in FIGURES} <= set(parsed.ids)
    assert parsed.tags.count("figure") == len(FIGURES) == page.count('role="img"')
    assert "script" not in parsed.tags and not re.search(r"@import|url\((?!#)", page)
    assert page.count("<details") >= len(FIGURES)  # each figure has its numbers
    assert "Perplexity on the evaluation&#39;s text: dense 17.0, pruned 66.0 and repaired 29.0." in page
    assert "every target has as many zeros as before" in page and "validation loss to 4.00" in page
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", page), "a colour that only stands for another is left"
    tips = re.findall(r"<title>(layer \d, [^<]*)</title>", page)
    assert len(tips) == 3 * 14 and "layer 0, self_attn.q_proj: " in tips[0]


def test_a_page_without_drawings_has_their_numbers(trained: Path) -> None:
    page, parsed = page_of(trained, draws=False)
    assert 'role="img"' not in page and parsed.tags.count("figure") == len(FIGURES)
    assert parsed.tags.count("table") >= len(FIGURES)


@pytest.mark.parametrize("left", [["config.yaml"], ["metrics.jsonl"], ["config.yaml", "metrics.jsonl", "checkpoints"]])
def test_a_run_that_has_hardly_begun_has_a_page_that_says_what_is_missing(
    trained: Path, tmp_path: Path, left: list[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (shutil.copytree if (trained / name).is_dir() else shutil.copy)(trained / name, run / name)
    if "metrics.jsonl" in left:
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text[: text.index('"step": 6') + 20])  # a line that is still being written
    page, parsed = page_of(run)
    assert set(SECTIONS) <= set(parsed.ids) and "not finished" in page
    said = dict(missing_of(read_records([run])[0]))
    assert "the result" in said and "perplexities" in said and ("losses" in said) == ("metrics.jsonl" not in left)
    assert ("figure-loss" in parsed.ids) == ("metrics.jsonl" in left)
    assert ("figure-deltas" in parsed.ids) == ("checkpoints" in left)


@pytest.mark.parametrize("finished", [True, False])
def test_a_mask_that_stays_has_a_map_of_deltas_only(finished: bool, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "topology.jsonl").read_text().splitlines()]
    for line in lines:
        line["moved"] = [[dropped, grown, 0, 0, kept] for dropped, grown, _, _, kept in line["moved"]]
    (run / "topology.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not finished:
        (run / "layers.json").unlink()
    page, parsed = page_of(run)
    assert "figure-dropped-0" in parsed.ids and not {"figure-reactivated-0", "figure-pruned-0"} & set(parsed.ids)
    dropped, deltas = sum(row[0] for row in lines[-1]["moved"]), sum(row[1] for row in lines[0]["moved"])
    assert f"{dropped:,}" in page[page.index('id="figure-dropped-0"') :] and dropped
    trained_deltas = sum(read_records([run])[0].layers.trained.values())
    assert 0.9 * deltas < trained_deltas <= deltas and (finished or trained_deltas == deltas)
    if not finished:  # the same share in every target
        lines[-1]["moved"] = [[2 * row[1], *row[1:]] for row in lines[0]["moved"]]
        (run / "topology.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert "figure-dropped-0" not in page_of(run)[1].ids


def test_an_older_run_shows_what_its_delta_file_tells(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "topology.jsonl").unlink()
    (run / "layers.json").unlink()
    page, parsed = page_of(run)
    assert "figure-reactivated-0" in parsed.ids and "figure-overlap" not in parsed.ids and "figure-zeros" in parsed.ids
    assert "What the movements add up to" in page and "topology.jsonl is not there" in page


def test_runs_are_laid_over_each_other_with_what_differs(trained: Path, tmp_path: Path) -> None:
    other = shutil.copytree(trained, tmp_path / "other")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["optim"]["lr"] = 0.125
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    (other / "result.json").unlink()
    page, parsed = page_of(trained, other)
    loss = page[page.index('id="figure-loss"') : page.index('id="figure-learning-rate"')]
    assert 'class="of-run-0"' in loss and 'class="of-run-1"' in loss and "figure-validation" in parsed.ids
    differing = page[page.index("What differs between") : page.index('<fieldset class="legend"')]
    assert "optim.lr" in differing and "0.125" in differing and "seft.density" not in differing
    assert "body:has(.show-1:not(:checked)) .of-run-1 { display: none; }" in page


def test_names_and_texts_of_strangers_do_nothing(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / HOSTILE.replace("/", "_"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["path"] = config["data"]["path"] = config["method"] = HOSTILE
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    models = {HOSTILE: {"path": HOSTILE, "perplexity": 3.0, "tasks": {HOSTILE: {HOSTILE: 1.0}}}}
    (run / "eval.json").write_text(json.dumps({"models": models}))
    (run / "layers.json").write_text((run / "layers.json").read_text().replace("self_attn", json.dumps(HOSTILE)[1:-1]))
    (run / "diagnosis").mkdir()
    (run / "diagnosis" / "step-1-rank-0.json").write_text(json.dumps({"error": HOSTILE}))
    (run / "result.json").unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["attempts"][0] |= {
        "command": HOSTILE,
        "started": HOSTILE,
        "hosts": [{"host": HOSTILE}],
        "versions": HOSTILE,
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    page, parsed = page_of(run, trained)
    assert "script" not in parsed.tags and "<script" not in page and "\x07" not in page and ">49<" not in page
    assert "alert(&#39;$x$&#39;)" in page


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "metrics.jsonl",
            '{"step": 1, "loss": NaN}\n{"step": "x"}\n[]\nnothing\n{"step": 2, "evolution": 3, "lr": "a"}\n',
        ),
        ("config.yaml", "model: [\n"),
        ("result.json", '{"sparsity": [], "seconds": "long", "steps": true}'),
        ("eval.json", '{"models": 3}'),
        ("manifest.json", '{"attempts": [1, {"layout": 3, "hosts": [2], "code": 1}], "data": 3}'),
        ("topology.jsonl", '{"step": 1, "targets": {"a": [1]}}\n{"moved": 3}\nx'),
        ("layers.json", '{"targets": {"a": {"numel": -1}}}'),
        ("checkpoints/step-00000010/checkpoint.json", "{}"),
        ("checkpoints/step-00000010/rank-00000-of-00001.safetensors", "x"),
    ],
)
def test_a_damaged_file_costs_its_part_of_the_page_only(trained: Path, tmp_path: Path, name: str, text: str) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / name).write_text(text)
    page, parsed = page_of(run)
    assert set(SECTIONS) <= set(parsed.ids)
    read = read_records([run])[0]
    if name not in ("result.json", "manifest.json", "topology.jsonl"):  # these are what they say, only little
        assert any(Path(name).parts[0] in problem for problem in read.problems), read.problems
        assert Path(name).parts[0] in page[page.index('id="warnings"') : page.index('id="training"')]


def test_what_is_wrong_with_a_run_is_said(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")

    def worsen(line: dict[str, Any]) -> dict[str, Any]:
        loss = float("nan") if line["step"] == 7 else float(line["step"])
        return line | {"loss": loss, "grad_norm": 0.0, "validation": {"loss": 2.0 + (line["step"] > 5)}}

    edit_lines(run, worsen)
    result = json.loads((run / "result.json").read_text())
    result["sparsity"]["layers_off_target"] = 2
    (run / "result.json").write_text(json.dumps(result))
    found = json.loads((run / "eval.json").read_text())
    found["models"]["repaired"] |= {"perplexity": 77.0, "num_tokens": 98}
    (run / "eval.json").write_text(json.dumps(found))
    (run / "damaged-metrics.jsonl").write_text("")
    said = "\n".join(finding.text for finding in findings_of(read_records([run])) if finding.is_warning)
    for words in (
        "not finite at 1 recorded step, first at step 7",
        "best at step 1 (2.00) and is 3.00 at step 10",
        "Every recorded gradient is 0",
        "training loss rose",
        "2 targets have another number of zeros",
        "(77.0) is higher than the pruned one's (66.0)",
        "cannot be compared: num_tokens",
        "put aside: damaged-metrics.jsonl",
    ):
        assert words in said, said
    assert not [f for f in findings_of(read_records([trained])) if f.is_warning]


def test_a_method_without_deltas_has_a_page(inputs: Path, tmp_path: Path) -> None:
    run_train(make_config(inputs, tmp_path / "run", method="masked_full", seft=SeftConfig(), export=False))
    page, parsed = page_of(tmp_path / "run")
    assert "method masked_full" in page and "figure-zeros" in parsed.ids and "figure-deltas" not in parsed.ids
    assert "Nothing moved, or it was not recorded." in page


def test_a_long_run_makes_a_small_page(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    line = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9.0, "seconds": 1.0, "tokens": 9}
    lines = (json.dumps({"step": t, "loss": 1 / t + (t % 7) / 9} | line) + "\n" for t in range(1, 40_001))
    (run / "metrics.jsonl").write_text("".join(lines))
    page, _ = page_of(run)
    assert len(page) < 1_000_000


def test_the_page_is_written_beside_the_run_and_over_nothing_else(trained: Path, tmp_path: Path) -> None:
    runs = read_records([trained])
    page = tmp_path / "page.html"
    write_page(runs, page, draws=False)
    write_page(runs, page, draws=False)
    page.write_text("my own")
    with pytest.raises(ValueError, match="is no page of this program"):
        write_page(runs, page)
    with pytest.raises(ValueError, match="is a folder"):
        write_page(runs, tmp_path)
    with pytest.raises(ValueError, match="does not exist; make it"):
        write_page(runs, tmp_path / "absent" / "page.html")
    with pytest.raises(ValueError, match="given twice"):
        read_records([trained, trained / "."])
    with pytest.raises(ValueError, match="config.yaml is missing"):
        read_records([tmp_path])


def test_the_command(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    done = run_script("launch/report.py", run)
    assert done.returncode == 0 and str(run / "report.html") in done.stdout, done.stderr
    assert (run / "summary.json").exists() and (run / "figures" / "loss.svg").read_text().startswith("<?xml")
    (run / "eval.json").unlink()
    done = run_script("launch/report.py", run, trained, "--output", tmp_path / "both.html", "--figures", "false")
    assert done.returncode == 0 and "2 runs" in (tmp_path / "both.html").read_text(), done.stderr
    done = run_script("launch/report.py", "--help")
    assert "needs no network" in done.stdout and "docs/report.md" in done.stdout


def test_labels_tell_runs_apart() -> None:
    assert labels_of([Path("/a/b/run")]) == ["run"]
    assert labels_of([Path("/a/x/run"), Path("/a/y/run")]) == ["x", "y"]
    assert labels_of([Path("/a/x"), Path("/a/x/y")]) == ["x", "y"]
    assert labels_of([Path("/s/1/run"), Path("/s/1/two/run")]) == ["run", "two/run"]


def test_places_of_targets() -> None:
    assert TargetLocation.of("model.layers.11.self_attn.q_proj") == TargetLocation(11, "self_attn.q_proj")
    assert TargetLocation.of("transformer.h.3.attn.c_attn.weight") == TargetLocation(3, "attn.c_attn")
    assert TargetLocation.of("model.layers.2.mlp.experts.63.up_proj") == TargetLocation(2, "mlp.experts.*.up_proj")
    assert TargetLocation.of("lm_head") == TargetLocation(None, "lm_head")


def test_thinned_lines_keep_their_extremes() -> None:
    values = [float(i * 7919 % 1009) for i in range(10_000)]
    steps, kept = thin_out(list(range(10_000)), values, most=100)
    assert len(steps) <= 102 and max(kept) == max(values) and min(kept) == min(values)
    assert steps[0] == 0 and steps[-1] == 9999 and steps == sorted(steps)
    assert all(values[int(step)] == value for step, value in zip(steps, kept, strict=True))


def test_numbers_are_written_for_people() -> None:
    assert [decimal(x) for x in (0, 3.14159, 1234.5, 0.000123456, 3e-5, 2e9)] == [
        "0",
        "3.14",
        "1,234",
        "0.000123",
        "3e-05",
        "2e+09",
    ]
    assert decimal(float("nan")) == "not finite" and decimal(None) == "-"
    assert [duration(x) for x in (2.5, 61, 3599.9, 3600, 7199, 90061)] == (
        ["2.50 s", "1 min 1 s", "59 min 59 s", "1 h 0 min", "2 h 0 min", "25 h 1 min"]
    )
    assert [size(x) for x in (12, 1500, 2.5e9, 3e15)] == ["12 bytes", "1.50 kB", "2.50 GB", "3,000 TB"]
    assert model_name("/m/wanda60/model/") == "wanda60/model" and model_name("org/name") == "name"
    assert spread_out(list(range(100)), 3) == [0, 50, 99] and spread_out([1, 2], 3) == [1, 2]


@pytest.mark.slow
def test_a_browser_shows_it_without_complaint(trained: Path, tmp_path: Path) -> None:
    if CHROMIUM is None:
        message = "Chromium is not installed (apt-get install chromium)"
        pytest.fail(message) if "CI" in os.environ else pytest.skip(message)
    other = shutil.copytree(trained, tmp_path / "other")
    pages = {"one": [trained], "two": [trained, other]}
    drawn = """[...document.querySelectorAll('figure')].map(figure => {
        const box = figure.querySelector('svg.drawing').getBoundingClientRect();
        return [figure.id, box.width, box.height]})"""
    with Browser() as browser:
        for name, runs in pages.items():
            page = tmp_path / f"{name}.html"
            write_page(read_records(runs), page)
            backgrounds = set()
            for width, dark in ((390, False), (390, True), (1280, False), (1280, True)):
                browser.open(page, width=width, dark=dark, is_phone=width < 600)
                assert browser.ask("document.documentElement.scrollWidth") <= width
                figures = browser.ask(drawn)
                assert {f"figure-{figure}" for figure in FIGURES} <= {figure for figure, _, _ in figures}
                assert all(w > 250 and h > 60 for _, w, h in figures), figures
                texts = "[...document.querySelectorAll('svg.drawing text')].map(t => getComputedStyle(t).fill)"
                backgrounds.add(
                    (browser.ask("getComputedStyle(document.body).backgroundColor"), *set(browser.ask(texts)))
                )
                browser.screenshot(tmp_path / "shot.png")
                assert (tmp_path / "shot.png").read_bytes().startswith(b"\x89PNG")
            assert len(backgrounds) == 2, backgrounds  # light and dark, paper and ink
            browser.pdf(tmp_path / "page.pdf")
            assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
        hidden = "getComputedStyle(document.querySelector('#figure-loss .of-run-1')).display"
        assert browser.ask(hidden) == "inline"
        browser.ask("document.querySelector('.show-1').click()")
        assert browser.ask(hidden) == "none"
        assert browser.complaints == []


def test_a_misspelled_option_gets_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["seft report", "runs/a", "--outptu", "a.html"])
    with pytest.raises(SystemExit) as ended:
        report_command.main()
    assert ended.value.code == 2 and "Did you mean --output" in capsys.readouterr().err
