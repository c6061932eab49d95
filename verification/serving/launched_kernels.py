"""Expert kernels that a launch script or a release chose and no table has for the dtype and shape.

Neither has a number fitted to serving rows: rates are those of the same kernel in other tables.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.cost.calibration import Calibration, load_calibration
from moesim.cost.expert_gemm import NUM_MATRICES, ExpertGemmModel
from moesim.serving.deployment import Deployment
from moesim.serving.step_cost import calibration_of
from moesim.types import FloatArray

DEEPGEMM_ROWS = 128


def with_marlin(deployment: Deployment) -> Deployment:
    """mxfp4 experts at the arithmetic rate that the tables have of Marlin's int4 experts on H200s:
    it unpacks weights as it multiplies, at half of Triton's rate (VLLM_MXFP4_USE_MARLIN=1)."""
    int4 = load_calibration("h200-vllm").expert_ffn("int4", "vllm_tp")
    calibration = calibration_of(deployment)
    experts = {
        key: replace(model, tflops=int4.tflops, half_tokens=int4.half_tokens)
        if key[0] == "mxfp4"
        else model
        for key, model in calibration.experts.items()
    }
    return replace(deployment, calibration=replace(calibration, experts=experts))


class PaddedExperts(ExpertGemmModel):
    """Every local expert is computed with a multiple of 128 rows, idle ones with 128."""

    def slots_time_us(
        self,
        tokens: npt.ArrayLike,
        hidden: int,
        intermediate: int,
        num_matrices: int = NUM_MATRICES,
        *,
        mean_tokens: npt.ArrayLike | None = None,
    ) -> FloatArray:
        """As the model, after padding."""
        tiles = np.ceil(np.maximum(np.asarray(tokens, np.float64), 1.0) / DEEPGEMM_ROWS)
        return super().slots_time_us(tiles * DEEPGEMM_ROWS, hidden, intermediate, num_matrices)


def with_deepgemm(deployment: Deployment) -> Deployment:
    """fp8 experts in DeepGEMM's contiguous kernel for every batch, as vLLM had it while
    VLLM_USE_DEEP_GEMM was on by default and decode did not fall back to Triton
    (github.com/vllm-project/vllm/pull/39331): rows of each expert padded to 128. Rates are SGLang's
    of the same kernel on H100s; its launch, timed from the host, is that of vLLM's own kernel."""
    calibration = calibration_of(deployment)
    deepgemm = load_calibration("h200").expert_ffn("fp8", "deepgemm_contiguous")

    def padded(model: ExpertGemmModel) -> ExpertGemmModel:
        fields: dict[str, Any] = {**vars(deepgemm), "kernel": model.kernel, "shape": model.shape}
        return PaddedExperts(**{**fields, "launch_us": model.launch_us})

    experts = {k: padded(m) if k[0] == "fp8" else m for k, m in calibration.experts.items()}
    found: Calibration = replace(calibration, experts=experts)
    return replace(deployment, calibration=found)
