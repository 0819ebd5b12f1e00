"""The table of what runtimes honour, against the sources that decide."""

import re
from dataclasses import replace
from pathlib import Path

from tiny_models import edit_json, make_model

from longrope_converters.to_onnx.families import DESCRIBE
from longrope_export.config import SwitchPolicy
from longrope_export.honours import ONNX_FAMILIES, PATCHED_ARCHITECTURES, Verdict, honours
from longrope_export.ladder import make_config
from longrope_export.models.model import load_model

ROOT = Path(__file__).parent.parent


def test_patched_architectures_are_those_of_the_patch() -> None:
    code = (ROOT / "cpp_patch" / "src" / "llama-longrope.cpp").read_text()
    switch = code[code.index("bool is_supported(") :]
    names = re.findall(r"case LLM_ARCH_(\w+):", switch[: switch.index("default:")])
    assert {name.lower().replace("granite_moe", "granitemoe") for name in names} == (
        PATCHED_ARCHITECTURES
    )


def test_onnx_families_are_those_of_the_exporter() -> None:
    assert set(DESCRIBE) == ONNX_FAMILIES


def test_onnx_runtimes(tmp_path: Path) -> None:
    """Measured in test_onnx.py, test_onnx_genai.py and integration/test_genai_builder.py."""
    model = load_model(make_model(tmp_path / "mistral", "mistral"))
    causal = make_config(model, "yarn", 1024, ladder="256,512,1024", num_start_tokens=4)
    cells = honours(causal, model)
    assert {cell.verdict for cell in cells["ONNX Runtime, our runner"].values()} == {Verdict.YES}
    genai = cells["onnxruntime-genai"]
    assert genai["switch"].verdict is Verdict.NO
    assert genai["middle_tiers"].verdict is Verdict.PARTLY
    assert genai["num_start_tokens"].verdict is Verdict.YES
    builder = cells["onnxruntime-genai's builder"]
    assert {cell.note for cell in builder.values()} == {"refuses the family with factors"}
    pinned = honours(replace(causal, switch=SwitchPolicy.SEQUENCE), model)["onnxruntime-genai"]
    assert pinned["switch"].verdict is Verdict.YES
    one = honours(make_config(model, "yarn", 1024), model)["onnxruntime-genai"]
    assert {cell.verdict for cell in one.values()} == {Verdict.YES}
    mixtral = load_model(make_model(tmp_path / "mixtral", "mixtral"))
    refused = honours(causal, mixtral)["onnxruntime-genai"]
    assert {cell.verdict for cell in refused.values()} == {Verdict.NO}


def test_what_llama_cpp_makes_of_an_unknown_family_is_left_open(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "apertus")
    edit_json(folder / "config.json", architectures=["ApertusForCausalLM"], model_type="apertus")
    model = load_model(folder)
    cells = honours(make_config(model, "yarn", 1024), model)
    for runtime in ("llama.cpp", "llama.cpp, patched"):
        assert {cell.verdict for cell in cells[runtime].values()} == {Verdict.PARTLY}
        assert all("llama.cpp's converter" in cell.note for cell in cells[runtime].values())
