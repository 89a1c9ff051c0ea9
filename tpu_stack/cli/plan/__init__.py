"""`tpu-stack plan ACTION`: which chips a model needs and what it then does, before renting any.

Example:
    main(["plan", "compile", "--model", "llama3_8b", "--profile", "v5p:4x4x4"])
"""

ACTIONS = {
    "compile": "a program by the TPU compiler: memory, collectives, cycles",
    "memory": "whether a program fits, what holds the memory, what would fit",
    "simulate": "a step's time on a chip, term by term; decode against batch",
    "backtest": "published TPU results beside the simulator's predictions",
    "search": "the best mesh, batch, format and remat of all legal ones",
}
"""Action -> one line of help; each is a module here with its own `Options` and `run`."""
