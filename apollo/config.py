"""Strict configuration: dataclasses to and from dicts and YAML, overrides, hash, help texts.

A recipe is a tree of dataclasses. This module is the one way such a tree is read and written, so
that a mistyped key or a wrong type is refused with its dotted path instead of being ignored, and so
that the `config.yaml` of a run replays it exactly. No torch here. Recipes live in
apollo/train/recipes.py.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A setting that does not exist or has the wrong type; the message has its dotted path."""


def to_dict(config: Any) -> Any:
    """Turn a dataclass tree into plain dicts, lists and scalars.

    Tuples become lists and paths become strings: `from_dict` turns them back by the field types.

    Raises:
        ConfigError: a value that YAML cannot carry.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = [field for field in dataclasses.fields(config) if field.init]
        return {field.name: to_dict(getattr(config, field.name)) for field in fields}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise ConfigError(f"cannot write a {type(config).__name__} to a config file: {config!r}")


def from_dict(cls: type[Config], data: Any, where: str = "") -> Config:
    """Build the dataclass `cls` from plain data, refusing whatever does not fit.

    Args:
        cls: A dataclass; its fields may be nested dataclasses, tuples, lists, dicts, optionals and
            literals.
        data: A mapping from field names to values. Missing fields take their defaults.
        where: Dotted path of `data` in the whole config, for messages.

    Raises:
        ConfigError: unknown key (with the nearest known name), missing key, or wrong type.
    """
    if not isinstance(data, Mapping):
        raise _wrong(where, f"a mapping for {cls.__name__}", data)
    fields = {
        field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init
    }
    for key in data:
        if key not in fields:
            raise ConfigError(_unknown(_join(where, key), str(key), fields))
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in data.items()}
    for name, field in fields.items():
        has_default = (field.default, field.default_factory) != (
            dataclasses.MISSING,
            dataclasses.MISSING,
        )
        if name not in values and not has_default:
            raise ConfigError(f"{_join(where, name)} is missing: {cls.__name__} needs it")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # a check in the dataclass's own __post_init__: say where it is
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Check `value` against the type annotation `kind` and return it in that type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else from_dict(kind, value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            nearest = difflib.get_close_matches(str(value), [str(a) for a in arguments], 1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ConfigError(
                f"{where} must be one of {', '.join(map(str, arguments))}, not {value!r}{hint}"
            )
        return value
    if origin in (tuple, list, Sequence):
        return _convert_sequence(kind, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(where, "a mapping", value)
        key_kind, value_kind = arguments
        return {
            _convert(key_kind, key, where): _convert(value_kind, item, _join(where, key))
            for key, item in value.items()
        }
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (bool, int, float, str) and type(value) is kind:  # bool is an int to isinstance
        return value
    if kind is type(None) and value is None:
        return None
    raise _wrong(where, getattr(kind, "__name__", str(kind)), value)


def _convert_union(kinds: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    for position, kind in enumerate(kinds):
        try:
            return _convert(kind, value, where)
        except ConfigError:
            if (
                position == len(kinds) - 1
            ):  # with one choice (an Optional), its message is the right one
                raise
    raise AssertionError("a union has at least one member")


def _convert_sequence(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _wrong(where, "a list", value)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise _wrong(where, f"a list of {len(arguments)}", value)
        kinds = list(arguments)
    else:
        kinds = [arguments[0]] * len(value)
    items = [
        _convert(item_kind, item, _join(where, index))
        for index, (item_kind, item) in enumerate(zip(kinds, value, strict=True))
    ]
    return items if origin is list else tuple(items)


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _wrong(where: str, wanted: str, value: Any) -> ConfigError:
    return ConfigError(
        f"{where or 'config'} must be {wanted}, not {value!r} ({type(value).__name__})"
    )


def _unknown(where: str, key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, list(known), 1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
    return f"{where} is not a setting; {hint}"


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number (YAML 1.1 wants 1.0e-4), a key twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuse duplicate keys, which plain YAML resolves silently to the last one."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text like "1e-4" in quotes."""


_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, where: str = "") -> Any:
    """Parse YAML text; `where` names its origin in the message of a `ConfigError`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where or 'YAML'}: {' '.join(str(error).split())}") from error


def to_yaml(config: Any) -> str:
    """Write a dataclass tree as YAML, fields in their declared order."""
    return yaml.dump(
        to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def from_yaml(cls: type[Config], text: str, where: str = "") -> Config:
    """Read YAML text into the dataclass `cls`; the counterpart of `to_yaml`."""
    data = parse_yaml(text, where)
    try:
        return from_dict(cls, {} if data is None else data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def load_config(cls: type[Config], path: str | Path) -> Config:
    """Read a YAML file into the dataclass `cls`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"cannot read the config file {path}: {reason}") from error
    return from_yaml(cls, text, where=str(path))


def save_config(config: Any, path: str | Path) -> None:
    """Write a dataclass tree to a YAML file that `load_config` reads back equal."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Return a copy of `config` with settings replaced, as given by `--set`.

    Args:
        config: A dataclass tree; it is not changed.
        overrides: Texts like `stages.1.learning_rates.connector=1e-4`: a dotted path into
            dataclasses (by field), tuples and lists (by index) and dicts (by key), then a value in
            YAML.

    Raises:
        ConfigError: no `=`, a path that leads nowhere, or a value of the wrong type.
    """
    data = to_dict(config)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {override!r} must look like path.to.setting=value")
        _set_at(data, path.strip().split("."), parse_yaml(text, where=f"--set {path}"))
    return from_dict(type(config), data)


def _set_at(data: Any, keys: Sequence[str], value: Any) -> None:
    for depth, key in enumerate(keys):
        where, last = ".".join(keys[: depth + 1]), depth == len(keys) - 1
        if isinstance(data, list):
            if not key.isdecimal() or int(key) >= len(data):
                raise ConfigError(
                    f"{where}: there is no item {key}, the list has {len(data)} (from 0)"
                )
            index: Any = int(key)
        elif isinstance(data, dict):
            index = key
            if key not in data and not last:
                raise ConfigError(_unknown(where, key, map(str, data)))
        else:
            raise ConfigError(
                f"{where}: {'.'.join(keys[:depth])} is {data!r}, nothing can be set inside it"
            )
        if last:
            data[index] = value  # whether this key and value are allowed is for from_dict to say
        else:
            data = data[index]


def config_hash(config: Any) -> str:
    """SHA-256 of a config as 64 hexadecimal digits.

    Equal configs have equal hashes across runs and machines: 1 and 1.0 in a float field count as
    equal, and the order of dict keys does not matter.
    """
    normal = to_dict(from_dict(type(config), to_dict(config)))
    return hashlib.sha256(json.dumps(normal, sort_keys=True).encode()).hexdigest()


def field_help(cls: type) -> dict[str, str]:
    """Field name -> help text, from the `Args:` or `Attributes:` of the class docstring."""
    docstring = inspect.cleandoc(cls.__doc__ or "") + "\n"
    section = re.search(r"^(?:Args|Attributes):\n((?: +.*\n|\s*\n)+)", docstring, re.MULTILINE)
    if section is None:
        return {}
    body = section.group(1)
    indent = len(body) - len(body.lstrip(" "))
    entries = re.split(rf"^ {{{indent}}}(\w+)(?: \([^)]*\))?:\s", body, flags=re.MULTILINE)[1:]
    return {
        name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)
    }
