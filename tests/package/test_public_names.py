"""The lists of public names say what there is."""

import importlib
import inspect
import pkgutil

import pytest

import tetrarch

MODULES = sorted(
    ["tetrarch"]
    + [
        info.name
        for info in pkgutil.walk_packages(tetrarch.__path__, "tetrarch.")
        if not info.name.endswith("__main__")
    ]
)


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_exists_once(name: str) -> None:
    module = importlib.import_module(name)
    public = list(getattr(module, "__all__", ()))
    assert len(public) == len(set(public))
    missing = [entry for entry in public if not hasattr(module, entry)]
    assert not missing


@pytest.mark.parametrize("name", MODULES)
def test_every_function_and_class_without_underscore_is_in_all(name: str) -> None:
    module = importlib.import_module(name)
    made_here = {
        entry
        for entry, thing in vars(module).items()
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == name
    }
    public = {entry for entry in made_here if not entry.startswith("_")}
    assert public <= set(module.__all__)


def test_names_of_the_package_are_the_objects_of_their_homes() -> None:
    assert sorted(tetrarch._HOMES) == sorted(tetrarch.__all__)
    for name, home in tetrarch._HOMES.items():
        assert getattr(tetrarch, name) is getattr(importlib.import_module(home), name)


def test_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Virtual'"):
        _ = tetrarch.Virtual
