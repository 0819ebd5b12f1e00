"""Write docs/longrope-factors.schema.json from the code: python scripts/update_schema.py."""

import json
from pathlib import Path

from longrope_export.schema import factors_schema

OUTPUT = Path(__file__).parent.parent / "docs" / "longrope-factors.schema.json"

if __name__ == "__main__":
    OUTPUT.write_text(json.dumps(factors_schema(), indent=2) + "\n", encoding="utf-8")
    print(OUTPUT)
