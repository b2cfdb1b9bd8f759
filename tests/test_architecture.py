"""Who may import whom (docs/architecture.md), read from the import statements of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "apollo"

# Level of each part; a part imports parts of lower levels only.
LEVELS = {
    **dict.fromkeys(("config", "runtime", "video"), 0),
    **dict.fromkeys(("model", "media", "messages"), 1),
    **dict.fromkeys(("data", "world", "chat", "remote"), 2),
    **dict.fromkeys(("train", "eval"), 3),
    **dict.fromkeys(("curation", "lab", "serve"), 4),
    **dict.fromkeys(("cli", "demo", "__main__"), 5),
}
ALLOWED = {("__main__", "cli"), ("video", "runtime"), ("chat", "remote")}  # within a level
# Importing these must not import torch: they are what light commands and data workers use.
TORCH_FREE = (
    "apollo",
    "apollo.cli",
    "apollo.config",
    "apollo.messages",
    "apollo.remote",
    "apollo.runtime",
    "apollo.video",
    "apollo.world",
    "apollo.data.formats",
    "apollo.data.mixture",
    "apollo.data.readers",
    "apollo.data.stores",
    "apollo.eval.answerers",
    "apollo.eval.benchmarks",
    "apollo.eval.compare",
    "apollo.eval.parsing",
    "apollo.eval.prompts",
    "apollo.eval.questions",
    "apollo.eval.report",
    "apollo.eval.run_folder",
    "apollo.eval.runner",
    "apollo.eval.scoring",
    "apollo.eval.subtitles",
    "apollo.eval.watching",
    "apollo.curation",
    "apollo.curation.commands",
    "apollo.curation.simulate",
    "apollo.lab.commands",
    "apollo.lab.consistency",
    "apollo.lab.findings",
    "apollo.lab.ledger",
    "apollo.lab.report",
    "apollo.lab.runner",
    "apollo.lab.scaling",
    "apollo.lab.spec",
    "apollo.lab.studies",
    "apollo.lab.tables",
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, top_level_only: bool = False) -> list[tuple[str, int]]:
    """Absolute names of what a module imports, with lines, `TYPE_CHECKING` blocks aside."""
    found = []
    package = path.parent.relative_to(ROOT).parts

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            found.extend((f"{source}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        elif top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def part_of(name: str) -> str:
    """`apollo.train.optim.build` is of the part `train`; the package itself is of no part."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in LEVELS else ""


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_part_has_a_level(path):
    pieces = module_name(path).split(".")
    assert len(pieces) == 1 or pieces[1] in LEVELS, (
        f"{path.relative_to(ROOT)}: part {pieces[1]!r} has no level; give it one in LEVELS here "
        "and in docs/architecture.md"
    )


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    part = part_of(module_name(path))
    if not part:
        return
    for name, line in imports_of(path):
        other = part_of(name) if name.split(".")[0] == "apollo" else ""
        if not other or other == part or (part, other) in ALLOWED:
            continue
        assert LEVELS[other] < LEVELS[part], (
            f"{path.relative_to(ROOT)}:{line} imports {name}: {part} (level {LEVELS[part]}) may "
            f"not import {other} (level {LEVELS[other]}); pass what it needs as an argument, or "
            "move it to a lower level"
        )


@pytest.mark.parametrize(
    "path", [p for p in MODULES if "model" in p.relative_to(PACKAGE).parts], ids=module_name
)
def test_model_imports_nothing_of_apollo(path):
    for name, line in imports_of(path):
        assert not name.startswith("apollo.") or name.startswith("apollo.model"), (
            f"{path.relative_to(ROOT)}:{line} imports {name}: the model must stand alone, so that "
            "its folder can be shipped with weights; pass values in instead"
        )


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if p.relative_to(PACKAGE).parts[0] in ("data", "world")],
    ids=module_name,
)
def test_data_and_world_do_not_know_the_model(path):
    for name, line in imports_of(path):
        assert not name.startswith("apollo.model"), (
            f"{path.relative_to(ROOT)}:{line} imports {name}: take the processor or the model's "
            "function as an argument"
        )


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if p.relative_to(PACKAGE).parts[0] == "curation"],
    ids=module_name,
)
def test_curation_reads_records_only(path):
    for name, line in imports_of(path):
        records = [f"apollo.eval.{part}" for part in ("questions", "scoring")]
        readers = [f"apollo.eval.{part}" for part in ("benchmarks", "data_folder", "parsing")]
        pages = ("apollo.eval.report", "apollo.video")
        allowed = ("apollo.config", "apollo.curation", "apollo.runtime", *records, *readers, *pages)
        assert not name.startswith("apollo.") or name.startswith(allowed), (
            f"{path.relative_to(ROOT)}:{line} imports {name}: curation works on files of "
            "predictions and questions, and asks no model"
        )


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if p.relative_to(PACKAGE).parts[0] == "serve"],
    ids=module_name,
)
def test_serve_needs_no_training_code(path):
    for name, line in imports_of(path):
        assert part_of(name) not in ("train", "eval", "data"), (
            f"{path.relative_to(ROOT)}:{line} imports {name}: a server installs without it"
        )


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_nobody_imports_a_leaf(path):
    """curation, lab and serve can each be removed without a trace; only the command line knows."""
    part = part_of(module_name(path))
    for name, line in imports_of(path):
        other = part_of(name) if name.startswith("apollo.") else ""
        assert LEVELS.get(other) != 4 or part in (other, "cli", "demo"), (
            f"{path.relative_to(ROOT)}:{line} imports {name}: {other} is a leaf"
        )


def test_the_command_line_is_lazy():
    for name, line in imports_of(PACKAGE / "cli.py", top_level_only=True):
        assert part_of(name) == "", f"apollo/cli.py:{line} imports {name}: name it as a string"


def is_there(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("module", list(filter(is_there, TORCH_FREE)))
def test_imports_without_torch(module):
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'accelerate')))\n"  # not there
        f"import {module}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{module} must import without torch:\n{done.stderr[-800:]}"


# Whatever transformers module comes first, in whatever order, the Auto classes know the model.
FIRST_IMPORTS = {
    "apollo first": "import apollo; import transformers.modeling_layers",  # itself imports Auto
    "apollo second": "from transformers import AutoModelForImageTextToText; import apollo",
}


@pytest.mark.parametrize("first", FIRST_IMPORTS.values(), ids=FIRST_IMPORTS.keys())
def test_auto_classes_know_the_model(first):
    code = (
        f"{first}\n"
        "from transformers import AutoConfig, AutoModelForImageTextToText\n"
        "import torch\n"
        "config = AutoConfig.for_model('apollo_vlm')\n"
        "with torch.device('meta'): model = AutoModelForImageTextToText.from_config(config)\n"
        "assert type(model).__module__ == 'apollo.model.modeling', type(model)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
