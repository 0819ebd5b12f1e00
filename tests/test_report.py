"""report: the page in a real browser, hostile input, plots, the model card as a hub reads it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_onnx import export, make_source, three_tiers
from tiny_models import add_bpe_tokenizer

from longrope_export.cli import main
from longrope_export.definition import dump_factors
from longrope_export.factor_files import read_factors
from longrope_export.ladder import make_config
from longrope_export.models.model import load_model
from longrope_export.report.drawing import inline_svg
from longrope_export.report.figures import make_plots
from longrope_export.report.inputs import ReportInputs, read_inputs
from longrope_export.report.model_card import make_model_card
from longrope_export.report.sections import how_to_run

HOSTILE = '<script>document.title="owned"</script><img src="http://example.com/x.png">&"\''
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)  # fmt: skip
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# the size of every plot, and whether the page is wider than the window
MEASURE = """<script>addEventListener("load", () => {
  const box = e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
  const found = {
    plots: [...document.querySelectorAll("figure.plot > svg")].map(box),
    drawn: [...document.querySelectorAll("figure.plot > svg")].map(s => s.querySelectorAll("path, use").length),
    width: document.documentElement.scrollWidth, window: innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
    axis: getComputedStyle(document.querySelector("figure.plot svg text")).fill,
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
  };
  const pre = document.createElement("pre");
  pre.id = "measured"; pre.textContent = JSON.stringify(found); document.body.append(pre);
});</script>"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results.json, certificate.json, f.json and a search run, by our own commands at toy size."""
    folder = tmp_path_factory.mktemp("report")
    source = make_source(folder / "m")
    add_bpe_tokenizer(source)
    config = three_tiers(source)
    (folder / "f.json").write_text(dump_factors(config))
    for method in ("pi", "yarn"):
        made = make_config(load_model(source), method, 1024)
        (folder / f"{method}.json").write_text(dump_factors(made))
    export(source, config, folder / "m-onnx")
    (folder / "help.txt").write_text(
        "Every file must hold the same numbers. One, two, three. " * 80
    )
    words = [
        "evaluate",
        "m",
        "--factors",
        "pi.json",
        "--factors",
        "yarn.json",
        "--text",
        "help.txt",
    ]
    words += ["--lengths", "512,800", "--passkey", "--needle", "--depths", "0,1"]
    words += ["--keys", "1", "--values", "1"]
    run(folder, *words, "-o", "results.json")
    run(folder, "verify", "m", "m-onnx", "--factors", "f.json", "--length", "100", "-o", "certificate.json")  # fmt: skip
    words = [
        "search",
        "m",
        "--target-length",
        "512",
        "--text",
        "help.txt",
        "-o",
        str(folder / "run"),
    ]
    words += ["--documents", "1,1,1", "--population", "4", "--iterations", "1", "--against", "yarn"]
    run(folder, *words, "--switch", "causal")
    return folder


def run(folder: Path, *words: str, code: int = 0) -> Any:
    """A command with paths below a folder."""
    new = ("results.json", "certificate.json", "report.html", "plots", "README.md")
    inside = [str(folder / w) if w in new or (folder / w).exists() else w for w in words]
    result = CliRunner().invoke(main, inside)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def page(root: Path) -> Path:
    inputs = ("results.json", "certificate.json", "f.json", "run")
    run(root, "report", *inputs, "-o", "report.html", "--title", f"Toy {HOSTILE}")
    return root / "report.html"


@pytest.fixture
def open_page(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str, str]]:
    """Opens a page in Chromium: what MEASURE finds, the console, and the network log."""
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")

    def opened(path: Path, *flags: str, measured: bool = True) -> tuple[dict[str, Any], str, str]:
        shown = tmp_path / "page.html"
        text = path.read_text()
        if measured:  # the page itself has no script, and forbids any
            text = re.sub(r"<meta http-equiv[^>]*>", "", text).replace(
                "</body>", MEASURE + "</body>"
            )
        shown.write_text(text)
        log = tmp_path / "net.json"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags]
        command += [
            f"--log-net-log={log}",
            "--enable-logging=stderr",
            "--log-level=0",
            "--dump-dom",
            shown.as_uri(),
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr[-2000:]
        found = re.search(r'<pre id="measured">(.*?)</pre>', result.stdout, re.DOTALL)
        values = json.loads(found[1].replace("&lt;", "<").replace("&amp;", "&")) if found else {}
        return values, result.stderr, log.read_text() if log.is_file() else ""

    return opened


def requests_of(log: str) -> set[str]:
    """Addresses that a page asked for, in Chromium's network log; its own have no initiator."""
    events = [event.get("params", {}) for event in json.loads(log)["events"]]
    asked = [p["url"] for p in events if p.get("initiator", "not an origin") != "not an origin"]
    return {url for url in asked if not url.startswith(("file:", "data:"))}


def test_the_page_in_a_browser(page: Path, root: Path, open_page: Any) -> None:
    inputs = [root / name for name in ("results.json", "certificate.json", "f.json", "run")]
    plots = make_plots(read_inputs(inputs))
    sections = {plot.section for plot in plots}
    assert sections == {"wavelengths", "search", "perplexity", "needles", "parity"}
    values, console, log = open_page(page)
    assert "CONSOLE" not in console
    assert log and not requests_of(log)
    assert len(values["plots"]) == len(plots) > 10
    assert all(width > 200 and height > 100 for width, height in values["plots"])
    assert all(count > 5 for count in values["drawn"])
    assert len(set(values["ids"])) == len(values["ids"])
    # as it is delivered, without our measuring: nothing to complain about either
    _, console, log = open_page(page, measured=False)
    assert "CONSOLE" not in console and not requests_of(log)


def test_the_tests_above_would_see_requests_and_errors(
    page: Path, tmp_path: Path, open_page: Any
) -> None:
    bad = tmp_path / "bad.html"
    wrong = '<img src="http://127.0.0.1:9/x.png"><script>nothing();</script></main>'
    bad.write_text(page.read_text().replace("</main>", wrong))
    _, console, log = open_page(bad)
    assert requests_of(log) == {"http://127.0.0.1:9/x.png"}
    assert "ReferenceError: nothing is not defined" in console
    _, console, log = open_page(bad, measured=False)  # the page's own policy stops both
    assert not requests_of(log) and console.count("CONSOLE") == 2


def test_closed_details_are_on_paper(page: Path, tmp_path: Path) -> None:
    """As many pages as with open ones."""
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    closed = re.sub("(<details>.*?</details>)", r"\1" * 30, page.read_text(), flags=re.DOTALL)
    pages = []
    for text in (closed, closed.replace("<details>", "<details open>")):
        shown, printed = tmp_path / "page.html", tmp_path / "page.pdf"
        shown.write_text(text)
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
        command += [f"--print-to-pdf={printed}", shown.as_uri()]
        subprocess.run(command, capture_output=True, check=True, timeout=120)
        pages.append(len(re.findall(rb"/Type /Page\b", printed.read_bytes())))
    assert pages[0] == pages[1] > 10


def test_dark_and_narrow(page: Path, tmp_path: Path, open_page: Any) -> None:
    light, _, _ = open_page(page, "--blink-settings=preferredColorScheme=1")
    dark, _, _ = open_page(page, "--blink-settings=preferredColorScheme=0")
    assert light["background"] == "rgb(255, 255, 255)" and light["axis"] == "rgb(29, 35, 42)"
    assert dark["background"] == "rgb(20, 24, 28)" and dark["axis"] == "rgb(228, 232, 236)"
    assert light["width"] <= light["window"]
    # a window of Chromium is never narrower than 500: a frame is
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    (tmp_path / "inner.html").write_text(text)
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<body><iframe src="inner.html" style="width:390px;height:4000px"></iframe><script>'
        'addEventListener("load", () => { const inside = frames[0].document.documentElement;'
        'const pre = document.createElement("pre"); pre.id = "measured";'
        "pre.textContent = JSON.stringify({width: inside.scrollWidth});"
        "document.body.append(pre); });</script></body>"
    )
    shutil.copy(tmp_path / "inner.html", tmp_path / "page.html")
    values, _, _ = open_page(frame, "--allow-file-access-from-files", measured=False)
    assert values["width"] <= 390


def test_what_comes_from_files_is_text(root: Path, tmp_path: Path, open_page: Any) -> None:
    results = json.loads((root / "results.json").read_text())
    for model in results["models"]:
        old, model["label"] = model["label"], f"{model['label']} {HOSTILE}"
        for cell in results["cells"]:
            if cell["model"] == old:
                cell["model"] = model["label"]
    for holder, name in ((results, "tool"), (results, "platform"), (results["texts"][0], "name")):
        holder[name] = HOSTILE
    results["models"][0] |= {"note": HOSTILE, "runtime_name": "llama.cpp", "path": HOSTILE}
    results["models"][1]["config"]["provenance"] = {"method": HOSTILE}
    certificate = json.loads((root / "certificate.json").read_text())
    certificate["exports"][0]["runtime"] = HOSTILE
    certificate["exports"][0]["problems"] = [HOSTILE]
    certificate["reference"]["path"] = HOSTILE
    for name, values in (("results.json", results), ("certificate.json", certificate)):
        (tmp_path / name).write_text(json.dumps(values))
    search = tmp_path / "run"
    shutil.copytree(root / "run", search)
    found = json.loads((search / "result.json").read_text())
    found |= {"chosen": HOSTILE, "held_out": HOSTILE, "seeds": {HOSTILE: 3.0}}
    found["test"][0]["name"] = found["history"][0]["phase"] = HOSTILE
    (search / "result.json").write_text(json.dumps(found))
    outputs = ("-o", "report.html", "--model-card", "README.md")
    run(tmp_path, "report", "results.json", "certificate.json", "run", *outputs, "--title", HOSTILE)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and "<img" not in text and text.count("&lt;script&gt;") > 10
    values, console, log = open_page(tmp_path / "report.html")
    assert values["plots"] and "CONSOLE" not in console and not requests_of(log)
    card = (tmp_path / "README.md").read_text()
    assert card.split("---\n")[2].startswith("\n# \\<script\\>")


@pytest.mark.parametrize("label", [r"m $\bad$", "a$_$b", "one $"])
def test_dollars_are_no_mathematics(root: Path, label: str) -> None:
    results = json.loads((root / "results.json").read_text())
    for cell in results["cells"]:
        if cell["model"] == "m":
            cell["model"] = label
    results["models"][0]["label"] = label
    plots = {p.name: p for p in make_plots(ReportInputs(results=[("r", results)]))}
    for name in ("perplexity-1", "position-512-1", "multikey-1"):
        assert f">{label}</text>" in inline_svg(plots[name])


def test_plots_as_files(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plots"
    run(root, "report", "results.json", "certificate.json", "--plots", str(folder))
    names = {file.name for file in folder.iterdir()}
    assert {"perplexity-1.png", "perplexity-1.svg", "passkey-1-2.png", "parity-1.svg"} <= names
    for file in folder.iterdir():
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")
        assert len(content) > 4000


def test_what_report_did_not_write_is_not_replaced(root: Path, tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    outputs = {
        "-o": tmp_path / "report.html",
        "--model-card": tmp_path / "README.md",
        "--plots": tmp_path / "plots",
    }
    files = [tmp_path / "report.html", tmp_path / "README.md"]
    files += [tmp_path / "plots" / f"perplexity-1.{suffix}" for suffix in ("png", "svg")]
    for file in files:
        file.write_text("# Somebody's project")
        words = [str(word) for option in outputs.items() for word in option]
        result = run(root, "report", "results.json", *words, code=2)
        assert "`report` did not write it" in result.output and "--force" in result.output
        assert file.read_text() == "# Somebody's project"
        assert sum(other.exists() for other in files) == 1
        file.unlink()
    notes = tmp_path / "plots" / "notes.txt"
    notes.write_text("kept")
    files[1].write_text("# Somebody's project")
    run(root, "report", "results.json", *words, "--force")
    run(root, "report", "results.json", *words)  # its own are replaced
    assert all(file.is_file() for file in files) and notes.read_text() == "kept"


def test_what_the_report_says_to_run_runs(root: Path, tmp_path: Path) -> None:
    models = json.loads((root / "results.json").read_text())["models"]
    labels = ["m + pi", "m + yarn"]
    lines = [how_to_run(model) for model in models if model["label"] in labels]
    for name, line in zip(("pi", "yarn"), lines, strict=True):
        assert f'"{root / name}.json"' in line
    remote = ("--factors", str(root / "yarn.json"), "--remote-code", "-o", str(tmp_path / "remote"))
    made = CliRunner().invoke(main, ["safetensors", str(root / "m"), *remote])
    assert made.exit_code == 0, made.output
    export = {
        "runtime_name": "transformers-remote",
        "path": str(tmp_path / "remote"),
        "config": None,
    }
    gguf, baked = tmp_path / "plain.gguf", tmp_path / "baked.gguf"
    for output, options in ((gguf, ()), (baked, ("--factors", str(root / "yarn.json")))):
        words = ["gguf", str(root / "m"), "-o", str(output), *options]
        words += ["--outtype", "f32", "--pre", "gpt-2"]
        made = CliRunner().invoke(main, words)
        assert made.exit_code == 0, made.output
    live = {"runtime_name": "transformers", "config": None, "note": None}
    files = [
        {**live, "path": str(gguf), "factors": str(root / "pi.json")},
        {**live, "path": str(baked), "factors": None},
    ]
    for line in (*lines, how_to_run(export), *map(how_to_run, files)):
        exec(line, {})


def test_a_hub_reads_the_model_card(root: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = tmp_path / "README.md"
    words = ("--base-model", "owner/model", "--license", "apache-2.0", "--title", "Toy: 1k")
    run(root, "report", "results.json", "certificate.json", "--model-card", str(card), "--plots", str(tmp_path / "plots"), *words)  # fmt: skip
    data = hub.ModelCard.load(card).data
    assert data.license == "apache-2.0" and data.base_model == "owner/model"
    assert {"longrope", "long-context"} <= set(data.tags)
    results = json.loads((root / "results.json").read_text())
    expected = {
        round(cell["perplexity"], 4) for cell in results["cells"] if cell["task"] == "perplexity"
    }
    raw = hub.metadata_load(card)
    metrics = [m for entry in raw["model-index"] for r in entry["results"] for m in r["metrics"]]
    assert {m["value"] for m in metrics if m["type"] == "perplexity"} == expected
    assert len(raw["model-index"]) == 3
    text = card.read_text()
    assert "## Numerical parity" in text and "## How to run it" in text and "OnnxModel" in text
    for image in re.findall(r"!\[[^]]*\]\((\S+)\)", text):
        assert (tmp_path / image).is_file()


@pytest.mark.parametrize(
    ("names", "library", "tags"),
    [
        (("transformers", "transformers-stock"), True, set()),
        (("transformers", "server"), False, set()),
        (("server",), False, set()),
        (("llama.cpp-stock", "genai", "transformers"), False, {"gguf", "onnx"}),
    ],
)
def test_a_card_names_the_library_that_runs_all(
    names: tuple[str, ...], library: bool, tags: set[str]
) -> None:
    results = {"models": [{"runtime_name": n, "label": n, "config": None, "path": n, "note": "x"} for n in names], "cells": []}  # fmt: skip
    lines = make_model_card(ReportInputs(results=[("r", results)]), "toy").splitlines()
    assert ("library_name: transformers" in lines) == library
    assert {line[2:] for line in lines if line in ("- gguf", "- onnx")} == tags


@pytest.mark.parametrize(
    ("change", "shown"),
    [({"provenance": {"method": "other"}}, 1), ({"rope_theta": 5e5}, 2), ({"layers": (1,)}, 2)],
)
def test_definitions_are_shown_once_each(root: Path, change: dict[str, Any], shown: int) -> None:
    config = read_factors(root / "f.json", None)
    inputs = ReportInputs(factors=[("one", config), ("other", replace(config, **change))])
    assert len(inputs.configs()) == shown


def test_a_plot_with_a_space_in_its_path_is_a_link() -> None:
    card = make_model_card(ReportInputs(), "toy", images=["my plots/a (1).png"])
    assert "](my%20plots/a%20%281%29.png)" in card


def test_wrong_inputs(root: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": "other"}')
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "list.json").write_text("[1]")
    damaged = json.loads((root / "results.json").read_text())
    del damaged["models"][0]["label"]
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    damaged = json.loads((root / "results.json").read_text())
    del damaged["cells"][0]["stretches"][0][3], damaged["cells"][1]["digits"]
    (tmp_path / "cells.json").write_text(json.dumps(damaged))
    damaged = json.loads((root / "certificate.json").read_text())
    damaged["exports"][0]["cases"][0]["rows"][0] = ["x", 1, 2, 3]
    (tmp_path / "rows.json").write_text(json.dumps(damaged))
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("x.json", "its format is 'other'"),
        ("text.json", "cannot be read as JSON"),
        ("list.json", "its format is 'list'"),
        ("damaged.json", "damaged: KeyError('label')"),
        ("cells.json", "damaged: ValueError"),
        ("rows.json", "damaged: ValueError"),
        ("empty", "no search or fine-tune"),
    ):
        result = run(tmp_path, "report", name, "-o", "report.html", code=2)
        assert said in result.output, result.output
    assert not (tmp_path / "report.html").exists()
    assert "nothing to write" in run(root, "report", "f.json", code=2).output
    words = ("-o", "report.html", "--license", "mit")
    assert "--model-card" in run(root, "report", "f.json", *words, code=2).output
    before = (root / "f.json").read_bytes()
    run(root, "report", "f.json", "-o", str(root / "f.json"), code=2)
    assert (root / "f.json").read_bytes() == before
    result = run(
        root, "report", "f.json", "-o", "report.html", "--model-card", "report.html", code=2
    )
    assert "-o and --model-card both name" in result.output
    result = run(root, "report", "f.json", "--plots", "/proc/plots", code=2)
    assert "--plots /proc/plots: cannot make this folder" in result.output
