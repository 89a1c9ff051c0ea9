"""`tpu-stack kernels ACTION`: the kernels proven, explained, profiled and tuned without a TPU.

Example:
    main(["kernels", "explain", "--format", "int4", "--chip", "8i", "--shape", "16,4096,14336"])
"""

ACTIONS = {
    "verify": "every kernel up the ladder: numbers, races, lowering, compiling, roofline",
    "explain": "which product runs for a format, chip and shape, and why",
    "profile": "a compiled kernel's bundles, unit by unit",
    "tune": "search tiles and scale modes by the compiler's bundles",
}
"""Action -> one line of help; each is a module here with its own `Options` and `run`."""
