"""How fast videos are read: our engine, decord, torchcodec, OpenCV and plain PyAV side by side.

    pip install apollo-lmm[bench]              # torchcodec also needs FFmpeg's shared libraries
    python benchmarks/video.py                 # everything: hours. --only, --part and --minutes cut

Part "decode" asks each engine for the full-size RGB frames on the screen at the same times. Part
"tensors" goes from a file to what SigLIP takes: the common pipeline (decord at full size, square
padding, the Hugging Face processor) against ours. The files are made here, once: 30 s of a camera
over a textured ground with moving things and grain, repeated by copying packets. Each frame carries
its number as a row of light and dark blocks, so that a wrong frame is noticed whoever returns it.

How it is measured: each run is a process of its own, which opens the file (in the page cache) after
its imports; its peak is VmHWM of /proc, so this needs Linux. The order of the engines turns from
round to round, and ratios are medians over the rounds. Engines that address frames by index get the
true indices, and the place of each keyframe, for free. Of several settings of one library the
quickest with the right frames in the first round goes on to the others. The floor is FFmpeg
decoding the same groups of pictures on all cores and throwing the frames away.

Writes benchmarks/results/video.json.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from video_engines import PARTS, Request
from video_files import NUM_BASE_FRAMES, VideoFile, make_file, read_number

from apollo.runtime import environment
from apollo.video import ClipSampling

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "video.json"
COMPETITORS = ("decord", "torchcodec", "opencv-python-headless")
TIMEOUT_S = 1800

# ---- what is measured ----------------------------------------------------------------------------


DENSE, BUDGET = ClipSampling(), ClipSampling(max_clips=84)  # 2 frames per second; 336 of an hour
SPREAD = ClipSampling(max_clips=16)
UNIFORM_8, UNIFORM_64 = (ClipSampling("uniform", max_clips=clips) for clips in (2, 16))
SHORT_S = 180
WITH_TENSORS = ("dense", "dense_gop30", "hour", "hour_gop30")


def cases(long_s: int) -> dict[str, tuple[VideoFile, ClipSampling]]:
    """Return name -> file and what is wanted of it; `long_s` is the length of the long ones."""
    short, long = VideoFile(min(SHORT_S, long_s)), VideoFile(long_s)
    hevc = "libx265"
    return {
        "dense": (short, DENSE),
        "dense_gop30": (replace(short, gop=30), DENSE),
        "dense_hevc": (replace(short, codec=hevc), DENSE),
        "hour": (long, BUDGET),
        "hour_gop30": (replace(long, gop=30), BUDGET),
        "hour_hevc": (replace(long, codec=hevc), BUDGET),
        "uniform_8": (short, UNIFORM_8),
        "uniform_64": (short, UNIFORM_64),
        "hour_uniform_8": (long, UNIFORM_8),
        "hour_uniform_64": (long, UNIFORM_64),
        "variable_rate": (replace(short, has_variable_rate=True), SPREAD),
        "portrait": (replace(short, is_portrait=True), SPREAD),
        "mkv": (replace(short, suffix=".mkv"), SPREAD),
    }


# ---- one run, in a process of its own ------------------------------------------------------------


def run_job() -> None:
    """Do the job on stdin; print what it took. The frames are written after the measurement."""
    job = json.load(sys.stdin)
    work, request = PARTS[job["part"]][job["engine"]](), Request(**job["request"])
    before_mb, before_cpu_s, started = peak_mb(), cpu_s(), time.perf_counter()
    output = work(request)
    result = {
        "seconds": time.perf_counter() - started,
        "cpu_s": cpu_s() - before_cpu_s,
        "peak_mb": peak_mb(),
        "imports_mb": before_mb,
    }
    if job["save_to"] and output is not None:
        np.save(job["save_to"], np.asarray(output[0] if isinstance(output, tuple) else output))
    print(json.dumps(result))


def cpu_s() -> float:
    """Return the processor time that this process has used, on all cores."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mb() -> float:
    """Return this process's most resident memory so far; getrusage inherits its parent's."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def run_engine(part: str, engine: str, request: Request, save_to: Path | None) -> dict[str, Any]:
    """Return what `run_job` prints, or {"error": why there is nothing}."""
    job = {"part": part, "engine": engine, "request": asdict(request)}
    try:
        process = subprocess.run(
            [sys.executable, __file__, "--job"],
            input=json.dumps(job | {"save_to": str(save_to or "")}),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {TIMEOUT_S} s"}
    if process.returncode:
        errors = re.findall(r"^\w[\w.]*Error: .*", process.stderr, re.MULTILINE)
        return {"error": errors[-1][:300] if errors else f"exit status {process.returncode}"}
    return json.loads(process.stdout.splitlines()[-1])


# ---- rounds and results --------------------------------------------------------------------------


def measure(part: str, request: Request, num_rounds: int, folder: Path) -> dict[str, Any]:
    """Run all engines of a part on one request."""
    with Path(request.path).open("rb") as file:  # into the page cache
        while file.read(2**24):
            pass
    results: dict[str, dict[str, Any]] = {name: {"runs": []} for name in PARTS[part]}
    names, ours = list(results), next(iter(results))
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            save_to = folder / f"{name}.npy" if number == 0 else None
            run = run_engine(part, name, request, save_to)
            print(f"  {name}: {run.get('error') or round(run['seconds'], 2)}", flush=True)
            if "error" in run:
                results[name]["error"] = run["error"]
            else:
                results[name]["runs"].append(run | {"round": number})
            if save_to and save_to.exists():
                results[name] |= compare(save_to, folder / f"{ours}.npy", request, part)
                if name != ours:
                    save_to.unlink()
        if number == 0:
            (folder / f"{ours}.npy").unlink(missing_ok=True)
            names = best_settings(results)
    for result in results.values():
        summarise(result, results[ours]["runs"])
    return results


def compare(path: Path, ours_path: Path, request: Request, part: str) -> dict[str, Any]:
    """Say how many frames are the right ones, and how far they are from ours, in levels of 255."""
    output = np.load(path, mmap_mode="r")
    found: dict[str, Any] = {}
    if part == "decode":
        numbers = [read_number(frame) for frame in output]
        wanted = np.array(request.indices) % NUM_BASE_FRAMES
        # Of a picture on its side no number can be trusted.
        upright = "portrait" not in Path(request.path).name or output.shape[1] > output.shape[2]
        found["right"] = float(np.mean(np.equal(numbers, wanted))) if upright else 0.0
    if not ours_path.exists() or np.load(ours_path, mmap_mode="r").shape != output.shape:
        return found
    means, maxima = [], []
    for a, b in zip(output, np.load(ours_path, mmap_mode="r"), strict=True):
        difference = np.abs(in_levels(a) - in_levels(b))
        means.append(float(difference.mean()))
        maxima.append(float(difference.max()))
    same = float(np.mean(np.array(maxima) < 1e-2))
    return found | {"equal": same, "mean_levels": float(np.mean(means)), "max_levels": max(maxima)}


def in_levels(pixels: np.ndarray) -> np.ndarray:
    """Undo SigLIP's normalisation (mean and standard deviation 0.5), if there was one."""
    pixels = np.asarray(pixels)
    return pixels.astype(np.float32) if pixels.dtype == np.uint8 else (pixels * 0.5 + 0.5) * 255


def best_settings(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the engines that go on after the first round: one setting of each library."""
    best: dict[str, str] = {}

    def rank(name: str) -> tuple[float, float]:
        return -results[name].get("right", 1.0), results[name]["runs"][0]["seconds"]

    for name in (name for name, result in results.items() if result["runs"]):
        library = name.partition(" (")[0]
        best[library] = min(best.get(library, name), name, key=rank)
    return list(best.values())


def summarise(result: dict[str, Any], ours: list[dict[str, Any]]) -> None:
    """Add medians over the rounds, and the median of the paired ratios to ours."""
    runs = result["runs"]
    if not runs:
        return
    for key in ("seconds", "cpu_s", "peak_mb", "imports_mb"):
        result[key] = statistics.median(run[key] for run in runs)
    result["ratio"] = paired(runs, ours, "seconds")


def paired(runs: list[dict[str, Any]], others: list[dict[str, Any]], key: str) -> float | None:
    """Return the median over the rounds of the ratio between two engines."""
    ratios = [a[key] / b[key] for a in runs for b in others if a["round"] == b["round"]]
    return statistics.median(ratios) if ratios else None


def verdict(case: str, part: str, results: dict[str, dict[str, Any]]) -> str:
    """Say in one line how ours stands to the best of the others and to the floor."""
    if not results["apollo"]["runs"]:
        return "ours did not run"
    if part == "tensors":
        common = results["common"]["runs"]
        ratios = (
            f"{name} {paired(common, result['runs'], 'seconds'):.2f} x, "
            f"{paired(result['runs'], common, 'peak_mb'):.2f} of its memory"
            for name, result in results.items()
            if name != "common" and result["runs"] and common
        )
        return f"as fast as the common pipeline (wanted: 2.5 x, 0.2): {'; '.join(ratios)}"
    rivals = {
        name: result["ratio"]
        for name, result in results.items()
        if name.startswith(("decord", "torchcodec", "opencv"))
        and result.get("right") == 1
        and len(result["runs"]) == len(results["apollo"]["runs"])
    }
    if not rivals:
        return "no other library returned the right frames"
    best = min(rivals, key=lambda name: rivals[name])
    wanted = 1.3 if case.startswith("hour") else 0.9
    text = f"ours is {rivals[best]:.2f} x as fast as the best, {best} (wanted: {wanted})"
    if results["floor"]["runs"]:
        above = paired(results["apollo"]["runs"], results["floor"]["runs"], "seconds")
        text += f", and takes {above:.2f} x the floor (else wanted: 1.15)"
    return text


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as text."""
    columns = "seconds ratio cpu_s peak_mb imports_mb right equal mean_levels max_levels".split()
    lines = ["".join([f"{'':34}", *(f"{name:>12}" for name in columns)])]
    for name, result in results.items():
        if not result["runs"]:
            lines.append(f"{name:34}  {result['error']}")
            continue
        values = (result.get(column) for column in columns)
        cells = (f"{'-' if value is None else format(value, '.2f'):>12}" for value in values)
        lines.append("".join([f"{name:34}", *cells]))
    return "\n".join(lines)


def versions() -> dict[str, Any]:
    """What the results depend on, competitors included."""
    found: dict[str, Any] = environment()
    for package in COMPETITORS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"ffmpeg_of_pyav": av.ffmpeg_version_info}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=Path, default=ROOT / "runs" / "bench_video", help="folder")
    parser.add_argument("--rounds", type=int, default=5)
    names = list(cases(0))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--part", choices=PARTS, help="by default both")
    parser.add_argument("--minutes", type=int, default=60, help="length of the hour-long files")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON; other cases in it are kept")
    options = parser.parse_args()
    report = json.loads(options.out.read_text()) if options.out.exists() else {"cases": {}}
    for case_name, part in itertools.product(options.only, PARTS):
        if options.part not in (None, part) or (
            part == "tensors" and case_name not in WITH_TENSORS
        ):
            continue
        file, sampling = cases(60 * options.minutes)[case_name]
        path = make_file(file, options.files)
        request = Request.of(path, sampling)
        size_mb = round(os.path.getsize(path) / 1e6, 1)
        title = f"{case_name}, {part}: {len(request.indices)} frames of {path.name} ({size_mb} MB)"
        print(title, flush=True)
        results = measure(part, request, options.rounds, options.files)
        summary = verdict(case_name, part, results)
        print(f"{table(results)}\n{summary}\n", flush=True)
        report["cases"][f"{case_name}, {part}"] = {
            "file": path.name,
            "file_mb": size_mb,
            "num_frames": len(request.indices),
            "verdict": summary,
            "engines": results,
            "environment": versions(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_job() if sys.argv[1:] == ["--job"] else main()
