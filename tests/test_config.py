"""Configs survive the round trip, refuse what does not fit, hash the same; runtime's files."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from apollo.config import (
    ConfigError,
    apply_overrides,
    config_hash,
    field_help,
    from_dict,
    from_yaml,
    load_config,
    save_config,
    to_dict,
    to_yaml,
)
from apollo.runtime import (
    append_jsonl,
    environment,
    keep_freed_memory,
    make_run_dir,
    num_available_cores,
    progress,
    read_jsonl,
)


@dataclass(frozen=True)
class Stage:
    """A stage.

    Args:
        name: Its name.
        learning_rates: Rate of each part,
            by the name of the part: a mapping.
        steps: How long.
    """

    name: str
    learning_rates: dict[str, float] = field(default_factory=dict)
    steps: int | None = None

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be positive, not {self.steps}")


@dataclass(frozen=True)
class Recipe:
    stages: tuple[Stage, ...]
    kind: Literal["small", "large"] = "small"
    size: tuple[int, int] = (2, 3)
    scale: float = 1.0
    names: list[str] = field(default_factory=list)
    out: Path | None = None
    resume: bool = False
    limit: int | str = 3
    extra: Any = None


RECIPE = Recipe(
    stages=(Stage("align", {"connector": 1e-4}), Stage("sft", {"connector": 1e-4, "llm": 5e-5}, 3)),
    names=["a", "no", "1e3", "ü: x"],
    out=Path("runs/x"),
)


def test_round_trips(tmp_path):
    assert from_dict(Recipe, to_dict(RECIPE)) == RECIPE
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(RECIPE)))) == RECIPE
    assert from_yaml(Recipe, to_yaml(RECIPE)) == RECIPE
    save_config(RECIPE, tmp_path / "config.yaml")
    assert load_config(Recipe, tmp_path / "config.yaml") == RECIPE


def test_numbers_as_people_write_them():
    text = "stages: []\nscale: {}"
    for written, value in {"1e-4": 1e-4, "2.5E+3": 2500.0, "3": 3.0, "-.5e1": -5.0}.items():
        recipe = from_yaml(Recipe, text.replace("{}", written))
        assert recipe.scale == value and type(recipe.scale) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kindd": 1}, "kindd is not a setting; did you mean kind"),
        ({"stages": [{"name": "a", "step": 1}]}, r"stages.0.step .* did you mean steps"),
        ({"stages": [{"name": "a"}, {}]}, "stages.1.name is missing"),
        ({"stages": [{"name": "a", "steps": 0}]}, "stages.0: steps must be positive"),
        (
            {"stages": [{"name": "a", "learning_rates": {"llm": "x"}}]},
            "stages.0.learning_rates.llm",
        ),
        ({"stages": [{"name": "a", "learning_rates": 3}]}, "stages.0.learning_rates must be a map"),
        ({"stages": "align"}, "stages must be a list"),
        ({"stages": {"name": "a"}}, "stages must be a list"),
        ({"stages": ["a"]}, "stages.0 must be a mapping for Stage"),
        ({"kind": "larg"}, "kind must be one of small, large.*did you mean large"),
        ({"size": [1]}, "size must be a list of 2"),
        ({"size": [1, 2.0]}, "size.1 must be int"),
        ({"scale": "big"}, "scale must be float, not 'big'"),
        ({"scale": True}, "scale must be float"),
        ({"resume": 1}, "resume must be bool"),
        ({"resume": "yes"}, "resume must be bool"),
        ({"names": [None]}, "names.0 must be str"),
        ({"limit": 1.5}, "limit must be"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Recipe, {"stages": [], **change})


def test_yaml_refuses(tmp_path):
    for text in ("stages: []\nstages: []", "stages: [", "- 1", "stages: []\n? [1]\n: 2"):
        with pytest.raises(ConfigError) as error:
            from_yaml(Recipe, text, where="x.yaml")
        assert "x.yaml" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Recipe, tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(Recipe, tmp_path / "binary")


def test_values_that_yaml_cannot_carry():
    with pytest.raises(ConfigError, match="cannot write a object"):
        to_dict(dataclasses.replace(RECIPE, extra=object()))


def test_overrides():
    changed = apply_overrides(
        RECIPE,
        [
            "stages.1.learning_rates.connector=2e-3",
            "stages.0.learning_rates.encoders=1e-6",
            "stages.0.steps=7",
            "stages.1.steps=null",
            "size=[4, 5]",
            "size.0=9",
            "kind=large",
            "out=runs/a=b",
            "names.3=z",
        ],
    )
    assert changed.stages[1] == Stage("sft", {"connector": 2e-3, "llm": 5e-5}, None)
    assert changed.stages[0] == Stage("align", {"connector": 1e-4, "encoders": 1e-6}, 7)
    assert (changed.size, changed.kind, changed.out) == ((9, 5), "large", Path("runs/a=b"))
    assert changed.names == ["a", "no", "1e3", "z"]
    assert RECIPE.stages[0].steps is None and apply_overrides(RECIPE, []) == RECIPE


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.1.learning_rate.llm=1", r"stages.1.learning_rate .*did you mean learning_rates"),
        ("stages.1.learning_rates.llm=fast", "stages.1.learning_rates.llm must be float"),
        ("stages.2.steps=1", r"stages.2: there is no item 2, the list has 2"),
        ("stages.x=1", "there is no item x"),
        ("scale.x=1", "scale is 1.0, nothing can be set inside"),
        ("kinds=small", "did you mean kind"),
        ("kind", "path.to.setting=value"),
        ("=3", "path.to.setting=value"),
        ("size=[1,", "--set size"),
        ("stages.0.steps=0", "stages.0: steps must be positive"),
    ],
)
def test_overrides_refuse(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(RECIPE, [override])


def test_hash():
    assert config_hash(RECIPE) == config_hash(from_yaml(Recipe, to_yaml(RECIPE)))
    assert len(config_hash(RECIPE)) == 64
    as_int = dataclasses.replace(RECIPE, scale=1)
    reordered = apply_overrides(RECIPE, ["stages.1.learning_rates={llm: 5e-5, connector: 1e-4}"])
    assert config_hash(RECIPE) == config_hash(as_int) == config_hash(reordered)
    others = [
        apply_overrides(RECIPE, [text]) for text in ("scale=2", "names=[]", "stages.0.steps=1")
    ]
    assert len({config_hash(config) for config in [RECIPE, *others]}) == 4
    # Spelt out, because the hash must never change by itself: runs are found by it.
    text = b'{"learning_rates": {"b": 0.1}, "name": "a", "steps": null}'
    assert config_hash(Stage("a", {"b": 0.1})) == hashlib.sha256(text).hexdigest()


def test_field_help():
    assert field_help(Stage) == {
        "name": "Its name.",
        "learning_rates": "Rate of each part, by the name of the part: a mapping.",
        "steps": "How long.",
    }
    assert field_help(Recipe) == {}


# ---- runtime -------------------------------------------------------------------------------------


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    append_jsonl(path, {"a": 1})
    append_jsonl(path, {"b": "ü\n"}, {"c": [1.5, None]})
    assert list(read_jsonl(path)) == [{"a": 1}, {"b": "ü\n"}, {"c": [1.5, None]}]
    with pytest.raises(ValueError):
        append_jsonl(path, {"loss": float("nan")})  # JSON has no such number


def test_jsonl_after_a_killed_writer(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    assert list(read_jsonl(path)) == [{"a": 1}]
    append_jsonl(path, {"c": 3})
    assert list(read_jsonl(path)) == [{"a": 1}, {"c": 3}]
    path.write_text('{"a"')
    append_jsonl(path, {"d": 4})
    assert list(read_jsonl(path)) == [{"d": 4}]


def test_jsonl_names_the_line(tmp_path):
    path = tmp_path / "log.jsonl"
    for text, place in {'{"a": 1}\nno\n{"b": 2}\n': "jsonl:2", "\n[1]\n": "jsonl:2"}.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=place):
            list(read_jsonl(path))
    with pytest.raises(ValueError, match="cannot read"):
        list(read_jsonl(tmp_path / "none"))


def test_run_dir(tmp_path):
    run = make_run_dir(tmp_path / "runs" / "a")
    assert make_run_dir(run) == run  # still empty
    (run / "log.jsonl").touch()
    with pytest.raises(ValueError, match="--resume"):
        make_run_dir(run)
    assert make_run_dir(run, resume=True) == run
    with pytest.raises(ValueError, match="is a file"):
        make_run_dir(run / "log.jsonl")


def test_environment_is_json():
    assert {"torch", "python", "cpu", "num_cores"} <= json.loads(json.dumps(environment())).keys()
    assert num_available_cores() >= 1


def test_progress_passes_everything_on(capsys):
    assert list(progress([3, 1, 2], "counting")) == [3, 1, 2]
    assert list(progress(iter("ab"), "spelling", total=2)) == ["a", "b"]
    assert capsys.readouterr().out == ""


def test_keep_freed_memory_says_whether_it_did():
    assert keep_freed_memory() == keep_freed_memory(False)
