"""What a plan may say, what is filled in, and that all that is wrong is told at once."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from longrope_export.cli import main
from longrope_export.cli.extend import read_commands
from longrope_export.errors import ConfigError
from longrope_export.finetune.plan import load_plan, parse_plan
from longrope_export.finetune.resolve import resolve
from longrope_export.finetune.stages import Step
from longrope_export.finetune.toml_files import shipped_names
from longrope_export.models.model import load_model

PLAN = """
[texts]
books = ["books"]

[[stage]]
name = "yarn"
run = "factors"
method = "yarn"
target-length = 1024
[[stage]]
name = "search-1k"
run = "search"
text = "books"
target-length = 1024
no-refine = false
budget-tokens = 1e6
[[stage]]
run = "finetune"
text = ["books/a.txt"]
steps = 10
processes = 2
[[stage]]
run = "recover"
text = "books"
recover = "128,256"
[[stage]]
name = "extended"
run = "safetensors"
remote-code = true
[[stage]]
run = "gguf"
[[stage]]
run = "verify"
[[stage]]
run = "evaluate"
models = ["source", "transformers=extended"]
factors = ["yarn", "search-1k"]
text = "books"
perplexity = false
[[stage]]
run = "report"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf_config: Callable[..., Path]) -> Path:
    """The current folder: model/ and books/; a command finetune; every package installed."""
    hf_config("model")
    (tmp_path / "books").mkdir()
    for name in ("a", "b"):
        (tmp_path / "books" / f"{name}.txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    return tmp_path


def steps_of(text: str, **given: Any) -> list[Step]:
    model = load_model(Path("model"))
    return resolve(parse_plan(text, "plan.toml"), model, Path("run"), read_commands(), **given)


def test_every_stage_becomes_a_command_with_what_the_plan_leaves_open(place: Path) -> None:
    found = {step.stage.name: " ".join(step.words) for step in steps_of(PLAN)}
    tuned, recovered = "run/03-finetune/finetune", "run/04-recover/recover/factors.json"
    extended, searched = "run/05-extended/extended", "run/02-search-1k/search-1k"
    assert found == {
        "yarn": "longrope-export factors yarn model --target-length 1024 -o run/01-yarn/yarn.json",
        "search-1k": "longrope-export search model --text books --target-length 1024 "
        f"--budget-tokens 1000000.0 -o {searched}",
        "finetune": "torchrun --standalone --nproc-per-node=2 -m longrope_export finetune model "
        f"--text books/a.txt --steps 10 --factors {searched}/factors.json -o {tuned}",
        "recover": f"longrope-export search {tuned}/model --text books --recover 128,256 "
        "--target-length 1024 -o run/04-recover/recover",
        "extended": f"longrope-export safetensors {tuned}/model --remote-code --factors {recovered} "
        f"-o {extended}",
        "gguf": f"longrope-export gguf {tuned}/model --factors {recovered} -o run/06-gguf/gguf.gguf",
        "verify": f"longrope-export verify {tuned}/model {extended} run/06-gguf/gguf.gguf "
        f"--factors {recovered} -o run/07-verify/verify.json",
        "evaluate": f"longrope-export evaluate model transformers={extended} "
        f"--factors run/01-yarn/yarn.json --factors {searched}/factors.json "
        "--text books/a.txt --text books/b.txt --no-perplexity -o run/08-evaluate/evaluate.json",
        "report": f"longrope-export report run/01-yarn/yarn.json {searched} run/03-finetune/finetune "
            "run/04-recover/recover "
        "run/07-verify/verify.json run/08-evaluate/evaluate.json -o run/09-report/report.html "
        "--model-card run/09-report/README.md --plots run/09-report/plots",
    }  # fmt: skip
    steps = {step.stage.name: step for step in steps_of(PLAN)}
    assert steps["finetune"].after == ("search-1k",)
    assert steps["verify"].after == ("recover", "finetune", "extended", "gguf")
    assert steps["recover"].values["documents"] == "0,3,3"
    assert steps["gguf"].reach == 1024
    assert not list(place.glob("run"))


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        ('run = "serch"', "'serch' is no kind of stage; did you mean search?"),
        ('run = "search"\ntext = "books"', "stage 1, search: needs target-length"),
        ('run = "search"\ntarget-lenght = 5', "target-lenght is no key of it; did you mean target-"),
        ('run = "search"\ntext = "books"\ntarget-length = "long"', "target-length: 'long' is not a"),
        ('run = "search"\ntext = "book"\ntarget-length = 5', "no list 'book' in [texts]; did you"),
        ('run = "search"\ntext = ["x"]\ntarget-length = 5', "text: no such file or folder: x"),
        ('run = "search"\ntext = [5]\ntarget-length = 5', "text: expected paths, got 5"),
        ('run = "search"\nresume = true', "resume is filled in by the runner"),
        ('run = "search"\nseed = [1, 2]', "seed: takes one value, got the list"),
        ('run = "search"\nseed = true', "seed: expected text or a number, got True"),
        ('run = "search"\nno-refine = 1', "no-refine: is a flag: expected true or false, got 1"),
        ('run = "search"\nalgorithm = "best"', "algorithm: 'best' is not one of"),
        ('run = "search"\nmodel = "other"', "model: 'other' is no stage before that makes a model"),
        ('run = "factors"\ntarget-length = 5', "needs method"),
        ('run = "factors"\nmethod = "yarm"', "method: 'yarm' is not one of"),
        ('run = "finetune"\ntext = "books"', "factors: no stage before makes any"),
        ('run = "finetune"\ntext = "books"\nfactors = "none"', "neither a stage before nor a file"),
        ('run = "finetune"\nprocesses = 0', "processes: expected a whole number from 1 on, got 0"),
        ('run = "gguf"\nfactors = "gguf"', "factors: stage gguf does not come before"),
        ('run = "gguf"\nin-place = true', "in-place is filled in by the runner"),
        ('run = "recover"\ntext = "books"', "recovers short lengths of an extended model"),
        ('run = "verify"', "exports: none are given, and no stage before makes what fits"),
        ('run = "evaluate"', "needs text, or tasks"),
        ('run = "evaluate"\ntext = "books"\nmodels = ["extendet"]', "'extendet' is neither a stage"),
        ('run = "evaluate"\ntext = "books"\nmodels = "source"', "models: expected a list of names"),
        ('run = "report"', "inputs: none are given"),
        ('name = "a b"\nrun = "report"', "name 'a b': expected letters, digits"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(place: Path, stage: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        steps_of(f'[texts]\nbooks = ["books"]\n[[stage]]\n{stage}\n')
    assert problem in str(caught.value)


def test_all_problems_are_told_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else True)
    text = PLAN.replace('text = "books"\nrecover', 'text = ["gone"]\nrecover')
    text = text.replace("steps = 10", 'steps = "ten"')
    with pytest.raises(ConfigError) as caught:
        steps_of(text)
    message = str(caught.value)
    assert "4 problems" in message
    assert "stage 3, finetune: steps: 'ten' is not a valid integer" in message
    assert "stage 4, recover: text: no such file or folder: gone" in message
    assert message.count("needs scipy: pip install 'longrope-export[search]'") == 2
    # texts and packages may come later than a dry run
    assert len(steps_of(text.replace('"ten"', "10"), dry=True)) == 9


def test_factors_that_are_not_in_the_model_are_not_taken_for_it(place: Path) -> None:
    again = '[[stage]]\nname = "2k"\nrun = "search"\ntext = "books"\ntarget-length = 2048\n'
    text = PLAN.partition('[[stage]]\nrun = "recover"')[0] + again
    recover = '[[stage]]\nrun = "recover"\ntext = "books"\nrecover = "128"\n'
    evaluate = '[[stage]]\nrun = "evaluate"\ntext = "books"\n'
    with pytest.raises(ConfigError) as caught:
        steps_of(text + recover + evaluate)
    assert "the factors of finetune, not those of 2k" in str(caught.value)
    assert "bake them in by a stage" in str(caught.value)
    baked = text + '[[stage]]\nname = "long"\nrun = "safetensors"\n'
    steps = steps_of(baked + recover + 'model = "long"\n' + evaluate + 'models = ["long"]\n')
    words = " ".join(steps[-2].words)
    assert "search run/05-long/long --text books --recover 128 --target-length 2048" in words
    plain = text.replace('[[stage]]\nname = "2k"', '[[stage]]\nmodel = "source"\nname = "2k"')
    last = steps_of(plain + evaluate + 'model = "source"\n')[-1]
    assert "evaluate model --factors" not in " ".join(last.words[:2])
    assert "run/04-2k/2k/factors.json" in last.words


@pytest.mark.parametrize("tier", ['"512=lam.csv"', '["512=lam.csv"]'])
def test_the_file_of_a_tier_is_what_its_stage_depends_on(place: Path, tier: str) -> None:
    with pytest.raises(ConfigError, match=r"expected LENGTH=FILE.csv, got no file lam.csv"):
        steps_of(f'[[stage]]\nrun = "gguf"\ntier = {tier}\n')
    Path("lam.csv").touch()
    step = steps_of(f'[[stage]]\nrun = "gguf"\ntier = {tier}\n')[0]
    assert step.files == {"tier 512=lam.csv": Path("lam.csv")}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ('recipe = "poes-lora"', "did you mean pose-lora?"),
        ("window = 2048", "its rows have 2048 positions, the factors reach 1024"),
        ('recipe = "own.toml"', "its rows have 4096 positions, the factors reach 1024"),
    ],
)
def test_a_recipe_is_read_before_anything_runs(place: Path, keys: str, problem: str) -> None:
    Path("own.toml").write_text('source = "us"\nreproduces = ""\nsteps = 1\nwindow = 4096\n')
    assert steps_of(PLAN.replace("steps = 10", 'recipe = "own.toml"\nwindow = 1024'))
    with pytest.raises(ConfigError) as caught:
        steps_of(PLAN.replace("steps = 10", keys))
    assert problem in str(caught.value)


def test_factors_may_be_a_file(place: Path) -> None:
    made = CliRunner().invoke(
        main, ["factors", "yarn", "model", "--target-length", "512", "-o", "f.json"]
    )
    assert made.exit_code == 0
    step = steps_of('[[stage]]\nrun = "gguf"\nfactors = "f.json"\n')[0]
    assert step.files == {"factors f.json": Path("f.json")}
    assert step.reach == 512
    twice = 'run = "evaluate"\ntext = ["books/a.txt"]\nfactors = ["f.json", "other/f.json"]\n'
    Path("other").mkdir()
    Path("other/f.json").write_text(Path("f.json").read_text())
    with pytest.raises(ConfigError, match="two files are called f"):
        steps_of(f"[[stage]]\n{twice}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("stage = 5", "stage is no list of tables"),
        ("[text]\na = []", "unknown key text; did you mean texts?"),
        ("", "no stage: write at least one"),
        ('[texts]\na = "books"\n[[stage]]\nrun = "report"', "texts.a: expected a list of paths"),
        ("[[stage]\n", "not TOML"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_plan(text, "plan.toml")
    assert problem in str(caught.value)


def test_two_stages_of_one_name_are_refused_and_unnamed_ones_get_numbers(place: Path) -> None:
    stage = '[[stage]]\nrun = "gguf"\n'
    assert [step.stage.name for step in steps_of(stage * 2)] == ["gguf-1", "gguf-2"]
    with pytest.raises(ConfigError, match="another stage before is called a too"):
        steps_of((stage + 'name = "a"\n') * 2)


@pytest.mark.parametrize("name", shipped_names("plans"))
def test_shipped_plans_fit_the_commands(place: Path, name: str) -> None:
    model = load_model(Path("model"))
    steps = resolve(load_plan(name), model, Path("run"), read_commands(), dry=True)
    kinds = [step.stage.kind for step in steps]
    assert kinds[-1] == "report"
    for kind in ("search", "finetune", "recover", "safetensors", "verify", "evaluate"):
        assert kind in kinds
    verify = next(step for step in steps if step.stage.kind == "verify")
    assert "extended" in verify.after
    assert "long" not in verify.after
    result = CliRunner().invoke(main, ["extend", "model", name, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["stages"]) == len(steps)


def test_an_unknown_plan_is_refused(place: Path) -> None:
    result = CliRunner().invoke(main, ["extend", "model", "longrope-llama", "--dry-run"])
    assert result.exit_code == 2
    assert "no such file, and none of longrope-llama2, longrope-mistral, small" in result.output


def test_a_dry_run_shows_commands_and_costs_and_writes_nothing(place: Path) -> None:
    more = 'steps = 10\nbatch-size = 2\nlora = 0\nlayout = "packed"'
    Path("plan.toml").write_text(PLAN.replace("steps = 10", more))
    arguments = ["extend", "model", "plan.toml", "-o", "run", "--dry-run"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    assert "\nlongrope-export search model --text books --target-length 1024" in shown.stdout
    result = CliRunner().invoke(
        main, [*arguments, "--json", "--hardware", "2xa100-80gb", "--utilization", "0.5"]
    )
    values = json.loads(result.stdout)
    stages = {stage["name"]: stage for stage in values["stages"]}
    assert stages["finetune"]["training_tokens"] == 10 * 2 * 1024
    assert stages["finetune"]["memory_bytes"] > 16 * values["parameters"]
    # the budget, and choosing and reporting: 7 configs, 7 shown, both rules twice, the choice once more,
    # three documents
    assert stages["search-1k"]["forward_tokens"] == 10**6 + (7 + 7 + 4 + 7) * 3 * 1024
    assert stages["gguf"]["device_hours"] == 0
    assert values["hours"] == values["device_hours"] / 2
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give -o"),
        (["--dry-run", "--hardware", "a100"], "expected NAME or NxNAME"),
        (["--dry-run", "--utilization", "2"], "expected a share above 0"),
        (["-o", "run", "--hardware", "h100"], "--hardware belongs to --dry-run"),
        (["-o", "model/run"], "lies in the model"),
    ],
)
def test_bad_options_are_one_clear_error(place: Path, more: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["extend", "model", "small", *more])
    assert result.exit_code == 2
    assert message in result.output
