"""Weights in few bits: formats, the packed tensor, the quantizer and the one matmul models call.

>>> from tpu_stack.quant import matmul, quantize
>>> y = matmul(x, quantize(w, "int4", name="layers.mlp.up"))  # x [M, K], w [K, N]
"""

from tpu_stack.quant.formats import FORMATS, Format, get_format
from tpu_stack.quant.matmul import matmul, sharded_matmul
from tpu_stack.quant.qtensor import QTensor, abstract_qtensor
from tpu_stack.quant.quantize import quantize
from tpu_stack.quant.select import Choice, chosen_implementation, explain, use_implementation
from tpu_stack.quant.take import take

__all__ = [
    "FORMATS",
    "Choice",
    "Format",
    "QTensor",
    "abstract_qtensor",
    "chosen_implementation",
    "explain",
    "get_format",
    "matmul",
    "quantize",
    "sharded_matmul",
    "take",
    "use_implementation",
]
