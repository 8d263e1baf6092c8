"""The ``custom_generate/`` folder of a published draft."""

from __future__ import annotations

from pathlib import Path

# fastdraft_hf stays out of what is checked: without it the folder still works.
_REQUIREMENTS = """\
transformers>=5.5
# fastdraft-hf: optional; with it the faster loop is used, and batches larger than one
"""


def write_custom_generate(folder: Path) -> None:
    """Write ``custom_generate/generate.py`` and its requirements into a draft's folder.

    With it, ``target.generate(custom_generate="the/repository", assistant_model=draft,
    trust_remote_code=True)`` decodes through `fastdraft_hf.assisted_decoding`.
    """
    for path, content in custom_generate_files().items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)


def custom_generate_files() -> dict[str, bytes]:
    """Return the same files: path in the draft's folder to content."""
    code = Path(__file__).with_name("pushed_generate.py").read_bytes()
    return {
        "custom_generate/generate.py": code,
        "custom_generate/requirements.txt": _REQUIREMENTS.encode(),
    }
