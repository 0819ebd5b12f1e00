"""What a user gets from the wheel: both packages, their data, and the C++ side of llama.cpp."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel_contents(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name in (
        "longrope_export/rope.py",
        "longrope_export/py.typed",
        "longrope_export/_cpp/CMakeLists.txt",
        "longrope_export/_cpp/cpp_patch/series",
        "longrope_export/_cpp/cpp_patch/apply.cmake",
        "longrope_converters/py.typed",
        "longrope_converters/to_gguf/pre_tokenizers.json",
    ):
        assert name in names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "longrope_export",
        "longrope_converters",
    }
