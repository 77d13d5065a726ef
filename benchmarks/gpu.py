"""All measurements on one GPU by one command, in parts that are bounded in time, and that a later start goes on with.

    python benchmarks/gpu.py --out DIR --minutes 20
    python benchmarks/gpu.py --out DIR --minutes 20 --site PACKAGES --tokens python-tokens.tar.xz
    python benchmarks/gpu.py --out DIR --smoke          # everything once on the CPU, in toy sizes

Needs a source tree, no installation and no network; packages that the machine lacks come from folders given by
`--site`. The parts, most valuable first: `environment`; `parity` with the CPU; `training`, a training step of 135M and
1B parameters; `decoding` at 1, 8 and 64 rows with 135M, 1B and 3B; `prefill` of 4,096 tokens; and `isoflop`, the study
of recipes/isoflop-gpu.yaml, with a file of tokens that `carried_tokens.py` wrote. The files gpu_*.py say what they
measure.

Each part is a process of its own, which writes DIR/PART.json after every case, and prints to DIR/PART.log. The same
command with the same DIR goes on where it stopped; `--retry` tries again what failed. The last line printed is one JSON
object with all parts; the exit status is 1 when something failed.
"""

import argparse
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from parts import Case, end_process, forget_failures, only_owner, read_part, run_cases, run_part, status

HERE = Path(__file__).resolve().parent
# Seconds that a part may take of one start. In toy sizes none counts: how fast the CPU is says nothing of the GPU.
LIMITS = {
    "environment": 90.0,
    "parity": 240.0,
    "training": 400.0,
    "decoding": 480.0,
    "prefill": 180.0,
    "isoflop": float("inf"),
}
# What takes as long as all the others in toy sizes, where parts may disturb one another: it runs beside them.
LONGEST_OF_SMOKE = ("training", "prefill")
# On the CPU these need a C++ compiler.
COMPILING = ("parity", "training", "decoding")


def environment() -> dict[str, Any]:
    """What the machine is, and how fast it multiplies and reads."""
    import torch
    from gpu_scale import gpu_scale, matmul, reading, seconds, short, smoke_scale

    scale = gpu_scale() if torch.cuda.is_available() else smoke_scale()
    peaks = {}
    for dtype in (torch.bfloat16, torch.float32):
        product, operations = matmul(scale, dtype)
        speed = operations / min(seconds(product, scale.device) for _ in range(5))
        peaks[str(dtype)] = short(speed / 1e12)
    read, read_bytes = reading(scale)
    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "matmul_tflops": peaks,
        "read_gb_per_s": round(read_bytes / min(seconds(read, scale.device) for _ in range(5)) / 1e9, 1),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "gpu": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
    if shutil.which("nvidia-smi"):
        fields = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
        figures["nvidia_smi"] = {fields: answer.stdout.strip() or answer.stderr.strip()}
    return figures


def cases_of(part: str, out: Path, tokens: Path | None, smoke: bool) -> dict[str, Case]:
    if part == "environment":
        return {"machine": environment}
    if part == "isoflop":
        import gpu_study

        return gpu_study.cases(out / "isoflop", tokens, smoke)
    import gpu_parity
    import gpu_sampling
    import gpu_training
    from gpu_scale import gpu_scale, smoke_scale

    scale = smoke_scale() if smoke else gpu_scale()
    match part:
        case "parity":
            return gpu_parity.cases(scale, smoke)
        case "training":
            return gpu_training.cases(scale)
        case "decoding":
            return gpu_sampling.decoding_cases(scale)
        case _:
            return gpu_sampling.prefill_cases(scale)


def run_one(part: str, out: Path, tokens: Path | None, smoke: bool, commit: str | None) -> int:
    """What the process of a part does."""
    import torch

    from mixture_of_depths.compiler import missing_compiler
    from mixture_of_depths.provenance import provenance

    if smoke:
        missing = missing_compiler(torch.device("cpu")) if part in COMPILING else None
        if missing is not None:
            raise SystemExit(f"--smoke of the part {part} needs {missing}")
        torch.set_num_threads(min(2, os.cpu_count() or 1))
    # Every size and number of rows is a graph of its own.
    torch.compiler.config.recompile_limit = 64
    origin = provenance()
    origin["git_commit"] = origin["git_commit"] or commit
    return run_cases(out / f"{part}.json", cases_of(part, out, tokens, smoke), {"provenance": origin, "smoke": smoke})


def named_site_packages(sites: list[Path], out: Path) -> list[str]:
    """The folders under other names: dill, of which `datasets` makes use, takes what is in others for a user's own."""
    names = []
    for number, site in enumerate(sites):
        link = out / f"site-{number}" / "site-packages"
        link.parent.mkdir(exist_ok=True)
        if link.resolve() != site.resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(site.resolve(), target_is_directory=True)
        names.append(str(link))
    return names


def environment_of(sites: list[str], smoke: bool) -> dict[str, str]:
    """Variables for the process of a part: where packages are, and one GPU at most."""
    paths = [str(HERE.parent / "src"), *sites, os.environ.get("PYTHONPATH", "")]
    visible = "" if smoke else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "CUDA_VISIBLE_DEVICES": visible,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def check_gpu(variables: dict[str, str]) -> None:
    """Raises ValueError where the processes of parts would find no GPU."""
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    if answer.returncode:
        why = answer.stderr.strip().splitlines()[-1:] or [f"exit status {answer.returncode}"]
        raise ValueError(f"torch cannot be imported ({why[0]}); install it, or name its folder by --site")
    if answer.stdout.split() != ["True"]:
        raise ValueError("there is no CUDA GPU here; --smoke runs everything on the CPU, in toy sizes")


def check_mode(out: Path, parts: list[str], smoke: bool) -> None:
    """Raises ValueError for a folder with figures of toy sizes, where real ones are to be taken, or the reverse."""
    for name in parts:
        if read_part(out / f"{name}.json").get("smoke", smoke) != smoke:
            kind = "without" if smoke else "with"
            raise ValueError(f"--out {out} holds the part {name} of a start {kind} --smoke; name another folder")


def minutes(text: str) -> float:
    """Minutes of the command line; raises argparse.ArgumentTypeError for what is not above 0."""
    if not (text.replace(".", "", 1).isdigit() and float(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def packages(text: str) -> Path:
    """A folder of the command line; raises argparse.ArgumentTypeError where there is none."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return Path(text)


def check_tokens(path: Path) -> None:
    """Raises ValueError for a file that is not, or not wholly, what `carried_tokens.py` writes."""
    try:
        with lzma.open(path) as whole, tarfile.open(fileobj=whole, mode="r|") as archive:
            is_tokens = "corpus.json" in archive.getnames()
            # What stands behind the archive's end tells whether the file is whole.
            while whole.read(2**20):
                pass
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise ValueError(f"--tokens {path} cannot be read ({error}); write it by carried_tokens.py") from error
    if not is_tokens:
        raise ValueError(f"--tokens {path} holds no text; write it by carried_tokens.py")


def run_beside(shares: list[list[str]], command: list[str]) -> None:
    """Has a process of this command run each share of the parts, all at once."""
    processes = []
    try:
        for share in shares:
            processes.append(subprocess.Popen([*command, "--parts", *share], stdout=subprocess.DEVNULL))
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            end_process(process)


def summary(out: Path, parts: list[str]) -> dict[str, Any]:
    """All parts' status and cases; where they come from is in their files."""
    figures = {}
    for name in parts:
        part = read_part(out / f"{name}.json")
        kept = {key: value for key, value in part.items() if key in ("cases", "error")}
        figures[name] = {"status": status(part), **kept}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the parts' files")
    parser.add_argument("--minutes", type=minutes, default=20, help="begin to end after this many minutes")
    parser.add_argument(
        "--site", type=packages, action="append", default=[], help="folder of packages; several by repeating"
    )
    parser.add_argument("--tokens", type=Path, help="text of the isoFLOP study, from carried_tokens.py")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="only these parts")
    parser.add_argument("--retry", action="store_true", help="try again what failed in an earlier start")
    parser.add_argument("--smoke", action="store_true", help="everything once on the CPU, in toy sizes")
    parser.add_argument("--commit", help="commit of a source tree that is not git's, for the parts' files")
    parser.add_argument("--part", choices=list(LIMITS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    if arguments.part:
        raise SystemExit(run_one(arguments.part, arguments.out, arguments.tokens, arguments.smoke, arguments.commit))
    # So that the process of a part ends with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(arguments)
    except ValueError as error:
        parser.error(str(error))


def run(arguments: argparse.Namespace) -> None:
    """Runs the parts that are asked for.

    Raises:
        ValueError: for what cannot be run.
    """
    out, is_smoke = arguments.out, arguments.smoke
    end = time.monotonic() + arguments.minutes * 60
    try:
        out.mkdir(parents=True, exist_ok=True)
        variables = environment_of(named_site_packages(arguments.site, out), is_smoke)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}); name another folder") from error
    # The study without its text is no part.
    parts = [name for name in arguments.parts if name != "isoflop" or arguments.tokens or is_smoke]
    paths = {name: out / f"{name}.json" for name in parts}
    check_mode(out, parts, is_smoke)
    if arguments.tokens is not None:
        check_tokens(arguments.tokens)
    if not is_smoke and not all(read_part(path)["complete"] for path in paths.values()):
        check_gpu(variables)
    shares = [[name for name in parts if (name in LONGEST_OF_SMOKE) == is_longest] for is_longest in (True, False)]
    # A process that has one share alone runs it itself.
    if is_smoke and all(shares):
        with only_owner(list(paths.values())):
            pass
        run_beside(shares, [sys.executable, *sys.argv])
    with only_owner(list(paths.values())) as descriptors:
        for name, path in paths.items():
            if arguments.retry:
                forget_failures(path)
            left = end - time.monotonic()
            if not read_part(path)["complete"] and left > 0:
                command = [sys.executable, str(HERE / "gpu.py"), "--out", str(out), "--part", name]
                command += ["--smoke"] if is_smoke else []
                command += ["--commit", arguments.commit] if arguments.commit else []
                command += ["--tokens", str(arguments.tokens.resolve())] if arguments.tokens else []
                run_part(path, command, variables, float("inf") if is_smoke else LIMITS[name], left, descriptors)
            part = read_part(path)
            print(f"{name}: {status(part)}, {len(part['cases'])} cases", file=sys.stderr, flush=True)
    figures = summary(out, parts)
    print(json.dumps({"benchmark": "gpu", "smoke": is_smoke, "parts": figures}))
    raise SystemExit(any(part["status"] == "failed" for part in figures.values()))


if __name__ == "__main__":
    main()
