"""`tpu-stack plan ACTION`: what a model needs of which chips, before renting any.

Example:
    main(["plan", "compile", "--model", "llama3_8b", "--profile", "v5p:4x4x4"])
"""

ACTIONS = {
    "compile": "a program compiled by the TPU compiler: memory, collectives, cycles",
    "memory": "whether a program fits, what holds the memory, what would fit",
    "simulate": "a step's time on a chip, term by term; decode against batch",
    "backtest": "published TPU results beside what the simulator predicts",
    "search": "the best mesh, batch, format and remat of all legal ones",
}
"""Action -> one line of help; each is a module here with its own `Options` and `run`."""
