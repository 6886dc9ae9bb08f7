"""What it takes to extend maskhooks from outside: a third-party wheel with a part of each kind, installed and used.

Builds the wheels of maskhooks and of the example plugin in tests/plugins/example, installs both into a fresh virtual
environment with pip and without a network, and there fits and explains with one part of each kind, from Python and from
the command line. The libraries that maskhooks depends on are not installed again: a .pth file shows the new environment
those of the one that runs this.

`kinds_registered`: kinds of parts that the installed plugin registers. `core_files_touched`: files of the installed
maskhooks that differ from the hashes in its wheel's RECORD, or are not in it, after all of this. `explainer_lines`:
lines of the explainer in docs/how-to/write-an-explainer.md that are not blank.

    python benchmarks/extension.py [--quick]
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "tests" / "plugins" / "example"
EXPLAINER = EXAMPLE / "maskhooks_example" / "shared_mask.py"
SETTINGS = {"gate": "gaussian", "baseline": "midrange", "divergence": "total-variation", "margin": 0.3}

USE = """
import json, sys, time
import maskhooks
from maskhooks.explainers.base import EXPLAINERS
from maskhooks.model.source import SOURCES, choose
from maskhooks.plugins.registry import registry

steps, settings = int(sys.argv[1]), json.loads(sys.argv[2])
opened = choose("pyramid://8", registry.parts(SOURCES)).open("pyramid://8")
rows = registry.make(EXPLAINERS, "gradient-norm", {"hooked": opened.hooked}).explain_all(opened.validation)
seconds, used = {}, [opened.hooked.task, opened.hooked.claims[0].adapter, registry.parts(SOURCES)["pyramid"]]
for name in ("diffmask", "shared-mask"):
    recipe = {"name": "example", "steps": steps}
    mask = registry.make(EXPLAINERS, name, {"hooked": opened.hooked}, recipe=recipe, **settings)
    start = time.perf_counter()
    mask.fit(opened.train, opened.validation, progress=False, accelerator="cpu")
    seconds[name] = time.perf_counter() - start
    mask.save(name)
    loaded = maskhooks.load(name, opened.hooked.model)
    assert loaded.explain(opened.validation[0]) == mask.explain(opened.validation[0])
    (masking, *_), made = mask.maskings, mask._problem()
    probe = masking.votes[0].probe
    used += [mask, mask.gate, mask.divergence, masking.baseline, probe, *made.objectives, made.penalty]
    used += [mask.recipe.make_optimizer([*probe.parameters()], [])]
report = next(report for report in registry.reports if report.distribution == "maskhooks-example")
print(json.dumps({
    "maskhooks": maskhooks.__file__,
    "error": report.error,
    "offers": [[offer.kind, offer.name] for offer in report.offers],
    "used": sorted({part.__module__.partition("maskhooks_example.")[2] for part in used} - {""}),
    "fit_seconds": seconds,
    "rows": len(rows),
}))
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(*words: str | Path, **options: Any) -> str:
    """What a command prints; its errors go to stderr."""
    return subprocess.run(list(map(str, words)), check=True, text=True, stdout=subprocess.PIPE, **options).stdout


class Environment:
    """A fresh virtual environment that sees the libraries of this one, but not its maskhooks.

    Args:
        folder: where it is made.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = next(folder.glob("lib/python*/site-packages"))
        libraries = folder / "libraries"  # links to all but maskhooks, whose distribution would be found here too
        libraries.mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not path.name.lower().lstrip("_").startswith("maskhooks") and path.suffix != ".pth":
                (libraries / path.name).symlink_to(path)
        (self.site / "libraries.pth").write_text(f"{libraries}\n")
        self.variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.variables |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def run(self, *words: str | Path, cwd: Path) -> str:
        return run(self.python, *words, cwd=cwd, env=self.variables)

    def install(self, *wheels: Path) -> None:
        options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
        self.run("-m", "pip", "install", *options, *wheels, cwd=wheels[0].parent)


def wheel(source: Path, folder: Path) -> Path:
    """The wheel of a source tree, built with the hatchling that is here."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source)
    (found,) = folder.glob("*.whl")
    return found


def touched(site: Path) -> tuple[list[str], int]:
    """The files of the installed maskhooks and its adapters that are not what the wheel's RECORD says, of how many."""
    (record,) = site.glob("maskhooks-*.dist-info/RECORD")
    hashes = {name: digest for name, digest, _ in csv.reader(record.read_text().splitlines())}
    tops = {name.split("/")[0] for name in hashes if name.endswith(".py") and "/" in name} - {"..", "__pycache__"}
    there = [path for top in tops for path in (site / top).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = {str(path.relative_to(site)): path for path in there}
    listed = {name for name in hashes if name.split("/")[0] in tops and not name.endswith(".pyc")}
    wrong = {name for name in names if name not in hashes or hashes[name] != _digest(names[name])}
    return sorted(wrong | (listed - set(names))), len(names)


def _digest(path: Path) -> str:
    found = hashlib.sha256(path.read_bytes()).digest()
    return f"sha256={base64.urlsafe_b64encode(found).rstrip(b'=').decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few training steps")
    quick = parser.parse_args().quick
    steps = 20 if quick else 200
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def done(what: str) -> None:
        nonlocal began
        seconds[what], began = time.perf_counter() - began, time.perf_counter()
        say(f"{what}: {seconds[what]:.1f} s")

    folder = Path(tempfile.mkdtemp(prefix="extension-"))
    try:
        wheels = [wheel(source, folder / name) for source, name in ((ROOT, "core"), (EXAMPLE, "example"))]
        done("build")
        environment = Environment(folder / "environment")
        environment.install(*wheels)
        done("install")
        used = json.loads(environment.run("-c", USE, str(steps), json.dumps(SETTINGS), cwd=folder).splitlines()[-1])
        assert Path(used["maskhooks"]).is_relative_to(folder), used["maskhooks"]
        assert not used["error"], used["error"]
        done("python")
        words = ["--recipe", "example", "--steps", str(steps), "--device", "cpu", "--out", "run"]
        words += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
        environment.run("-m", "maskhooks", "fit", "pyramid://8", *words, cwd=folder)
        done("maskhooks fit")
        words = ["--device", "cpu", "--out", "explained"]
        environment.run("-m", "maskhooks", "explain", "run", "pyramid://8", *words, cwd=folder)
        assert (folder / "explained" / "explanation.html").exists()
        done("maskhooks explain")
        listed = environment.run("-m", "maskhooks", "plugins", cwd=folder)
        assert listed.count("maskhooks-example 1.2.3") == len(used["offers"]), listed
        done("maskhooks plugins")
        wrong, files = touched(environment.site)
        say(f"{len(wrong)} of {files} files touched: {', '.join(wrong) or 'none'}")
    finally:
        shutil.rmtree(folder)
    result = {
        "kinds_registered": len({kind for kind, _ in used["offers"]}),
        "parts_registered": len(used["offers"]),
        "core_files_touched": len(wrong),
        "core_files": files,
        "explainer_lines": sum(bool(line.strip()) for line in EXPLAINER.read_text(encoding="utf-8").splitlines()),
        "parts_used": used["used"],
        "fit_seconds": {name: round(spent, 2) for name, spent in used["fit_seconds"].items()},
        "seconds": {name: round(spent, 1) for name, spent in seconds.items()},
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    print(json.dumps({"benchmark": "extension", "quick": quick, **result}))


if __name__ == "__main__":
    main()
