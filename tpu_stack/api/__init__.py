"""The library: what a verb does, as functions. `import tpu_stack as ts` offers them.

Each takes what the verb takes and returns what the verb prints: `tpu-stack train` is `ts.train`.
Files are written where `out` says, and nowhere else.

    run = ts.train("nano", "8t", out="runs/a", steps=100)
    ts.pack("runs/a", "int4", out="runs/a-int4")
    with ts.open("runs/a-int4") as model:
        print(model.generate("def ", max_tokens=32))
"""
