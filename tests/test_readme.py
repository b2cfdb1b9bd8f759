"""The README tells the truth: its commands parse, its paths exist, its Python runs."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" #")[0].strip()
    for line in README.splitlines()
    if re.match(r"(    |\$ )apollo ", line)
]
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def tree_paths() -> list[str]:
    """Paths named in the annotated tree; two spaces of indentation are one level."""
    block = README.split("## What lies where")[1].split("```")[1].strip("\n")
    parents: list[str] = []
    paths = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        paths.append("".join(parents[: depth + 1]))
    return paths


def test_there_is_something_to_check():
    assert len(COMMANDS) >= 5
    assert len(tree_paths()) >= 20
    assert PYTHON


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    from apollo.cli import build_parser

    build_parser().parse_args(shlex.split(command)[1:])  # a bad command exits


@pytest.mark.parametrize("path", tree_paths())
def test_path_in_the_tree_exists(path):
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_every_module_of_the_first_two_levels_is_in_the_tree_or_its_folder_is():
    """A new top-level module or package must be named in the tree."""
    named = set(tree_paths())
    for entry in (ROOT / "apollo").iterdir():
        if entry.suffix == ".py" and not entry.name.startswith("_"):
            assert f"apollo/{entry.name}" in named
        if (entry / "__init__.py").exists():
            assert f"apollo/{entry.name}/" in named


@pytest.mark.parametrize("target", re.findall(r"^    make (\S+)", README, flags=re.MULTILINE))
def test_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_link_exists(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code, plain_video, tmp_path, capsys):
    """With a tiny model and another video in the places of the named ones."""
    from tiny_models import TOKENIZER, make_config

    from apollo.model import ApolloForConditionalGeneration, ApolloProcessor

    ApolloForConditionalGeneration(config := make_config()).save_pretrained(tmp_path)
    ApolloProcessor.from_config(config, TOKENIZER).save_pretrained(tmp_path)
    assert "apollo/assets/micro" in code and '"video.mp4"' in code
    code = code.replace("apollo/assets/micro", str(tmp_path))
    exec(code.replace("video.mp4", str(plain_video.path)), {})  # an error fails the test
    assert "0.5" in capsys.readouterr().out
