"""One complete training step of DINO, compared with the reference and with the fastest form of stock PyTorch.

    python bench/bench_step.py --arch vit_tiny --batch 4 --steps 8 --json step.json
    python bench/bench_step.py --reference-repo PATH ...      also measures a clone of facebookresearch/dino
    python bench/bench_step.py --methods dino,byol,swav ...   measures methods of ours in place of peers, without drop
                                                              path; --public FOLDER: and the public code of each

Every provider runs in a separate process, to measure its peak memory: maximum resident (CPU) or allocated (CUDA). The
providers alternate, one step each, from the same weights, on the same random crops, which are computed before. Phases
are timed in additional steps, because their timers synchronize. Ours runs with the environment variables that
dino-train sets, the others without. On a GPU the providers run one after the other, because together they may not fit
in its memory; ours has no phases there, since it is one CUDA graph.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from machine import output_of
from step_peers import FIRST_STEP, PEERS, PHASES, SIZES, STEPS_PER_EPOCH, ReferenceRepo, Setting, start_weights

BATCHES = 4  # number of different batches, used in turn
PHASE_STEPS = 4  # maximum
# Cores that other programs may use. They slow down the peers most, because threads of the peers spin while they wait:
# with one of two cores busy their steps took 4 times as long, ours, whose threads sleep, did not take longer.
MOST_OTHERS = 0.1


# --- the process of a provider -----------------------------------------------------------------------


def learner(setting: Setting, precision: str, **changes: Any):
    """A Learner with the default configuration except for `setting` and `changes`."""
    from dino_train.config.pretrain import PretrainConfig

    config = PretrainConfig(
        arch=setting.arch,
        patch_size=setting.patch,
        out_dim=setting.out_dim,
        head_hidden_dim=setting.hidden,
        drop_path_rate=setting.drop_path,
        precision=precision,
        batch_size_per_gpu=setting.batch,
        lr=setting.lr,
        global_crops_size=setting.global_size,
        local_crops_number=setting.local_crops,
        local_crops_size=setting.local_size,
        **changes,
    )
    return started(config, setting)


def started(config: Any, setting: Setting):
    """The Learner of a configuration, in a process with the settings of dino-train pretrain."""
    from dino_train.common.process import tune, use_huge_pages
    from dino_train.engine.learner import Learner

    tune()
    made = Learner(config, STEPS_PER_EPOCH, torch.device(setting.device))
    use_huge_pages()
    return made


def ours(setting: Setting, weights: dict[str, torch.Tensor], precision: str, **changes: Any):
    made = learner(setting, precision, **changes)
    made.load_state_dict({**made.state_dict(), "student": weights, "teacher": weights})
    return made


def config_of(variant: str, setting: Setting, precision: str):
    """A method with its own crops and heads, on the backbone of the setting."""
    from dino_train.config.presets import recipe
    from dino_train.config.pretrain import PretrainConfig
    from dino_train.engine.compare import VARIANTS

    settings = {**recipe(VARIANTS[variant]["method"], "none"), **VARIANTS[variant]}
    settings |= {"arch": setting.arch, "patch_size": setting.patch, "drop_path_rate": setting.drop_path}
    return PretrainConfig(**settings, precision=precision, batch_size_per_gpu=setting.batch, device=setting.device)


def build(
    name: str, setting: Setting, precision: str, *, public: Path | None = None, reference_repo: Path | None = None
) -> Any:
    """The provider `name`, with a method step(step, crops); `public` and `reference_repo` hold others' code."""
    if name.startswith("method "):
        return started(config_of(name.removeprefix("method "), setting, precision), setting)
    if public and name.startswith("public "):
        from method_peers import PublicMethod

        _, variant, dtype = name.split()
        config = config_of(variant, setting, dtype)
        return PublicMethod(public, variant, setting, config, getattr(torch, dtype))
    weights = start_weights(setting)
    if name == "ours_plain":  # eager, also on a GPU
        return ours(setting, weights, precision, cuda_graph=False)
    if name.startswith("ours"):
        return ours(setting, weights, "float32" if name == "ours_float32" else precision)
    if reference_repo and name == "reference_repo":
        return ReferenceRepo(reference_repo, setting, weights)
    return PEERS[name](setting, weights)


class PhaseTimer:
    def __init__(self, synchronize) -> None:
        self.synchronize, self.ms = synchronize, defaultdict(float)
        self.last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        self.synchronize()
        now = time.perf_counter()
        self.ms[phase] += 1e3 * (now - self.last)
        self.last = now


def serve(connection: Connection, name: str, setting: Setting, options: argparse.Namespace) -> None:
    """Runs one step per message: False for a normal step, True for one with timed phases; None ends the process."""
    from dino_train.common.process import peak_memory

    cuda = setting.device == "cuda"
    synchronize = torch.cuda.synchronize if cuda else int
    if options.threads:
        torch.set_num_threads(options.threads)
    trained = build(name, setting, options.precision, public=options.public, reference_repo=options.reference_repo)
    batches = [setting.crops(seed) for seed in range(BATCHES)]
    of_method = name.startswith(("method ", "public "))
    views = 2 + (trained.config.local_crops_number if of_method else setting.local_crops)
    kind = trained.config.mask_kind if of_method else None
    masks = (
        [] if kind is None else [torch.stack([torch.from_numpy(kind.draw(0, 0, i, i)) for i in range(setting.batch)])]
    )

    def take(step: int, phases: bool) -> dict[str, Any]:
        crops = [crop.to(setting.device) for crop in batches[step % BATCHES][:views] + masks]
        synchronize()
        timer = PhaseTimer(synchronize)
        trained.phase_hook = timer if phases else None
        started, own, all_of_us = time.perf_counter(), time.process_time(), busy_cpu_s()
        result = trained.step(step, crops)
        synchronize()
        ms = 1e3 * (time.perf_counter() - started)
        others = 1e3 * (busy_cpu_s() - all_of_us - (time.process_time() - own))
        return {"ms": ms, "phases": dict(timer.ms), "loss": getattr(result, "loss", result), "others_cpu_ms": others}

    steps = count(FIRST_STEP)
    take(next(steps), False)
    if cuda:  # compilers and convolution autotuning are done; the graph is captured later
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.warmup - 1):
        take(next(steps), False)
    connection.send(torch.get_num_threads())
    busy = time.process_time()
    while (phases := connection.recv()) is not None:
        idle_cpu = time.process_time() - busy  # CPU time of threads that wait after a step
        answer = take(next(steps), phases)
        # Peak since the second step: a replayed graph allocates nothing, so timed steps would not show its memory.
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_memory()
        connection.send(answer | {"peak_mib": peak, "idle_cpu_ms": 1e3 * idle_cpu})
        busy = time.process_time()


def busy_cpu_s() -> float:
    """CPU time that all processes, and other virtual machines of this host, have used on our cores so far."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    # All columns but idle, iowait and guest, which is included in user.
    ticks = sum(int(x) for core, *times in lines if core in cores for x in (*times[:3], *times[5:8]))
    return ticks / os.sysconf("SC_CLK_TCK")


# --- the run -----------------------------------------------------------------------------------------


class Provider:
    """The other end of `serve`."""

    def __init__(self, name: str, setting: Setting, options: argparse.Namespace) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, setting, options), daemon=True)
        before = dict(os.environ)
        os.environ.update(dino_train_environment() if name.startswith(("ours", "method ")) else {})
        self.process.start()
        os.environ.clear()
        os.environ.update(before)
        theirs.close()
        self.threads = self.receive()

    def step(self, phases: bool) -> dict[str, Any]:
        time.sleep(0.02)  # threads of the previous provider still spin for some milliseconds
        self.connection.send(phases)
        return self.receive()

    def end(self) -> None:
        self.connection.send(None)
        self.process.join()

    def receive(self):
        try:
            return self.connection.recv()
        except EOFError:
            sys.exit(f"bench_step.py: {self.name} failed, see above")


@cache
def dino_train_environment() -> dict[str, str]:
    """The environment variables that dino-train sets. Some must be set before a process starts."""
    code = "import json, os; from dino_train.common.process import tune; tune(); print(json.dumps(dict(os.environ)))"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))


def measure(setting: Setting, names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    if setting.device == "cpu":
        return take_turns(setting, names, options)
    return {name: row for alone in names for name, row in take_turns(setting, [alone], options).items()}


def take_turns(setting: Setting, names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    providers = [Provider(name, setting, options) for name in names]
    rounds = [False] * options.steps + [True] * min(options.steps, PHASE_STEPS)
    answers: dict[str, list[dict]] = defaultdict(list)
    for phases in rounds:
        for provider in providers:
            answers[provider.name].append(provider.step(phases))
    for provider in providers:
        provider.end()
    return {p.name: summary(answers[p.name], setting.batch, options.steps) | {"threads": p.threads} for p in providers}


def summary(answers: list[dict], batch: int, steps: int) -> dict[str, Any]:
    plain, timed = answers[:steps], [answer["phases"] for answer in answers[steps:]]
    median_ms = statistics.median(answer["ms"] for answer in plain)
    return {
        "images_per_s": 1e3 * batch / median_ms,
        "step_ms": median_ms,
        "peak_mib": plain[-1]["peak_mib"],
        "phases": {name: statistics.median(t[name] for t in timed) for name in PHASES if all(name in t for t in timed)},
        "all_step_ms": [answer["ms"] for answer in plain],
        "losses": [answer["loss"] for answer in plain],
        "others_cores": statistics.median(answer["others_cpu_ms"] / answer["ms"] for answer in plain),
        "idle_cpu_ms": statistics.median(answer["idle_cpu_ms"] for answer in answers[1:]),
    }


def machine() -> dict[str, Any]:
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    gpu = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return {"cpu": models[0] if models else platform.machine(), "cores": len(os.sched_getaffinity(0)), "gpu": gpu}


def tables(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown tables: speed and memory of all providers with ratios to ours, then the phases."""
    ours_row = rows.get("ours")
    lines = [
        "| provider | images/s | step ms | speed, ours / it | peak MiB | memory, ours / it |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        speed = f"{row['step_ms'] / ours_row['step_ms']:.2f}" if ours_row else ""
        step = f"{row['step_ms']:.0f} ({min(row['all_step_ms']):.0f} to {max(row['all_step_ms']):.0f})"
        memory = f"{ours_row['peak_mib'] / row['peak_mib']:.2f}" if ours_row else ""
        cells = (name, f"{row['images_per_s']:.2f}", step, speed, f"{row['peak_mib']:.0f}", memory)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| phase, ms | {' | '.join(PHASES)} |", "|---|" + "--:|" * len(PHASES)]
    for name, row in rows.items():
        cells = [f"{row['phases'][phase]:.1f}" if phase in row["phases"] else "" for phase in PHASES]
        lines.append(f"| {' | '.join([name, *cells])} |")
    if (others := max(row["others_cores"] for row in rows.values())) > MOST_OTHERS:
        lines += ["", f"Other programs used {others:.2f} cores: these times are not valid, repeat on an idle machine."]
    return "\n".join(lines)


def methods_table(rows: dict[str, dict[str, Any]], setting: Setting, precision: str) -> str:
    """What each method computes and how fast: images per second do not compare methods of different crops."""
    from dino_train.methods.flops import flops_per_image

    lines = ["| method | images/s | GFLOP/image | TFLOP/s | of the first |", "|---|--:|--:|--:|--:|"]
    first = None
    for name, row in rows.items():
        flops = flops_per_image(config_of(name.split()[1], setting, precision))
        sustained = flops * row["images_per_s"] / 1e12
        first = first or sustained
        cells = (f"{row['images_per_s']:.2f}", f"{flops / 1e9:.1f}", f"{sustained:.3f}", f"{sustained / first:.2f}")
        lines.append(f"| {name.removeprefix('method ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    at_least_one = partial(bounded, 1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", choices=(*SIZES, "resnet50"), default="vit_tiny", help="resnet50: with --methods")
    parser.add_argument("--batch", type=at_least_one, default=4, help="images per step")
    parser.add_argument("--steps", type=at_least_one, default=8, help="timed steps of each provider")
    parser.add_argument("--warmup", type=at_least_one, help="warm-up steps; default: 2, on a GPU 6")
    parser.add_argument("--local-crops", type=partial(bounded, 0), default=8)
    parser.add_argument("--out-dim", type=partial(bounded, 2), default=65536)
    parser.add_argument("--threads", type=at_least_one, help="default: that of torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of ours")
    parser.add_argument("--providers", help="comma-separated list; default: all")
    parser.add_argument("--methods", help="comma-separated list of methods, as of dino-train compare")
    parser.add_argument("--public", type=Path, help="folder with the clones that method_peers.py names")
    parser.add_argument("--reference-repo", type=Path, help="a clone of facebookresearch/dino to measure too")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    if options.warmup is None:  # ours captures a graph in step 4; the float16 scaler must adapt
        options.warmup = 6 if options.device == "cuda" else 2
    known = ["ours", *PEERS]
    if options.device == "cuda":
        known.insert(1, "ours_plain")
    elif options.precision != "float32":
        known.insert(1, "ours_float32")
    if options.reference_repo:
        known.append("reference_repo")
        if not (options.reference_repo / "main_dino.py").is_file():
            parser.error(f"--reference-repo {options.reference_repo} has no main_dino.py")
    if options.methods:
        from dino_train.engine.compare import VARIANTS
        from method_peers import available

        names = options.methods.split(",")
        public = [name for name in names if options.public and available(options.public, name, options.arch)]
        if options.public and (not public or options.device != "cpu"):
            parser.error(f"--public {options.public} has no code of these methods that runs {options.arch} on a CPU")
        peers = [f"public {name} {dtype}" for name in public for dtype in ("float32", "bfloat16")]
        known = [f"method {name}" for name in VARIANTS] + peers
        options.providers = ",".join([*(f"method {name}" for name in names), *peers])
    elif options.arch == "resnet50":
        parser.error("--arch resnet50 needs --methods: the peers are ViTs")
    options.providers = options.providers.split(",") if options.providers else known
    if unknown := set(options.providers) - set(known):
        parser.error(f"--providers: {', '.join(sorted(unknown))} not among {', '.join(known)}")
    return options


def bounded(least: int, text: str) -> int:
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
    return int(text)


def main() -> None:
    options = parse()
    setting = Setting(options.arch, options.batch, options.device, options.local_crops, options.out_dim)
    if options.methods:
        setting = replace(setting, drop_path=0.0)  # so that TFLOP/s counts what was computed
    rows = measure(setting, options.providers, options)
    print(tables(rows))
    if options.methods:
        print("\n" + methods_table(rows, setting, options.precision))
    if options.json:
        results = {
            "setting": {**vars(setting), **{k: getattr(options, k) for k in ("precision", "steps", "warmup")}},
            "versions": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=12"),
            },
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "providers": rows,
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
