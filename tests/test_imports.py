"""Imports without the garbage collector."""

import gc
from pathlib import Path

import pytest

from pipelines.imports import import_name


def test_nothing_is_collected_while_a_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_large_library.py").write_text("import gc\ncollects = gc.isenabled()\n")
    frozen = gc.get_freeze_count()
    assert import_name("a_large_library:collects") is False
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen


def test_after_an_import_that_fails_it_collects_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_broken_library.py").write_text("raise ImportError('no card')")
    with pytest.raises(ImportError, match="no card"):
        import_name("a_broken_library:engine")
    assert gc.isenabled()
