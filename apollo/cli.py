"""The `apollo` command: one table of commands, each imported only when it is called.

`apollo --help`, and the help of every command, must appear at once, so nothing here imports torch:
options are declared in this file, and the code that acts on them is named as "module:function". A
mistake of the user (ValueError, OSError) ends in one line on stderr and exit code 2;
APOLLO_DEBUG=1 shows the traceback instead.
"""

import argparse
import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from apollo import __version__

Parser = argparse.ArgumentParser


class Command(NamedTuple):
    """What runs a command, what it says of itself, and what declares its options."""

    handler: str
    help: str
    add_options: Callable[[Parser], None]


# What `apollo list KIND` reads: the module-level table of each choice.
LISTS = {
    "recipes": "apollo.train.recipes:RECIPES",
    "gpus": "apollo.train.plan:GPUS",
    "parts": "apollo.train.parts:PARTS",
    "formats": "apollo.data.formats:FORMATS",
    "encoders": "apollo.model.encoders:ENCODERS",
    "connectors": "apollo.model.connector:RESAMPLERS",
    "token-integrations": "apollo.model.configuration:TOKEN_INTEGRATIONS",
    "samplings": "apollo.video.sampling:SAMPLERS",
    "video-backends": "apollo.video.decode:BACKENDS",
    "families": "apollo.world.questions:FAMILIES",
    "benchmarks": "apollo.eval.benchmarks:BENCHMARKS",
    "answerers": "apollo.eval.answerers:ANSWERERS",
    "conditions": "apollo.eval.answerers:CONDITIONS",
    "scorings": "apollo.eval.answerers:SCORINGS",
    "models": "apollo.chat:MODELS",
    "studies": "apollo.lab.studies:STUDIES",
    "prediction-formats": "apollo.curation.formats:FORMATS",
    "rankings": "apollo.curation.discrimination:RANKINGS",
}

MODEL_HELP = "folder or Hugging Face hub id of an Apollo model; default: the shipped micro model"


def _ask(parser: Parser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="path of a video file")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", help=MODEL_HELP)
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="TEXT", help="choose among these answers"
    )
    _generation(parser)


def _chat(parser: Parser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="path of a video file")
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", help=MODEL_HELP)
    _generation(parser)


def _generation(parser: Parser) -> None:
    parser.add_argument(
        "--server",
        metavar="URL",
        help="ask a model behind an OpenAI-compatible server, which --model may name",
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=256, metavar="N", help="longest answer (256)"
    )
    parser.add_argument(
        "--sampling",
        choices=("fps", "uniform", "center", "released"),
        help="which frames to look at: clips at a constant rate, frames evenly over the video, the "
        "centre frame, or as the released code chose; by default as the model was trained",
    )


def _world_make(parser: Parser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write to")
    parser.add_argument(
        "--num-videos", type=_positive, required=True, metavar="N", help="how many videos"
    )
    parser.add_argument("--seed", type=int, required=True, help="same seed, same files")
    parser.add_argument(
        "--workers", type=_positive, metavar="N", help="processes; default: one per core"
    )
    parser.add_argument(
        "--split", choices=("train", "test"), default="train", help="no scene is in both (train)"
    )


def _video_info(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="video files")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")


def _video_frames(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="path of a video file")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--fps", type=float, default=2.0, metavar="F", help="frames per second to take (2)"
    )
    which.add_argument(
        "--times", type=float, nargs="+", metavar="S", help="instead: the seconds to take"
    )
    parser.add_argument(
        "--start", type=float, default=0.0, metavar="S", help="with --fps: from this second on (0)"
    )
    parser.add_argument(
        "--end", type=float, metavar="S", help="with --fps: up to this second; default: the end"
    )
    parser.add_argument(
        "--size", metavar="WxH", help="scale to it; one number is the longer side; default: as is"
    )
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="(jpg)")


def _video_strip(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="path of a video file")
    parser.add_argument("--out", default="strip.png", metavar="PNG", help="(strip.png)")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="folder of a model, or a shipped one as micro: sample as it does; default: as the "
        "paper does, with at most 84 clips; the options below change single settings",
    )
    parser.add_argument(
        "--sampling",
        choices=("fps", "uniform", "center", "released"),
        help="see `apollo list samplings`",
    )
    parser.add_argument("--max-clips", type=_positive, metavar="N", help="most clips of a video")
    parser.add_argument("--clip-duration", type=float, metavar="S", help="seconds of a clip")
    parser.add_argument("--frames-per-clip", type=_positive, metavar="T", help="frames of a clip")


def _recipe(parser: Parser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="see `apollo list recipes`")
    parser.add_argument("--config", metavar="FILE", help="instead: the config.yaml of a run")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH=VALUE",
        help="change a setting, as stages.0.learning_rates.connector=1e-4",
    )


def _train(parser: Parser) -> None:
    _recipe(parser)
    parser.add_argument("--out", metavar="DIR", help="folder of the run")
    parser.add_argument("--print-config", action="store_true", help="only print the whole config")
    parser.add_argument("--resume", action="store_true", help="go on where the run in DIR stopped")


def _data_check(parser: Parser) -> None:
    parser.add_argument(
        "mixture", metavar="MIXTURE", help="mixture file (.yaml), or a file of records"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="what its paths are relative to; default: as it says"
    )
    parser.add_argument(
        "--media-dir", metavar="DIR", help="where media lie, if not beside the records"
    )
    parser.add_argument(
        "--sample",
        type=_positive,
        default=50,
        metavar="N",
        help="records of each source whose media are opened (50)",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides which (0)")
    parser.add_argument(
        "--model", metavar="DIR", help="measure lengths in tokens of this model (folder or hub id)"
    )
    parser.add_argument(
        "--steps", type=_positive, default=1000, metavar="N", help="steps to count draws of (1000)"
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=256, metavar="N", help="records of a step (256)"
    )
    parser.add_argument("--out", metavar="FILE", help="write everything found here, as JSON")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _plan(parser: Parser) -> None:
    _recipe(parser)
    parser.add_argument("--gpus", type=_positive, default=1, metavar="N", help="how many (1)")
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="see `apollo list gpus` (h100)"
    )
    parser.add_argument(
        "--assume",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="change what is assumed, as mfu=0.4; all of it is printed",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(out=None, resume=False)


def _export(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of a run, a model or an adapter")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--base",
        metavar="DIR_OR_HUB_ID",
        help="with an adapter: the model it was trained from; default: what it says itself",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of the weights (bfloat16)",
    )


def _part(parser: Parser) -> None:
    parser.add_argument("name", metavar="PART", help="see `apollo list parts`")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same part (0)")
    parser.add_argument("--steps", type=_positive, metavar="N", help="default: see the table")
    parser.add_argument("--resume", action="store_true", help="go on where the run in DIR stopped")


def _eval(parser: Parser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an Apollo model's folder or hub id, huggingface:FOLDER_OR_HUB_ID, api:NAME, "
        "oracle or random; see `apollo list answerers`",
    )
    parser.add_argument("--data", metavar="FOLDER_OR_HUB_ID", help="where questions and videos are")
    parser.add_argument(
        "--benchmark",
        metavar="NAME",
        help="how to read them, see `apollo list benchmarks`; default: as a world or a curated "
        "benchmark if the folder is one, else questions (own JSON lines)",
    )
    parser.add_argument(
        "--condition",
        nargs="+",
        default=["video"],
        metavar="NAME",
        help="what is shown, see `apollo list conditions` (video)",
    )
    parser.add_argument(
        "--scoring",
        choices=("letter", "option", "generate"),
        help="likelihood of each option's letter, or of its text, or read from a written answer; "
        "default: the benchmark's, or what the model can do",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="ask only N of the questions")
    parser.add_argument(
        "--out",
        default="runs/eval",
        metavar="DIR",
        help="predictions and report; called again, it goes on there (runs/eval)",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=16,
        metavar="N",
        help="rows, or requests, at once: changes the speed, not the answers (16)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the model's weights"
    )
    parser.add_argument(
        "--feature-cache",
        metavar="DIR",
        help="keep what the encoders make of each video, for other models with the same encoders",
    )
    parser.add_argument("--server", metavar="URL", help="with api:NAME, as http://host:8000/v1")
    parser.add_argument(
        "--send",
        choices=("frames", "file"),
        help="what an api: gets: pictures, or the file (frames)",
    )
    parser.add_argument(
        "--num-frames",
        type=_positive,
        metavar="N",
        help="frames of a video that are shown; with huggingface: and api:",
    )


def _compare(parser: Parser) -> None:
    parser.add_argument("run_a", metavar="RUN_A", help="folder of an evaluation")
    parser.add_argument("run_b", metavar="RUN_B", help="another, of the same questions")
    parser.add_argument(
        "--condition", default="video", metavar="NAME", help="which predictions (video)"
    )
    parser.add_argument(
        "--common", action="store_true", help="leave out questions that one run alone was asked"
    )
    parser.add_argument("--out", metavar="FILE", help="write a page (HTML)")


def _diagnose(parser: Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="folder or hub id of an Apollo model, micro, or an encoder"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder of `apollo world make`, best of --split test",
    )
    parser.add_argument(
        "--num-videos", type=_positive, default=150, metavar="N", help="videos to measure on (150)"
    )
    parser.add_argument("--out", metavar="DIR", help="write diagnosis.json and diagnosis.html here")


def _consistency(parser: Parser) -> None:
    parser.add_argument(
        "table", metavar="TABLE", help="CSV or Parquet: scores of variants at several sizes"
    )
    parser.add_argument("--score", metavar="COLUMN", help="which holds the scores")
    parser.add_argument("--size", metavar="COLUMN", help="sizes, or names such as Qwen2-7B")
    parser.add_argument(
        "--sizes", nargs="+", metavar="COLUMN", help="of a wide table: the scores at each size"
    )
    parser.add_argument("--variant", nargs="+", metavar="COLUMN", help="what makes a variant")
    parser.add_argument(
        "--factor", nargs="+", metavar="COLUMN", help="what else may carry the agreement"
    )
    parser.add_argument("--to", nargs="+", metavar="SIZE", help="larger sizes to extrapolate to")
    parser.add_argument(
        "--noise",
        type=_not_negative,
        metavar="POINTS",
        help="standard deviation of a score between seeds: what it would leave of R2",
    )
    parser.add_argument("--out", metavar="DIR", help="write the report and its figures here")


def _predictions(parser: Parser) -> None:
    parser.add_argument(
        "predictions",
        nargs="+",
        metavar="PREDICTIONS",
        help="a folder of `apollo eval`, lmms-eval's sample logs, VLMEvalKit's xlsx, tsv or json, "
        "a table; with what it does not say: PATH,model=NAME,condition=text,benchmark=NAME; "
        "@FILE: one such argument a line",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="[BENCHMARK=]FOLDER",
        help="where the questions themselves are, as for `apollo eval`",
    )
    parser.add_argument(
        "--by-row", action="store_true", help="ids in the predictions are numbers of rows, from 0"
    )
    parser.add_argument(
        "--max-missing",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of a benchmark's questions, that a model may lack; they count as wrong (0.05)",
    )


def _audit(parser: Parser) -> None:
    _predictions(parser)
    parser.add_argument("--out", metavar="DIR", help="write audit.html, audit.json, questions.csv")
    parser.add_argument(
        "--save", metavar="FILE", help="write all predictions as one table, FILE.parquet"
    )


def _curate(parser: Parser) -> None:
    _predictions(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--size", type=_positive, default=400, metavar="N", help="questions to keep (400)"
    )
    parser.add_argument(
        "--rank",
        default="entropy",
        metavar="NAME",
        help="what the best questions are, see `apollo list rankings` (entropy)",
    )
    parser.add_argument(
        "--rule",
        choices=("majority", "likely"),
        default="majority",
        help="drop what more than half of the models answer without the video, or what more than "
        "half of all such models know, luck aside (majority)",
    )
    parser.add_argument(
        "--balance",
        default="class",
        metavar="COLUMN",
        help="spread over its values; answers: over which models are right; or none (class)",
    )
    parser.add_argument(
        "--shares", choices=("pool", "equal"), default="pool", help="of these values (pool)"
    )
    parser.add_argument(
        "--per-video", type=int, default=0, metavar="N", help="most of a video; 0: any number (0)"
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="classes of the questions, see docs/curation.md"
    )
    parser.add_argument(
        "--ask-classes",
        action="store_true",
        help="only write questions that ask an answerer for the classes",
    )
    parser.add_argument("--review", metavar="CSV", help="a review.csv that was filled in")
    parser.add_argument(
        "--splits", type=int, default=40, metavar="N", help="of the validation; 0: none (40)"
    )
    parser.add_argument(
        "--name", default="curated", metavar="NAME", help="of the small benchmark (curated)"
    )


def _study(parser: Parser) -> None:
    parser.add_argument(
        "study", metavar="STUDY", help="see `apollo study list`; your own: FILE.py:FUNCTION"
    )
    _lab(parser)


def _lab(parser: Parser) -> None:
    parser.add_argument("--scale", choices=("micro", "paper"), default="micro", help="(micro)")
    parser.add_argument(
        "--out", default="runs/lab", metavar="DIR", help="ledgers, claims and points (runs/lab)"
    )


def _study_plan(parser: Parser) -> None:
    _study(parser)
    parser.add_argument(
        "--calibrate", action="store_true", help="measure a few steps of what has never been run"
    )
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="how many (1)")
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="at the paper's scale: see `apollo list gpus`"
    )
    parser.add_argument(
        "--gpus", type=_positive, default=8, metavar="N", help="at the paper's scale: how many (8)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _study_run(parser: Parser) -> None:
    _study(parser)
    parser.add_argument(
        "--executor",
        choices=("here", "processes", "ray", "slurm"),
        default="here",
        help="one worker here, several processes, Ray, or a job script for Slurm (here)",
    )
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="how many (1)")
    parser.add_argument(
        "--keep", action="store_true", help="keep models and predictions of finished points"
    )


def _study_report(parser: Parser) -> None:
    parser.add_argument(
        "study", nargs="?", metavar="STUDY", help="print this one alone; default: write all"
    )
    parser.add_argument("--scale", choices=("micro", "paper"), default="micro", help="(micro)")
    parser.add_argument(
        "--ledgers", default="runs/lab/ledgers", metavar="DIR", help="(runs/lab/ledgers)"
    )
    parser.add_argument(
        "--out", default="docs/findings.md", metavar="FILE", help="page (docs/findings.md)"
    )


def _serve(parser: Parser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="(127.0.0.1: this machine only)")
    parser.add_argument("--port", type=_positive, default=8000, metavar="N", help="(8000)")
    parser.add_argument(
        "--api-key", metavar="KEY", help="clients must bring it; better in APOLLO_API_KEY"
    )
    parser.add_argument(
        "--media-root", metavar="DIR", help="folder whose files may be asked about; default: none"
    )
    parser.add_argument(
        "--max-batch", type=_positive, default=16, metavar="N", help="answers at once (16)"
    )
    parser.add_argument(
        "--max-waiting",
        type=_positive,
        default=64,
        metavar="N",
        help="requests that wait; more are asked to come back later (64)",
    )
    parser.add_argument(
        "--max-upload", type=_positive, default=512, metavar="MIB", help="largest file (512)"
    )
    parser.add_argument(
        "--max-duration", type=float, default=3600.0, metavar="S", help="longest video (3600)"
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=1024, metavar="N", help="longest answer (1024)"
    )
    parser.add_argument(
        "--grace",
        type=_positive,
        default=30,
        metavar="S",
        help="when told to stop, wait so long for answers that are being written (30)",
    )


def _convert(parser: Parser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder or hub id of a released checkpoint")
    parser.add_argument("target", metavar="DST", help="folder to make")


def _list(parser: Parser) -> None:
    parser.add_argument("kind", choices=LISTS, metavar="KIND", help=", ".join(LISTS))


def _demo(parser: Parser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="(runs/demo)")
    parser.add_argument(
        "--minutes", type=float, default=5.0, metavar="M", help="about how long to train (5)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text!r}")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0, not {text!r}")
    return number


COMMANDS = {
    "ask": Command("apollo.chat:ask_main", "answer one question about a video", _ask),
    "chat": Command("apollo.chat:chat_main", "talk about a video", _chat),
    "world make": Command(
        "apollo.world.make:main", "make videos of the micro world, with questions", _world_make
    ),
    "video info": Command("apollo.video.commands:info_main", "say what a file is", _video_info),
    "video frames": Command(
        "apollo.video.commands:frames_main", "write frames as pictures", _video_frames
    ),
    "video strip": Command(
        "apollo.video.commands:strip_main", "draw the clips that a model sees", _video_strip
    ),
    "data check": Command(
        "apollo.data.check:main", "find what is wrong with training data", _data_check
    ),
    "train": Command("apollo.train.run:main", "train a recipe's stages", _train),
    "plan": Command("apollo.train.plan:main", "estimate what a recipe will cost", _plan),
    "export": Command("apollo.train.export:main", "write a trained model for others", _export),
    "part": Command("apollo.train.parts:main", "train a part of the micro model", _part),
    "eval": Command("apollo.eval.runner:main", "measure a model on questions", _eval),
    "compare": Command(
        "apollo.eval.compare:main",
        "say whether two evaluations differ",
        _compare,
    ),
    "diagnose": Command(
        "apollo.eval.diagnose:main", "find the link at which a model loses what it sees", _diagnose
    ),
    "consistency": Command(
        "apollo.lab.consistency:main",
        "do choices made on small models hold for large ones?",
        _consistency,
    ),
    "audit": Command(
        "apollo.curation.commands:audit_main", "say what a benchmark measures", _audit
    ),
    "curate": Command(
        "apollo.curation.commands:curate_main",
        "choose a small benchmark that ranks like the large one",
        _curate,
    ),
    "study list": Command("apollo.lab.commands:list_main", "the paper's ablations", _lab),
    "study plan": Command(
        "apollo.lab.commands:plan_main", "say how long a study will take", _study_plan
    ),
    "study run": Command(
        "apollo.lab.commands:run_main", "run the points that are not finished", _study_run
    ),
    "study report": Command(
        "apollo.lab.commands:report_main", "tables, figures and verdicts", _study_report
    ),
    "serve": Command("apollo.serve.api:main", "put a model behind a URL, with a page", _serve),
    "convert": Command(
        "apollo.model.conversion:main", "make a released checkpoint loadable", _convert
    ),
    "list": Command("apollo.cli:list_main", "show what there is to choose from", _list),
    "demo": Command("apollo.demo:main", "the whole of Apollo in a few minutes", _demo),
}


# What the commands of two words have in common.
GROUPS = {
    "data": "training data: records and mixtures of them",
    "study": "the paper's ablations, and your own",
    "video": "look into video files: what they are, their frames, what a model sees",
    "world": "the micro world of moving shapes",
}


def build_parser() -> Parser:
    """The parser of all commands; imports none of them."""
    parser = Parser(prog="apollo", description="Video understanding in large multimodal models.")
    parser.add_argument("--version", action="version", version=f"apollo {__version__}")
    groups = {"": parser.add_subparsers(title="commands", metavar="COMMAND")}
    for name, command in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in groups:
            group_parser = groups[""].add_parser(
                group, help=GROUPS[group], description=GROUPS[group]
            )
            groups[group] = group_parser.add_subparsers(required=True, metavar="COMMAND")
        subparser = groups[group].add_parser(word, help=command.help, description=command.help)
        subparser.set_defaults(handler=command.handler)
        command.add_options(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "handler"):
        parser.print_help()
        return 2
    for library in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(library, "error")  # what goes wrong is for the line below to say
    try:
        code = _load(args.handler)(args)
        sys.stdout.flush()  # here, so that a closed pipe is noticed below and not at exit
        return code or 0
    except BrokenPipeError:  # the reader, as in `apollo list ... | head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("apollo: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("APOLLO_DEBUG") == "1":
            raise
        print(f"apollo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def list_main(args: argparse.Namespace) -> int:
    """Print the names of a table, each with the first line of its documentation."""
    table = _load(LISTS[args.kind])
    items = table.items() if isinstance(table, Mapping) else ((name, "") for name in table)
    width = max(map(len, table)) + 2
    for name, value in items:
        print(f"{name:{width}}{_summary(value)}".rstrip())
    return 0


def _summary(value: Any) -> str:
    """A line about a table's entry: its own text, or what the function or class in it says."""
    if isinstance(value, str):
        return value
    if isinstance(about := getattr(value, "about", None), str):
        return about
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return next((_summary(field) for field in fields if callable(field)), "")
    documentation = inspect.getdoc(value) if callable(value) else None
    return documentation.splitlines()[0] if documentation else ""
