"""How long training is expected to take where nothing was measured yet."""

from model.config import GPTConfig

H100_FLOPS, USUAL_MFU = 989e12, 0.45  # of GPUs whose kind is not known while planning


def training_seconds(config: GPTConfig, tokens: float, device: str, nproc: int) -> float | None:
    """Seconds on `nproc` H100-like GPUs at the usual utilisation; None on CPUs, which differ too much."""
    if device != "cuda":
        return None
    return tokens * config.flops_per_token() / (H100_FLOPS * USUAL_MFU * nproc)
