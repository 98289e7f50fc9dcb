"""How a step is carried out: single weights, batches, torch.compile, the kernel in C; shards and shared spheres."""
