"""A stage in a process of its own: `python -m pipeline.stages JOB.json`, by hand or under torchrun alike."""

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.durable import keep_json, read_json
from pipeline import typed
from pipeline.artifacts import disk
from pipeline.artifacts.locks import share_alive
from pipeline.errors import FOR_USERS
from pipeline.job import Job, Launch, Logger, Stopped
from pipeline.runner import tracking
from pipeline.runner.signals import stop_signals
from pipeline.stage import StageModule, load


def main(job_path: Path) -> int:
    described = json.loads(job_path.read_text())
    work = Path(described["work"])
    alive = share_alive(work)
    if leash := os.environ.get("CHATMILL_LEASH"):  # set by the launcher; absent when run by hand
        threading.Thread(target=_end_with_launcher, args=(leash,), daemon=True).start()
    rank = int(os.environ.get("RANK", 0))
    loggers: list[Logger] = []
    done = False
    started = time.time()
    try:
        module = load(described["module"], described["stage"])
        job = _open_job(module, described, work, rank)
        for sig in stop_signals():
            signal.signal(sig, lambda *_: setattr(job, "stop_requested", True))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what Ctrl-C means
        if rank == 0:
            job.loggers += tracking.open_loggers(described, module.SCORES, job.say)
        loggers = job.loggers
        metrics = module.main(job)
        for logger in loggers:
            logger.summary(metrics or {})
        _write_outcome(work, rank, "done", None, "", metrics=metrics or {}, started=started)
        done = True
        return 0
    except Stopped as stop:
        _write_outcome(work, rank, "stopped", "preempted", str(stop), started=started)
        return 0
    except BaseException as error:
        with suppress(OSError):  # the log may be on a full disk
            traceback.print_exc()
            sys.stderr.flush()
        _write_outcome(work, rank, "failed", cause_of(error), _message(error, work), started=started)
        return 1
    finally:
        for logger in loggers:  # after the outcome is written, as uploading may take a while
            logger.close(done)
        os.close(alive)


def cause_of(error: BaseException) -> str:
    """oom | nan | disk | data | config | peer_lost | preempted | unknown"""
    if isinstance(error, FOR_USERS):
        return error.cause
    text = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "oom"
    if disk.is_full(error):
        return "disk"
    if any(sign in text for sign in ("nccl", "gloo", "connection closed by peer", "connection reset by peer")):
        return "peer_lost"
    return "unknown"


def _message(error: BaseException, work: Path) -> str:
    text = str(error) or type(error).__name__
    if disk.is_full(error):
        return disk.full(error, work)
    if isinstance(error, (*FOR_USERS, OSError)):
        return text
    return f"{type(error).__name__}: {text}"


def _open_job(module: StageModule, described: dict[str, Any], work: Path, rank: int) -> Job[Any]:
    return Job(
        stage=described["stage"],
        key=described["key"],
        params=typed.build(module.Params, described["params"], described["stage"] + ".params"),
        launch=typed.build(Launch, described["launch"], described["stage"] + ".launch"),
        inputs={name: Path(folder) for name, folder in described["inputs"].items()},
        work=work,
        store=Path(described["store"]),
        data_identity=described.get("data_identity"),
        context=described.get("context", {}),
        rank=rank,
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )


def _end_with_launcher(leash: str) -> None:
    """End this process when the launcher does, however it ended: its end of a named pipe closes."""
    try:
        # Opened without waiting for a writer: a launcher that is gone already must not be waited for.
        fd = os.open(leash, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(fd, True)
        os.read(fd, 1)
    except OSError:
        pass  # no pipe any more: the launcher is gone as well
    print("the launcher is gone: ending", file=sys.stderr, flush=True)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(os.getpid(), signal.SIGKILL)  # helper processes too, where this process leads its group
    os._exit(1)


def _write_outcome(
    work: Path, rank: int, status: str, cause: str | None, message: str, started: float, metrics: Any = None
) -> None:
    """What became of the stage. Rank 0 tells of success; of failures, the first rank that fails."""
    path = work / "outcome.json"
    if status != "failed" and rank != 0:
        return
    outcome = {
        "status": status,
        "cause": cause,
        "message": message,
        "rank": rank,
        "metrics": metrics,
        "seconds": time.time() - started,
        "versions": _versions(),
        "device": _device(),
    }
    if status != "failed":
        keep_json(path, outcome, float)
        return
    own = work / f"outcome.{rank}.json"
    keep_json(own, outcome, float)
    with suppress(FileExistsError):
        os.link(own, path)
    if rank != 0 and (read_json(path, dict) or {}).get("cause", "peer_lost") == "peer_lost":
        os.replace(own, path)  # a lost peer is the echo of another rank's failure


def _versions() -> dict[str, str]:
    loaded = ("torch", "numpy", "pyarrow", "tiktoken", "tokenizers", "rustbpe", "huggingface_hub")
    return {n: str(getattr(sys.modules[n], "__version__", "?")) for n in loaded if n in sys.modules}


def _device() -> str | None:
    """The GPU's name, when the stage has used one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return str(torch.cuda.get_device_name())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.stages JOB.json")
    sys.exit(main(Path(sys.argv[1])))
