"""Several processes, and weights that DeepSpeed or FSDP has split over them."""
