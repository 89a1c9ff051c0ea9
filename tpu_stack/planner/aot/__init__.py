"""The real train, prefill and decode steps, compiled by the real TPU compiler without a TPU.

`request` says what is compiled, `target` for which topology, `compile` does it (in a child process,
through a cache on disk), `result` is what comes of it. Only rung 3: nothing here runs a program.
Modules are imported one by one, so that a cached answer needs no JAX.

    from tpu_stack.planner.aot.compile import compile_program
    compile_program(request).memory.total_bytes
"""
