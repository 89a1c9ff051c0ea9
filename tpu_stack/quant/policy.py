"""Which tensors of a model a weight format and a rotation apply to.

>>> stored_format(spec, "int4").name
'int4'
"""

from tpu_stack.errors import UserError
from tpu_stack.quant.formats import Format, get_format
from tpu_stack.sharding.axes import TensorSpec

FLOAT_STORAGE = "bf16"


def stored_format(spec: TensorSpec, format: str) -> Format:
    """The format that `spec` is stored in when a model is packed to `format`.

    Norm scales stay bfloat16: they are a millionth of the bytes. Embedding tables are looked up by
    row, so a format with groups along the contraction stores them as int8 rows instead.
    """
    wanted = get_format(format)
    if spec.contract_axis is None:
        return wanted if wanted.name == "float32" else get_format(FLOAT_STORAGE)
    if spec.contract_axis == -1 and wanted.group is not None:
        return get_format("int8")
    return wanted


def stored_rotation(spec: TensorSpec, format: str, rotation: int) -> int:
    """The block in which `spec` is rotated when a model is packed with `rotation`, 0 for none.

    Tables that are looked up by row, and tensors that stay wider than 4 bits, are not rotated.
    Raises UserError when `format` has no 4-bit weights to rotate.
    """
    if not rotation:
        return 0
    if get_format(format).bits != 4:
        raise UserError(f"rotation is for the 4-bit formats, not {format}")
    return rotation if spec.contract_axis == -2 else 0
