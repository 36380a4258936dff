"""Several processes: DDP and FSDP2 on torchrun."""
