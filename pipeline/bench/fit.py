"""Whether d32 trains with a micro-batch of 8 rows at context 2,048 in 80 GB: tried under that limit, on GPUs."""

from typing import Any

from pipeline.bench import configs
from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench, Skipped
from pipeline.bench.timing import Ceiling
from pipeline.bench.trainings import WARM_STEPS, StopWatch, free_memory, prepared, run_trainer

LIMIT_BYTES = 80e9


def measure(bench: Bench) -> Result:
    """Peak memory, allocated and held by the allocator, of whole steps with the optimiser. fits: it did not run out.

    If it does not fit and the GPU has more, it is measured again without the limit.
    """
    if bench.device.type != "cuda":
        raise Skipped("needs CUDA")
    import torch

    total = torch.cuda.get_device_properties(bench.device).total_memory
    name = "tiny" if bench.settings.tiny else "d32"
    limited = _peak(bench, name, min(1.0, LIMIT_BYTES / total)) | {"limit_gb": LIMIT_BYTES / 1e9}
    if limited["fits"] or total <= LIMIT_BYTES:
        return {name: limited}
    bench.save({name: limited})
    return {name: limited, f"{name} without the limit": _peak(bench, name, 1.0)}


def _peak(bench: Bench, name: str, share: float) -> dict[str, Any]:
    """share: the part of the GPU's memory that may be used."""
    import torch

    free_memory(bench)
    torch.cuda.reset_peak_memory_stats(bench.device)
    torch.cuda.set_per_process_memory_fraction(share, bench.device)
    try:
        config = configs.compose(bench, configs.JOBS[name])
        with prepared(bench, config, WARM_STEPS + bench.settings.repeats, True) as training:
            watch = StopWatch(Ceiling(bench.device, torch.float32, tiny=True))
            run_trainer(training, watch)
            return {
                "fits": True,
                "allocated_gb": torch.cuda.max_memory_allocated(bench.device) / 1e9,
                "held_gb": torch.cuda.max_memory_reserved(bench.device) / 1e9,
                "tok_s": training.work.total_batch_tokens / watch.median,
            }
    except torch.OutOfMemoryError as error:
        return {"fits": False, "why": str(error).splitlines()[0]}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
