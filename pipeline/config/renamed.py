"""Former names of settings and stages, and nanochat's names. Add a line for each renaming."""

NOW = {
    # earlier versions
    "overlap": "contamination_text or contamination_rows",
    "overlap_text": "contamination_text",
    "overlap_rows": "contamination_rows",
    "data.kind": "data.source",
    # nanochat's flags
    "depth": "model.depth",
    "max_seq_len": "model.sequence_len",
    "device_batch_size": "launch.device_batch_size",
    "total_batch_size": "pretrain.params.total_batch_tokens",
    "num_iterations": "pretrain.params.steps",
    "target_param_data_ratio": "pretrain.params.tokens_per_param",
    "matrix_lr": "optim.matrix_lr",
    "embedding_lr": "optim.embedding_lr",
    "unembedding_lr": "optim.unembedding_lr",
    "weight_decay": "optim.weight_decay",
    "grad_clip": "pretrain.params.grad_clip",
    "eval_every": "pretrain.params.eval_every",
    "num_epochs": "sft.params.epochs",
    "init_lr_frac": "sft.params.lr_frac",
    "model_tag": "run.name",
}


def hint(name: str) -> str:
    """A sentence with the present name of a setting; empty if the name given was never in use."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if now := NOW.get(".".join(parts[:length])):
            return f"It is called {now} here."
    return ""
