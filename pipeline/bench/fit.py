"""Whether d32 trains with a micro-batch of 8 rows at context 2,048 in 80 GB: tried under that limit, on GPUs."""

from pipeline.bench import configs
from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench, Skipped
from pipeline.bench.timing import Ceiling
from pipeline.bench.trainings import WARM_STEPS, StopWatch, free_memory, prepared, run_trainer

RESULT_NEUTRAL = "measures; makes nothing"

LIMIT_BYTES = 80e9


def measure(bench: Bench) -> Result:
    """Peak memory, allocated and held by the allocator, of whole steps with the optimiser; fits: it did not run out."""
    if bench.device.type != "cuda":
        raise Skipped("a question to GPUs")
    import torch

    total = torch.cuda.get_device_properties(bench.device).total_memory
    name = "tiny" if bench.settings.tiny else "d32"
    config = configs.compose(bench, configs.JOBS[name])
    free_memory(bench)
    torch.cuda.reset_peak_memory_stats(bench.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_BYTES / total), bench.device)
    try:
        with prepared(bench, config, WARM_STEPS + bench.settings.repeats, True) as training:
            watch = StopWatch(Ceiling(bench.device, torch.float32, tiny=True))
            run_trainer(training, watch)
            tokens = training.work.total_batch_tokens
        return {
            name: {
                "fits": True,
                "limit_gb": LIMIT_BYTES / 1e9,
                "allocated_gb": torch.cuda.max_memory_allocated(bench.device) / 1e9,
                "held_gb": torch.cuda.max_memory_reserved(bench.device) / 1e9,
                "tok_s": tokens / watch.median,
            }
        }
    except torch.OutOfMemoryError as error:
        return {name: {"fits": False, "limit_gb": LIMIT_BYTES / 1e9, "why": str(error).splitlines()[0]}}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
