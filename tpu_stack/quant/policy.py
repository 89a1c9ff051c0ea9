"""Which tensors of a model a weight format applies to, and what the others are stored as.

>>> stored_format(spec, "int4").name
'int4'
"""

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
