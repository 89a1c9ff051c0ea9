"""`tpu-stack plan memory`: whether a program fits, what takes the memory, and what would fit."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.cli.plan.program_options import ProgramOptions
from tpu_stack.units import bytes_text

TOP = 10


@dataclass(frozen=True)
class Options(ProgramOptions):
    """Predict the HBM that a program takes on one device, by formula and in milliseconds; where it
    does not fit, print the nearest changes that do, each checked. Exit status 1: it does not fit.

    --confirm also compiles the program and every change. --cases prints the predictions of recorded
    programs beside the compiler's figures; exit status 1: an error over 10% or a wrong verdict.

    Example: tpu-stack plan memory --model llama3_8b --profile v5e:4x4 --program train
    """

    confirm: bool = False
    """Also compile the program and every change; with --cases, compile and record every case."""
    cases: bool = False
    """Show the recorded cases instead of a model."""
    json: Path | None = None
    """Also write the result to this file."""


def run(options: Options) -> int:
    """Prints the verdict; returns 0 when it fits, else 1."""
    from rich.console import Console

    with Console(stderr=True).status("predicting") as status:
        stage = status.update
        if options.cases and options.confirm:
            _renew_cases(options, stage)
        result = None if options.cases else _look(options, stage)
    if result is None:
        return _print_cases(options)
    save_json(options.json, result)
    _print_terms(options, result)
    _print_changes(result)
    _print_compiled(result)
    return 0 if result.get("compiled", result)["fits"] else 1


def _look(options: Options, stage: Callable[[str], None]) -> dict[str, Any]:
    """The verdict, JSON-ready: the prediction, the changes, and with --confirm the compiler's."""
    from tpu_stack.planner.aot.request import make_request
    from tpu_stack.planner.memory.changes import changes
    from tpu_stack.planner.memory.predict import Verdict

    spec = options.spec()
    verdict = Verdict.of(make_request(spec))
    result: dict[str, Any] = {"spec": asdict(spec), **_verdict_json(verdict)}
    if options.confirm:
        result["compiled"] = _compiled_json(verdict, options, stage)
    result["changes"] = []
    for change in changes(verdict.request):
        row: dict[str, Any] = {"kind": change.kind, "text": change.text, "keeps": change.keeps}
        row |= _verdict_json(change.verdict, terms=False)
        if options.confirm:
            row["compiled"] = _compiled_json(change.verdict, options, stage)
        result["changes"].append(row)
    return result


def _verdict_json(verdict: Any, terms: bool = True) -> dict[str, Any]:
    prediction = verdict.prediction
    found = {
        "mesh": dict(verdict.request.profile.mesh),
        "fits": verdict.fits,
        "total_bytes": prediction.total_bytes,
        "held_bytes": prediction.held_bytes,
        "limit_bytes": verdict.limit_bytes,
        "over_bytes": max(0, verdict.over_bytes),
        "moment": prediction.moment,
    }
    if terms:
        found["terms"] = [asdict(term) for term in prediction.at_most]
        found["code_bytes"] = prediction.code
        found["beside"] = [asdict(term) for term in prediction.beside]
    return found


def _compiled_json(verdict: Any, options: Options, stage: Callable[[str], None]) -> dict[str, Any]:
    from tpu_stack.planner.memory.confirm import confirm

    return asdict(confirm(verdict.request, timeout_s=options.timeout, stage=stage))


def _print_terms(options: Options, result: dict[str, Any]) -> None:
    limit = result["limit_bytes"]

    def row(term: dict[str, Any]) -> list[str]:
        share = f"{term['bytes'] / limit:.1%}"
        return [term["name"], bytes_text(term["bytes"]), share, term["shape"], term["owner"]]

    rows = [row(term) for term in result["terms"]]
    rows.append(["the program's code", bytes_text(result["code_bytes"]), "", "", ""])
    rows += [
        row({**term, "name": f"outside the program, {term['name']}"}) for term in result["beside"]
    ]
    total = result["held_bytes"]
    rows.append(["in all, predicted", bytes_text(total), f"{total / limit:.1%}",
                 f"at the {result['moment']}", f"of {bytes_text(limit)} of HBM"])  # fmt: skip
    mesh = ",".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    print_table(
        f"{options.model}, {options.program}, {options.profile}, {mesh}: one device",
        ["what", "bytes", "of HBM", "shape", "layers and mesh axes"],
        rows,
    )
    if result["fits"]:
        print(f"\nFITS: {bytes_text(limit - total)} to spare, predicted (rung 4)")
        return
    first, second = result["terms"][:2]
    print(
        f"\nDOES NOT FIT: {bytes_text(result['over_bytes'])} too much, predicted (rung 4);"
        f" most of it is {first['name']} ({bytes_text(first['bytes'])}, {first['owner']})"
        f" and {second['name']} ({bytes_text(second['bytes'])}, {second['owner']})"
    )


def _print_changes(result: dict[str, Any]) -> None:
    if result["fits"]:
        return
    rows = []
    for change in result["changes"]:
        row = [change["text"], change["keeps"], bytes_text(change["total_bytes"])]
        compiled = change.get("compiled")
        if compiled:
            row.append(f"{bytes_text(compiled['total_bytes'])}, {_fits_text(compiled['fits'])}")
        rows.append(row)
    columns = ["change", "keeps", "then takes, predicted"]
    columns += ["compiled"] if rows and len(rows[0]) > len(columns) else []
    if rows:
        print_table("\nthe nearest changes that fit, one at a time", columns, rows)
    else:
        print("no single change fits: more chips, or two changes together")


def _fits_text(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def _print_compiled(result: dict[str, Any]) -> None:
    compiled = result.get("compiled")
    if not compiled:
        return
    rows = [[bytes_text(b["bytes"]), b["shape"], b["what"], b["owner"]]
            for b in compiled["largest"][:TOP]]  # fmt: skip
    if rows:
        columns = ["bytes", "shape on one device", "what", "layers and axes"]
        print_table("\nthe largest buffers when it holds the most, compiled", columns, rows)
    off = result["total_bytes"] / compiled["total_bytes"] - 1
    how = "" if compiled["exact"] else " (by the compiler's out-of-memory error)"
    print(
        f"compiled (rung 3): {bytes_text(compiled['total_bytes'])}{how},"
        f" {_fits_text(compiled['fits'])}; predicted {off:+.1%}"
    )


def _renew_cases(options: Options, stage: Callable[[str], None]) -> None:
    """Compiles every case and records the result."""
    from tpu_stack.planner.memory.cases import CASES, record

    for case in CASES:
        record(case, options.timeout, lambda name, case=case: stage(f"{case.name}: {name}"))


def _print_cases(options: Options) -> int:
    """Prints the cases; returns 0 when all errors are within 10% and all verdicts agree."""
    from tpu_stack.planner.memory.cases import rows

    found = rows()
    table = [
        [row.case.name, row.case.spec.model, row.case.spec.profile,
         bytes_text(row.verdict.prediction.total_bytes),
         bytes_text(row.compiled["total_bytes"]) if row.compiled else "not compiled",
         f"{row.error:+.1%}" if row.error is not None else "-",
         _fits_text(row.verdict.fits), {True: "yes", False: "NO", None: "-"}[row.agrees],
         "written with it" if row.case.seen else "predicted it first"]
        for row in found
    ]  # fmt: skip
    columns = ["case", "model", "profile", "predicted", "compiled", "error", "verdict", "agrees",
               "the formulas"]  # fmt: skip
    print_table("memory per device, predicted beside the compiler's", columns, table)
    save_json(options.json, {"rows": [
        {"name": row.case.name, **_verdict_json(row.verdict, terms=False), "error": row.error,
         "agrees": row.agrees, "seen": row.case.seen, "compiled": row.compiled}
        for row in found
    ]})  # fmt: skip
    good = all(row.error is not None and abs(row.error) <= 0.1 and row.agrees for row in found)
    return 0 if good else 1
