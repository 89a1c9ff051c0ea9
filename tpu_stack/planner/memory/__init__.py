"""Will it fit, and why not: what a program holds on one device, predicted and as compiled.

`predict` is arithmetic (rung 4, read off what the compiler does), `buffers` reads the compiler's
own program (rung 3), `changes` finds what would fit where something does not.

    from tpu_stack.planner.memory.predict import Verdict
    Verdict.of(request).fits
"""
