"""`tpu-stack serve BUNDLE`, the server; `tpu-stack serve bench`, load on an engine without one.

Example:
    main(["serve", "runs/a-int4", "--port", "8000"])
"""

ACTIONS = {"bench": "throughput and latency of an engine under load, beside a peer's"}
"""Action -> one line of help; each is a module here with its own `Options` and `run`."""
DEFAULT = "http"
"""The module that runs where the first word names no action."""
