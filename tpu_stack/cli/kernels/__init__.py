"""`tpu-stack kernels ACTION`: verify, explain, profile and tune the kernels without a TPU.

Example:
    main(["kernels", "explain", "--format", "int4", "--chip", "8i", "--shape", "16,4096,14336"])
"""

ACTIONS = {
    "verify": "check every kernel: its numbers, races, lowering, compiling, and the roofline",
    "explain": "which matmul runs for a format, chip and shape, and why",
    "profile": "count a compiled kernel's bundles, unit by unit",
    "tune": "search tiles and scale modes by the bundles of compiled kernels",
}
"""Action -> one line of help; each is a module with `Options` and `run`."""
