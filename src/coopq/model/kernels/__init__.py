"""How modules compute: forwards that are replaced for a while, and faster kernels for CPUs and GPUs."""
