"""What a training recipe recomputes and what it sends to the host, read from its policy's text.

The names are those of MaxText ("full", "minimal", "custom:query_proj=offload,..."), AXLearn and
Levanter. A recompute of a whole layer never needs the MLP's last matmul, whose output only the
next layer reads.

>>> Remat.parse("custom:decoder_layer_input=offload,out_proj=device").out
0.0
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Remat:
    """Shares recomputed in the backward pass, 0 or 1: `qkv` and `out` projections, the attention
    `scores`, the MLP's matmuls `mlp` but the last.

    `offloaded` names the saved tensors that travel to the host and back: "input" of a layer, "qkv",
    "out", "mlp_out". `assumed` says what was taken for granted, "" when the text was clear.
    """

    qkv: float = 1.0
    out: float = 1.0
    scores: float = 1.0
    mlp: float = 1.0
    offloaded: tuple[str, ...] = ()
    assumed: str = ""

    @classmethod
    def parse(cls, text: str) -> "Remat":
        """The policy that `text` names; an empty or unknown one is taken for a full recompute."""
        policy = text.strip().lower()
        if policy.startswith("custom"):
            return _custom(policy)
        if policy.startswith("full") or "(full)" in policy:
            return cls(offloaded=("input",) if "decoder_layer_input=offload" in policy else ())
        if policy.startswith("none"):
            return cls(0.0, 0.0, 0.0, 0.0)
        if policy.startswith(("qkv_proj_offloaded",)):
            return cls(qkv=0.0, offloaded=("qkv",))
        if policy.startswith("offload_attention_proj"):
            return cls(qkv=0.0, out=0.0, offloaded=("qkv", "out"))
        if policy.startswith("save_qkv_proj"):
            return cls(qkv=0.0)
        if policy.startswith("save_out_proj"):
            return cls(out=0.0)
        if "except_mlp" in policy:
            return cls(qkv=0.0, out=0.0)
        if policy.startswith(("minimal", "dots", "save_dot")):
            offloaded = ("qkv", "out", "mlp_in") if "offload" in policy else ()
            return cls(qkv=0.0, out=0.0, mlp=0.0, offloaded=offloaded)
        what = f"remat policy {text!r} is not known" if policy else "remat policy not given"
        return cls(assumed=f"{what}: a full recompute was assumed")


_SAVED = {
    "decoder_layer_input": "input",
    "query_proj": "qkv", "key_proj": "qkv", "value_proj": "qkv", "qkv_proj": "qkv",
    "out_proj": "out", "context": "scores",
    "mlpwi": "mlp", "mlpwi_0": "mlp", "mlpwi_1": "mlp", "mlpwo": "mlp_out",
}  # fmt: skip


def _custom(policy: str) -> Remat:
    places = {
        _SAVED[name]: place
        for name, place in re.findall(r"(\w+)=(device|offload)", policy)
        if name in _SAVED
    }
    qkv, out, scores, mlp = (0.0 if k in places else 1.0 for k in ("qkv", "out", "scores", "mlp"))
    offloaded = tuple(name for name, place in places.items() if place == "offload")
    return Remat(qkv, out, scores, mlp, offloaded)
