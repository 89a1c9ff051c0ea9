"""The few constants that turn arithmetic into time: what chips achieve, what trainers expose.

Every constant is a share or a count with a physical meaning, and is the same for every row and
model. `PRIOR` is what one would write down before looking at any published step time; the fitted
values lie in `fitted.json` and are made from these by `planner.backtest.calibrate`.

>>> Constants().mxu("v5p"), Constants().with_changes({"flash": 0.5}).flash
(0.85, 0.5)
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Shares lie from 0 to 1, the rest at 0 or above.

    Train and prefill:
      mxu_v4 ... mxu_7x: share of the peak that a large matmul reaches.
      width_half: model width at which a matmul reaches half of that share.
      hbm: share of the HBM bandwidth that streaming passes reach.
      flash, flash_wide: MXU share of a flash-attention kernel, relative to a large matmul's, on
        chips with a matrix unit 128 and 256 wide; heads are padded to it.
      passes: times that an activation of a layer is read or written outside matmuls (norms, rope,
        residuals, gating), forward and backward, in bfloat16.
      logit_passes: the same for the float32 logits.
      score_passes: the same for float32 scores where attention is not a flash kernel.
      grouped_half: width of an expert, on one device, at which a grouped matmul reaches half of a
        large one's MXU share.
      dispatch: share of the HBM bandwidth at which tokens are permuted to experts and back.
      int8, fp8: share of the dense matmuls' time that runs at the 8-bit rate where the recipe
        trains so. low_experts: the same for expert matmuls, relative to dense ones.
      fsdp, tensor, expert: share of a collective's time that compute never hides.
      data: the same for the all-reduce of gradients over replicas.
      straggle: relative slow-down a doubling of the slices brings.
      dcn: share of the data-center network's bandwidth that the gradient exchange reaches.
      host: bytes/s a chip exchanges with its host, one way, when activations are offloaded.
      layer_s: fixed seconds a layer and pass cost.
      step_s: fixed seconds a train step costs (input, dispatch, metrics).
    """

    mxu_v4: float = 0.85
    mxu_v5e: float = 0.85
    mxu_v5p: float = 0.85
    mxu_v6e: float = 0.70
    mxu_7x: float = 0.70
    width_half: float = 300.0
    hbm: float = 0.80
    flash: float = 0.60
    flash_wide: float = 0.80
    passes: float = 30.0
    logit_passes: float = 6.0
    score_passes: float = 10.0
    grouped_half: float = 1024.0
    dispatch: float = 0.15
    int8: float = 0.5
    fp8: float = 0.8
    low_experts: float = 0.5
    fsdp: float = 0.15
    tensor: float = 0.4
    expert: float = 0.5
    data: float = 0.5
    straggle: float = 0.025
    dcn: float = 0.5
    host: float = 16e9
    layer_s: float = 20e-6
    step_s: float = 5e-3

    def mxu(self, chip: str) -> float:
        """The share of the chip's peak that a large matmul reaches; 8t and 8i take 7x's."""
        return getattr(self, f"mxu_{chip}", self.mxu_7x)

    def quantized_shares(self, activations: str) -> tuple[float, float]:
        """Shares of dense and of expert matmuls that run at the rate of `activations`."""
        dense = {"int8": self.int8, "fp8": self.fp8}.get(activations, 0.0)
        return dense, dense * self.low_experts

    def flash_share(self, matrix_unit: int) -> float:
        """The constant for a matrix unit so many columns wide."""
        return self.flash if matrix_unit <= 128 else self.flash_wide

    def grouped_share(self, width: float) -> float:
        """MXU share of a grouped matmul over a large one's: narrow experts fill no tile."""
        return width / (width + self.grouped_half)

    def with_changes(self, changes: Mapping[str, float]) -> "Constants":
        """A copy with these constants changed."""
        return dataclasses.replace(self, **changes)


PRIOR = Constants()


@dataclass(frozen=True)
class ServeConstants:
    """Constants of decode and serving.

    Attributes:
      weights_hbm, cache_hbm: share of the HBM bandwidth at which weights and cache are read.
      decode_mxu: MXU share of a matmul of few rows, relative to a large one's.
      prefill: the same for an engine's prefill, padding and interruptions included.
      layer_s, moe_layer_s: fixed seconds of a layer, and of routing in a layer with experts.
      pair_passes: times that a row of the model's width is read or written, on every device, per
        expert that it is sent to and layer: gathered, masked, scaled, put back and added up.
      latent_cache: how often a latent cache's bytes are moved, for it is expanded as it is read;
        every device of a replica reads all of it.
      collectives: share of a collective's time that is exposed.
      engine_s: fixed seconds of an engine's step. request_s: of a request, where prompts are run
        one at a time.
    """

    weights_hbm: float = 0.85
    cache_hbm: float = 0.70
    decode_mxu: float = 0.50
    prefill: float = 0.60
    layer_s: float = 5e-6
    moe_layer_s: float = 150e-6
    pair_passes: float = 28.0
    latent_cache: float = 1.0
    collectives: float = 0.5
    engine_s: float = 3e-3
    request_s: float = 8e-3

    def with_changes(self, changes: Mapping[str, float]) -> "ServeConstants":
        """A copy with these constants changed."""
        return dataclasses.replace(self, **changes)


SERVE_PRIOR = ServeConstants()
