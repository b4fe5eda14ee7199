"""Nothing is collected while libraries are imported, and everything is as before afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from ground.imports import without_collection


def test_collection_rests_in_the_body_and_goes_on_behind_it() -> None:
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), without_collection():
        kept = [[n] for n in range(1000)]
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > frozen + len(kept)
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled(), "as it was found"
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_module_is_run_with_its_main(tmp_path: Path) -> None:
    told = "import gc\nseen = gc.isenabled()\ndef main():\n    return 7 * (gc.isenabled() > seen)\n"
    (tmp_path / "told.py").write_text(told)
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    line = [sys.executable, "-m", "ground.imports", "told"]
    assert subprocess.run(line, env=environment).returncode == 7
