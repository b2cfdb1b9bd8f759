"""The command line is light, its tables point at code that exists, and mistakes end in one line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from apollo import __version__, cli

ROOT = Path(__file__).parent.parent
COMMAND_LINES = {
    "video info": ["video", "info", "a.mp4", "b.mp4", "--json"],
    "video frames": ["video", "frames", "a.mp4", "--out", "d", "--times", "1", "2.5"],
    "video strip": ["video", "strip", "a.mp4", "--model", "micro", "--max-clips", "8"],
    "data check": ["data", "check", "m.yaml", "--sample", "9", "--model", "d", "--out", "r.json"],
    "ask": ["ask", "a.mp4", "Why?", "--options", "x", "y"],
    "chat": ["chat", "a.mp4", "--server", "http://localhost:8000"],
    "world make": ["world", "make", "out", "--num-videos", "3", "--seed", "1"],
    "train": ["train", "micro", "--set", "a=1", "b.0=2", "--set", "c=3"],
    "plan": ["plan", "3b", "--gpus", "8", "--gpu", "h100", "--assume", "mfu=0.4", "--json"],
    "export": ["export", "runs/x", "--out", "d", "--dtype", "bfloat16"],
    "part": ["part", "siglip", "--out", "runs/parts/siglip"],
    "eval": [
        "eval",
        "m",
        "--data",
        "q.jsonl",
        "--condition",
        "video",
        "text",
        "--scoring",
        "option",
    ],
    "compare": ["compare", "runs/a", "runs/b", "--condition", "text"],
    "diagnose": ["diagnose", "micro", "--data", "runs/world", "--num-videos", "3", "--out", "d"],
    "consistency": ["consistency", "t.csv", "--variant", "a", "b", "--to", "32B", "--out", "d"],
    "audit": ["audit", "runs/a", "b.jsonl,model=b,condition=text", "--out", "d"],
    "curate": ["curate", "runs/a", "runs/b", "--size", "400", "--out", "d", "--data", "w=runs/w"],
    "study list": ["study", "list", "--scale", "paper"],
    "study plan": ["study", "plan", "encoders", "--calibrate", "--workers", "2", "--json"],
    "study run": ["study", "run", "my.py:mine", "--executor", "ray", "--workers", "4", "--keep"],
    "study report": ["study", "report", "--ledgers", "ledgers", "--out", "docs/findings.md"],
    "serve": ["serve", "micro", "--port", "9000", "--api-key", "k", "--media-root", "d"],
    "convert": ["convert", "SRC", "DST"],
    "list": ["list", "recipes"],
    "demo": ["demo", "--minutes", "0.5"],
}


def test_every_command_parses():
    assert COMMAND_LINES.keys() == cli.COMMANDS.keys()
    parser = cli.build_parser()
    for name, line in COMMAND_LINES.items():
        assert parser.parse_args(line).handler == cli.COMMANDS[name].handler
    assert parser.parse_args(COMMAND_LINES["train"]).set == ["a=1", "b.0=2", "c=3"]


@pytest.mark.parametrize(
    "name", [command.handler for command in cli.COMMANDS.values()] + list(cli.LISTS.values())
)
def test_names_in_the_tables_exist(name):
    """By reading the source, since importing it is slow and another part's tests do that."""
    module, _, attribute = name.partition(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    defined = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert attribute in defined


@pytest.mark.parametrize(
    "line", [["--help"], ["ask", "--help"], ["--version"], ["list", "samplings"]]
)
def test_help_imports_no_torch(line):
    code = (
        "import sys; from apollo.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *line], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "apollo", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"apollo {__version__}"


def test_list(capsys):
    assert cli.main(["list", "samplings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fps", "uniform", "center", "released"]
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("kind", ["answerers", "benchmarks", "conditions", "scorings"])
def test_what_the_evaluation_offers_is_explained(kind, capsys):
    assert cli.main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and all(len(line.split()) > 3 for line in lines), lines


def test_scorings_offered_are_all_there_are():
    from apollo.eval.answerers import SCORINGS

    for name in SCORINGS:
        args = cli.build_parser().parse_args(["eval", "m", "--scoring", name])
        assert args.scoring == name


def run_with(monkeypatch, error: BaseException) -> int:
    def handler(args):
        raise error

    monkeypatch.setattr(cli, "list_main", handler)
    return cli.main(["list", "recipes"])


@pytest.mark.parametrize("error", [ValueError("bad\n  thing"), FileNotFoundError("bad thing")])
def test_users_mistakes(monkeypatch, capsys, error):
    assert run_with(monkeypatch, error) == 2
    assert capsys.readouterr().err == "apollo: error: bad thing\n"
    monkeypatch.setenv("APOLLO_DEBUG", "1")
    with pytest.raises(type(error)):
        run_with(monkeypatch, error)


def test_our_mistakes_keep_their_traceback(monkeypatch):
    for error in (KeyError("k"), AssertionError(), RuntimeError("r")):
        with pytest.raises(type(error)):
            run_with(monkeypatch, error)


def test_interrupt(monkeypatch):
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130


def test_closed_pipe_is_quiet():
    code = "import sys; from apollo.cli import main; sys.exit(main(['list', 'families']))"
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | true', shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        ["ask", "a.mp4"],
        ["ask", "a.mp4", "Why?", "--sampling", "random"],
        ["ask", "a.mp4", "Why?", "--max-new-tokens", "0"],
        ["list", "nothing"],
        ["world", "make", "out", "--num-videos", "-1", "--seed", "0"],
        ["fly"],
    ],
)
def test_bad_command_lines(line, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(line)
    assert error.value.code == 2 and "usage:" in capsys.readouterr().err


def test_without_a_command_help_is_shown(capsys):
    assert cli.main([]) == 2
    assert "ask" in capsys.readouterr().out


def test_samplings_offered_are_all_there_are():
    from apollo.video import SAMPLERS

    for name in SAMPLERS:
        args = cli.build_parser().parse_args(["ask", "v", "q", "--sampling", name])
        assert args.sampling == name
