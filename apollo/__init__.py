"""Apollo: explore, train, measure and use video understanding in large multimodal models.

Importing this package is cheap (no torch, no transformers) and has one effect: from then on the
Auto classes of transformers know Apollo's model.
`AutoModelForImageTextToText.from_pretrained(folder)` then works as for any built-in model. Read
docs/architecture.md next.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Methods of transformers' Auto classes that need to know our model: module -> (class, methods).
_AUTO_METHODS = {
    "transformers.models.auto.configuration_auto": ("AutoConfig", ("from_pretrained", "for_model")),
    "transformers.models.auto.auto_factory": ("_BaseAutoModelClass", ("from_config",)),
    "transformers.models.auto.processing_auto": ("AutoProcessor", ("from_pretrained",)),
}


def _register_before_use(module: ModuleType) -> None:
    """Make the module's Auto class register Apollo's model just before it looks a model up.

    Registering as soon as the module is imported would be simpler but cannot work: transformers
    imports its Auto classes while its own modelling files, which our model needs, are still half
    loaded.
    """
    class_name, method_names = _AUTO_METHODS[module.__name__]
    auto_class = getattr(module, class_name)
    for name in method_names:
        method = auto_class.__dict__[name].__func__

        @functools.wraps(method)
        def registered(cls: type, *args: Any, _method: Any = method, **kwargs: Any) -> Any:
            from apollo.model import register

            register()
            return _method(cls, *args, **kwargs)

        setattr(auto_class, name, classmethod(registered))


class _AutoClassHook(importlib.abc.MetaPathFinder):
    """Finds the modules of `_AUTO_METHODS` as usual, and edits each one right after it has run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in _AUTO_METHODS:
            return None
        sys.meta_path.remove(self)  # or the search below would come back here
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            run_module = spec.loader.exec_module

            def run_then_edit(module: ModuleType) -> None:
                run_module(module)
                _register_before_use(module)

            setattr(spec.loader, "exec_module", run_then_edit)  # noqa: B010 (mypy forbids the plain form)
        return spec


if _AUTO_METHODS.keys() & sys.modules.keys():  # transformers was first, and has settled by now
    importlib.import_module("apollo.model").register()
else:
    sys.meta_path.insert(0, _AutoClassHook())
