"""The ``custom_generate/`` folder of a published draft."""

from __future__ import annotations

import shutil
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
    place = folder / "custom_generate"
    place.mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("pushed_generate.py"), place / "generate.py")
    (place / "requirements.txt").write_text(_REQUIREMENTS, encoding="utf-8")
