"""The torch half of every learning method, one file for each; the other half is its card in `federation/methods.py`."""

from __future__ import annotations

from importlib import import_module

from hsl_node.errors import ConfigError
from hsl_node.federation.methods import card_of
from hsl_node.train.method import Method


def method_of(name: str) -> Method:
    """What the card of that name calls its code. A card comes of this package or of one that was installed.

    Raises:
        ConfigError: that code is not there, or is no method of that name.
    """
    card = card_of(name)
    module, _, value = card.code.partition(":")
    try:
        method = getattr(import_module(module), value)
    except (ImportError, AttributeError) as exc:
        raise ConfigError(
            f"the method {name}: {card.code} cannot be loaded: {exc}",
            remedy="install the package that the method comes from once more, the same version at all hospitals",
        ) from exc
    if not isinstance(method, Method) or method.name != name:
        raise ConfigError(
            f"the method {name}: {card.code} is no method of that name",
            remedy="tell whoever wrote the package that the method comes from",
        )
    return method
