"""The program that prepares a data set."""

import pytest

from lance_jax import data, prepare
from lance_jax.config import DATA_DIR


@pytest.mark.parametrize(
    ("arguments", "place"), [([], DATA_DIR), (["--data_dir", "somewhere"], "somewhere")]
)
def test_the_named_set_is_prepared(monkeypatch, capsys, arguments, place):
    asked = []
    monkeypatch.setattr(data, "prepare", lambda *given: asked.append(given))
    prepare.main(["cifar100", *arguments])
    assert asked == [("cifar100", place)]
    assert capsys.readouterr().out == f"cifar100 is prepared in {place}\n"


def test_what_is_missing_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        prepare.main(["cifar100", "--data_dir", str(tmp_path)])
    assert str(stop.value).startswith("error: data set 'cifar100' is not prepared in data_dir")
    assert "\n" not in str(stop.value) and "pip install -e '.[data]'" in str(stop.value)
    assert not capsys.readouterr().err
