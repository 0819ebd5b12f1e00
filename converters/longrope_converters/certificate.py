"""Put a certificate of `verify` into the export that it is about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope_converters.to_gguf.bake import HeaderEdit, bake_gguf
from longrope_export.gguf_format import read_header
from longrope_export.gguf_values import ValueType, make_key_value
from longrope_export.outputs import replace_when_done, write_text
from longrope_export.verify.certificate import FILE_NAME, GGUF_KEY, without_rows


def embed_certificate(export: Path, certificate: Mapping[str, Any]) -> None:
    """As a key of a GGUF, or as a file in a folder; a certificate that is there is replaced.

    What the export computes, and its content hash, stay as they are.

    Raises:
        OutputError: it cannot be written. The export is as before.
    """
    text = json.dumps(without_rows(certificate))
    if export.is_dir():
        write_text(export / FILE_NAME, text + "\n")
        return
    key = make_key_value(GGUF_KEY, ValueType.STRING, text)
    with replace_when_done(export) as temporary:
        bake_gguf(read_header(export), temporary, HeaderEdit(set_keys=[key]))
