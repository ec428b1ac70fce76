"""The exception tree, and the gate in front of optional parts."""

import sys

import pytest

from cl4wsis import errors


@pytest.mark.parametrize("name", ["ConfigError", "DataError", "RunError", "BundleError", "BackendError"])
def test_every_error_for_the_user_has_one_root(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.Cl4wsisError)
    assert not issubclass(getattr(errors, name), ValueError)


def test_a_missing_part_is_answered_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # Python's own way to say: cannot be imported
    with pytest.raises(errors.MissingExtraError) as caught:
        errors.require("export")
    assert str(caught.value) == "this needs onnx, which is not installed; run: pip install 'cl4wsis[export]'"


def test_an_installed_part_passes_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    errors.require("train")
    assert "tensorboard" not in sys.modules
