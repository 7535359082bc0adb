"""`doctor`: checks what this machine and this installation can do, and what is missing."""

import importlib.util
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

from evals.sandbox.box import Sandbox
from pipeline.artifacts.locks import probe
from pipeline.commands.parser import Parser
from pipeline.config.compose import CONF
from pipeline.plan.session import Session
from pipeline.runner import machine as hardware

PACKAGES = [
    "torch",
    "prefect",
    "fastapi",
    "hydra-core",
    "gradio",
    "tiktoken",
    "tokenizers",
    "rustbpe",
    "pyarrow",
    "wandb",
]


def doctor(arguments: list[str]) -> int:
    """Print one line per finding. Returns 1 if something that is needed does not work."""
    session = Session.open(Parser("doctor").parse(arguments).overrides)
    machine = hardware.describe()
    print(f"machine     {machine['cores']} cores, {machine['gpus']} GPUs, {machine['cpu']}, {machine['system']}")
    print(f"python      {machine['python']} ({sys.executable})")
    missing = 0
    for package in PACKAGES:
        try:
            print(f"{package:<11} {version(package)}")
        except PackageNotFoundError:
            missing += 1
            print(f"{package:<11} MISSING: pip install -e .")
    root = session.store.root
    probe(root / "locks")
    free = shutil.disk_usage(root).free / 1e9
    print(f"store       {root}: {free:.1f} GB free, file locks work")
    print(f"config      {CONF}, recipe={session.settings.recipe}, launch nproc={session.settings.launch.nproc}")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    print(f"compiler    {compiler or 'none: launch.compile=true will not work on CPU; everything else does'}")
    weakness = Sandbox().weakness
    advice = f"{weakness}. Set launch.sandbox=weak to run model-written programs anyway"
    print(f"sandbox     {advice if weakness else 'model-written programs are fully confined'}")
    if importlib.util.find_spec("torch"):
        import torch

        from model.kernels import matmul

        backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        print(f"devices     {', '.join(['cpu', *(name for name, found in backends.items() if found)])}")
        by = "oneDNN, as MKL leaves AVX-512 unused here" if matmul.available() else "torch's own choice"
        print(f"float32     multiplied on CPUs by {by}")
    return 1 if missing else 0
